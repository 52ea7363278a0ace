"""What putting an adapter on costs beside many others: calls of Python are counted, not timed.

The oracle of what it does is the same without leaving anything out, as PEFT would do it.
"""

import gc
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_bases import bert, llama
from tuner_cases import adapted_layers

from randbasis import NolaConfig, RandLoraConfig
from randbasis.tuner import checked_loading, model
from randbasis.tuner.seen_adapters import seeing_only

WORDS = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
NOLA = {"r": 2, "num_basis": 4, "init_weights": False}


def plain(share: bool = True) -> PeftModel:
    config = NolaConfig(**NOLA, share_basis=share, target_modules=["q_proj", "up_proj"])
    return get_peft_model(llama(), config, adapter_name="first")


def add(model: PeftModel, name: str, **options: object) -> None:
    model.add_adapter(name, NolaConfig(**NOLA, target_modules=["q_proj", "up_proj"], **options))


def calls(run: Callable[[], object]) -> int:
    """Calls of functions, of Python and of C, while something runs."""
    found = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    gc.collect()
    gc.disable()  # what goes with the garbage of earlier tests calls functions too
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return found


def show_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (model, checked_loading):
        monkeypatch.setattr(module, "seeing_only", lambda *_: nullcontext())


@pytest.mark.parametrize("share", [True, False])
def test_the_sixteenth_adapter_costs_what_the_second_does(share: bool) -> None:
    adapted = plain(share)
    counted = [calls(partial(add, adapted, f"a{number}", share_basis=share)) for number in range(2, 17)]
    assert len(adapted.peft_config) == 16
    # PEFT goes through the configurations of the others, some six calls each.
    assert max(counted[1:]) - counted[0] <= 14 * 12


def test_deleting_costs_the_same_beside_one_and_beside_many() -> None:
    few, many = plain(), plain()
    for number in range(2, 17):
        add(many, f"a{number}")
    add(few, "a2")
    assert calls(lambda: many.delete_adapter("a2")) - calls(lambda: few.delete_adapter("a2")) <= 14 * 12
    assert all("a2" not in layer.adapted for layer in adapted_layers(many).values())


@pytest.mark.parametrize("mode", [True, False])
def test_a_mode_reaches_every_module(mode: bool) -> None:
    adapted = plain(share=False).train(not mode)
    layer = next(iter(adapted_layers(adapted).values()))
    torch.nn.utils.parametrize.register_parametrization(layer.randbasis_nola_a["first"], "weight", torch.nn.Identity())
    assert {module.training for module in adapted.train(mode).modules()} == {mode}


def test_a_load_grows_by_half_of_what_it_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``load_state_dict``, ``eval`` and some of PEFT's walks visit all modules still, once each."""
    plain().save_pretrained(str(tmp_path))

    def growth() -> int:
        adapted = plain()
        few = calls(partial(adapted.load_adapter, str(tmp_path / "first"), "a2"))
        for number in range(3, 7):
            add(adapted, f"a{number}")
        return calls(partial(adapted.load_adapter, str(tmp_path / "first"), "a7")) - few

    growth()  # fills caches
    ours = growth()
    show_everything(monkeypatch)
    assert ours <= growth() / 2


def test_a_mixed_batch_does_not_walk_through_the_adapters() -> None:
    few, many = plain().eval(), plain().eval()
    for number in range(2, 17):
        add(many, f"a{number}")
    words = {"input_ids": torch.ones(2, 3, dtype=torch.long), "adapter_names": ["first", "first"]}
    for adapted in (few, many):
        adapted(**words)  # fills caches
    # Each layer is asked for the names that it has.
    assert calls(lambda: many(**words)) - calls(lambda: few(**words)) <= 15 * 2 * len(adapted_layers(many))


def state(adapted: PeftModel) -> dict[str, object]:
    found: dict[str, object] = {name: p.requires_grad for name, p in adapted.named_parameters()}
    found |= {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    return found | {f"{key}: active": list(one.active_adapters) for key, one in adapted_layers(adapted).items()}


def frozen_in_part() -> PeftModel:
    adapted = plain()
    next(p for p in adapted.parameters() if p.requires_grad).requires_grad_(False)
    add(adapted, "second")
    return adapted


def with_another_active() -> PeftModel:
    adapted = plain()
    add(adapted, "second", seed=3)
    adapted.set_adapter("second")
    add(adapted, "third")
    return adapted


def with_several_active_of_which_one_goes() -> PeftModel:
    adapted = plain()
    add(adapted, "second")
    add(adapted, "third")
    adapted.base_model.set_adapter(["second", "third"])
    adapted.delete_adapter("third")
    return adapted


def for_inference() -> PeftModel:
    adapted = plain()
    add(adapted, "second", inference_mode=True)
    adapted.add_adapter("third", RandLoraConfig(r=4, target_modules=["down_proj"], init_weights=False))
    return adapted


def with_heads() -> PeftModel:
    adapted = get_peft_model(bert(classes=3), NolaConfig(**NOLA, **WORDS), adapter_name="first")
    adapted.add_adapter("second", NolaConfig(**NOLA, seed=1, **WORDS))
    return adapted


def in_half_precision() -> PeftModel:
    adapted = plain().to(torch.bfloat16)
    add(adapted, "second")
    adapted.base_model._cast_adapter_dtype("first")
    return adapted


MAKERS = (
    frozen_in_part, with_another_active, with_several_active_of_which_one_goes, for_inference, with_heads,
    in_half_precision,
)  # fmt: skip


@pytest.mark.parametrize("make", MAKERS)
def test_leaving_the_others_out_changes_nothing(make: Callable[[], PeftModel], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = state(make())
    show_everything(monkeypatch)
    theirs = state(make())
    assert ours.keys() == theirs.keys()
    for name, found in ours.items():
        wanted = theirs[name]
        assert torch.equal(found, wanted) if isinstance(found, torch.Tensor) else found == wanted, name
        assert getattr(found, "dtype", None) == getattr(wanted, "dtype", None)


def test_what_was_frozen_by_hand_stays_so_when_another_is_put_on() -> None:
    adapted = frozen_in_part()
    own = [p for name, p in adapted.named_parameters() if name.endswith(".first.weight")]
    assert [p.requires_grad for p in own] == [False] + [True] * (len(own) - 1)


def test_only_the_named_are_seen_and_only_in_this_thread() -> None:
    adapted = plain()
    add(adapted, "second")
    everything, stored = dict(adapted.named_modules()), adapted.state_dict()
    elsewhere: list[int] = []
    with seeing_only("second"):
        seen, seen_stored = dict(adapted.named_modules()), adapted.state_dict()
        thread = threading.Thread(target=lambda: elsewhere.append(len(dict(adapted.named_modules()))))
        thread.start()
        thread.join()
    hidden = everything.keys() - seen.keys()
    assert hidden == {key for key in everything if key.endswith(".first")}
    assert stored.keys() - seen_stored.keys() == {key for key in stored if key.endswith(".first.weight")}
    assert list(seen) == [key for key in everything if key in seen]
    assert elsewhere == [len(everything)]
    assert dict(adapted.named_modules()).keys() == everything.keys()


def test_a_walk_that_repeats_duplicates_is_left_as_it_is() -> None:
    adapted = plain()
    layer = next(iter(adapted_layers(adapted).values()))
    with seeing_only("first"):
        own = list(layer.named_modules(remove_duplicate=False))
    assert own == list(layer.named_modules(remove_duplicate=False))

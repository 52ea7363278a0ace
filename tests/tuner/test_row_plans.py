"""Row plans: mixed batches that follow one another with the same names group and gather once, and never stay behind."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from mixed_cases import BASE, each_alone, many_adapters
from peft import PeftModel
from torch import Tensor
from tuner_cases import ONE_EACH, Case, adapted_layers, add_adapter, fill, outputs, token_batch

from randbasis.tuner import snapshot
from randbasis.tuner.layer import RandbasisLinear

NAMES = ["default", "number_1", BASE, "number_2", "number_1"]
Gathers = list[int]


@pytest.fixture
def gathers(monkeypatch: pytest.MonkeyPatch) -> Gathers:
    """An entry for each time that a layer gathers what belongs to the rows of a group."""
    counted: Gathers = []
    gathered = RandbasisLinear._gathered
    monkeypatch.setattr(
        RandbasisLinear, "_gathered", lambda self, *args, **more: counted.append(1) or gathered(self, *args, **more)
    )
    return counted


def checked(model: PeftModel, names: list[str], tokens: int = 1) -> Tensor:
    batch = token_batch(len(names), tokens)
    mixed = outputs(model, batch, adapter_names=names)
    torch.testing.assert_close(mixed, each_alone(model, batch, names), rtol=1e-4, atol=1e-4)
    return mixed


def plans(model: PeftModel) -> list[object]:
    return [plan for layer in adapted_layers(model).values() if (plan := layer._cache.rows.plan) is not None]


@pytest.mark.parametrize("method", ONE_EACH)
def test_steps_of_decoding_gather_once(method: str, gathers: Gathers):
    model = many_adapters(Case("linear", method), 3)
    cache = outputs_with_cache(model, NAMES)
    ids, layers = token_batch(len(NAMES), 1)["input_ids"], len(adapted_layers(model))
    counts, steps = [], []
    for _ in range(3):
        gathers.clear()
        steps.append(decoded(model, ids, cache, adapter_names=NAMES))
        counts.append(len(gathers))
    assert counts == [layers, 0, 0]
    for step in steps:
        torch.testing.assert_close(step, steps[0], rtol=0, atol=0)
    for row, name in enumerate(NAMES):
        model.set_adapter(name) if name != BASE else model.base_model.disable_adapter_layers()
        alone = decoded(model, ids[row : row + 1], outputs_with_cache(model, None, row))
        model.base_model.enable_adapter_layers()
        torch.testing.assert_close(steps[-1][row : row + 1], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def outputs_with_cache(model: PeftModel, names: list[str] | None, row: int | None = None) -> object:
    prompt = token_batch(len(NAMES), 4)["input_ids"]
    named = {} if names is None else {"adapter_names": names}
    return model(input_ids=prompt if row is None else prompt[row : row + 1], use_cache=True, **named).past_key_values


@torch.no_grad()
def decoded(model: PeftModel, ids: Tensor, cache: object, **named: object) -> Tensor:
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, **named).logits
    cache.crop(-1)
    return logits


def test_generation_with_beams_gathers_twice(gathers: Gathers):
    """Once for the prompt and once for the steps; the beams of a row are rows of its adapter."""
    model = many_adapters(Case("linear", "nola"), 3)
    batch, names = token_batch(3, 5), ["default", BASE, "number_2"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 3, "pad_token_id": 0}
    mixed = model.generate(**batch, **options, adapter_names=names)
    assert len(gathers) <= 2 * len(adapted_layers(model))
    for row, name in enumerate(names):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        if name == BASE:
            with model.disable_adapter():
                assert torch.equal(model.generate(**alone, **options), mixed[row : row + 1])
        else:
            model.set_adapter(name)
            assert torch.equal(model.generate(**alone, **options), mixed[row : row + 1])


# --- what ends a plan ---


def through_data(model: PeftModel) -> None:
    for layer in adapted_layers(model).values():
        for attribute in layer.adapter_layer_names:
            getattr(layer, attribute)["number_1"].weight.data.mul_(-3)


def through_other_data(model: PeftModel) -> None:
    for layer in adapted_layers(model).values():
        for attribute in layer.adapter_layer_names:
            weight = getattr(layer, attribute)["number_1"].weight
            weight.data = weight.data.clone() * -3


def a_new_parameter(model: PeftModel) -> None:
    for layer in adapted_layers(model).values():
        for attribute in layer.adapter_layer_names:
            held = getattr(layer, attribute)["number_1"]
            held._parameters["weight"] = torch.nn.Parameter(held.weight.detach() * -3)


def a_state_dict(model: PeftModel) -> None:
    other = copy.deepcopy(model)
    through_data(other)
    model.load_state_dict(other.state_dict(), assign=True)


def another_adapter_of_that_name(model: PeftModel) -> None:
    model.delete_adapter("number_1")
    add_adapter(model, "number_1", Case("linear", "nola").config(), 77)


def an_adapter_of_another_basis(model: PeftModel) -> None:
    model.delete_adapter("number_1")
    add_adapter(model, "number_1", Case("linear", "nola").config(seed=9, r=4), 77)


def fewer_bits(model: PeftModel) -> None:
    for layer in adapted_layers(model).values():
        layer.options["number_1"] = replace(layer.options["number_1"], quantize_coefficients=2)


def other_streams(model: PeftModel) -> None:
    for layer in adapted_layers(model).values():
        layer.randbasis_streams["number_1"].weight.add_(5)


CHANGES = [through_data, through_other_data, a_new_parameter, a_state_dict, another_adapter_of_that_name,
           an_adapter_of_another_basis, fewer_bits, other_streams]  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_passes_counts(change: Callable[[PeftModel], None], tokens: int):
    options = {"share_basis": False} if change is other_streams else {}
    model = many_adapters(Case("linear", "nola"), 3, **options)
    batch = token_batch(len(NAMES), tokens)
    before = [outputs(model, batch, adapter_names=NAMES) for _ in range(2)][-1]
    assert plans(model)
    change(model)
    after = checked(model, NAMES, tokens)
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])
    assert (after[[1, 4]] - before[[1, 4]]).abs().max() > 1e-3


def test_what_does_not_count_keeps_the_plan(gathers: Gathers):
    model = many_adapters(Case("linear", "nola"), 4)
    batch = token_batch(len(NAMES), 1)
    first = outputs(model, batch, adapter_names=NAMES)
    gathers.clear()
    model.set_adapter("number_3")
    fill(model, "number_3", seed=5)
    outputs(model, token_batch(2, 4))
    assert torch.equal(outputs(model, batch, adapter_names=NAMES), first)
    assert not gathers


def test_an_adapter_that_is_loaded_between_two_passes(tmp_path):
    model = many_adapters(Case("linear", "nola"), 3)
    model.save_pretrained(tmp_path, selected_adapters=["number_2"])
    names = ["default", "number_1", BASE]
    before = checked(model, names)
    fill(model, "number_2", seed=8)
    model.load_adapter(tmp_path / "number_2", "number_3")
    assert torch.equal(checked(model, names), before)
    checked(model, ["default", "number_3", "number_2"])
    model.load_adapter(tmp_path / "number_2", "number_2")
    mixed = checked(model, ["default", "number_3", "number_2"])
    assert torch.isfinite(mixed).all()


def test_steps_of_optimizers_count_where_values_are_not_compared(monkeypatch: pytest.MonkeyPatch):
    """As on a GPU: versions and steps decide between two steps of decoding, and nothing outlasts any other pass."""
    monkeypatch.setattr(snapshot, "_kind", lambda _: snapshot.Version)
    model = many_adapters(Case("linear", "nola"), 3)
    checked(model, NAMES)
    outputs(model, token_batch(len(NAMES), 1), adapter_names=NAMES)
    assert plans(model)
    weights = [p for name, p in model.named_parameters() if ".number_1." in name]
    for p in weights:
        p.requires_grad_(True).grad = torch.ones_like(p)
    torch.optim.SGD(weights, lr=0.5, fused=True).step()
    checked(model, NAMES)
    outputs(model, token_batch(len(NAMES), 1), adapter_names=NAMES)
    through_data(model)
    outputs(model, token_batch(2, 4), adapter_names=["default", BASE])
    checked(model, NAMES)
    outputs(model, token_batch(len(NAMES), 3), adapter_names=NAMES)
    assert not plans(model)


# --- what is kept ---


def test_other_names_free_what_was_kept():
    model = many_adapters(Case("linear", "nola"), 3)
    outputs(model, token_batch(len(NAMES), 1), adapter_names=NAMES)
    kept = [weakref.ref(value) for plan in plans(model) for group in plan.groups for value in group.gathered.values()]
    assert kept
    outputs(model, token_batch(2, 1), adapter_names=["default", BASE])
    gc.collect()
    assert not [one for one in kept if one() is not None]


@pytest.mark.parametrize("end", ["train", "to", "delete", "merge"])
def test_what_forgets_factors_forgets_plans(end: str):
    model = many_adapters(Case("linear", "nola"), 3)
    outputs(model, token_batch(len(NAMES), 1), adapter_names=NAMES)
    assert plans(model)
    {
        "train": model.train,
        "to": model.double,
        "delete": lambda: model.delete_adapter("number_2"),
        "merge": lambda: model.merge_adapter(["number_2"]),
    }[end]()
    assert not plans(model)


def test_a_plan_takes_no_more_bytes_than_factors_may(gathers: Gathers):
    model = many_adapters(Case("linear", "nola"), 3)
    for layer in adapted_layers(model).values():
        layer._cache.limit = 100
    for _ in range(2):
        checked(model, NAMES)
    assert not plans(model)
    assert len(gathers) == 2 * len(adapted_layers(model))


def test_copies_and_pickles_have_no_plan():
    model = many_adapters(Case("linear", "nola"), 3)
    expected = checked(model, NAMES)
    outputs(model, token_batch(len(NAMES), 1), adapter_names=NAMES)
    layer = next(iter(adapted_layers(model).values()))
    size = len(pickle.dumps(layer._cache))
    copied = copy.deepcopy(model)
    assert plans(model)
    assert not plans(copied)
    assert size < 200
    through_data(copied)
    assert torch.equal(checked(model, NAMES), expected)
    assert not torch.allclose(checked(copied, NAMES), expected, atol=1e-3)


def test_nothing_is_kept_with_gradients(gathers: Gathers):
    model = many_adapters(Case("linear", "nola"), 3)
    batch = token_batch(len(NAMES), 3)
    outputs(model, batch, adapter_names=NAMES)
    gathers.clear()
    for name, p in model.named_parameters():
        p.requires_grad_("randbasis" in name)
    for _ in range(2):
        model.zero_grad()
        model(**batch, adapter_names=NAMES).logits.sum().backward()
    assert len(gathers) == 2 * len(adapted_layers(model))
    own = [p.grad for name, p in model.named_parameters() if ".number_1." in name]
    assert all(grad is not None and grad.abs().max() > 0 for grad in own)


@pytest.mark.parametrize("autocast", [True, False])
def test_precision_of_the_products_is_part_of_a_plan(autocast: bool):
    model = many_adapters(Case("linear", "vera"), 3)
    batch = token_batch(len(NAMES), 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        first = outputs(model, batch, adapter_names=NAMES)
    with torch.autocast("cpu", torch.bfloat16, enabled=not autocast):
        second = outputs(model, batch, adapter_names=NAMES)
    exact, rounded = (second, first) if autocast else (first, second)
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, each_alone(model, batch, NAMES), rtol=1e-4, atol=1e-4)


def test_threads_keep_plans_of_their_own(gathers: Gathers):
    """Two loops of decoding with different names at once: each gathers once, whatever the other does."""
    model = many_adapters(Case("linear", "nola"), 4)
    batch = token_batch(3, 1)
    orders = [["default", "number_1", BASE], ["number_3", BASE, "number_2"]]
    expected = [each_alone(model, batch, names) for names in orders]
    model(**batch, adapter_names=orders[0])  # what is lazily made
    gathers.clear()
    turn, found = threading.Barrier(2, timeout=30), [list[Tensor](), list[Tensor]()]

    def work(place: int) -> None:
        for _ in range(4):
            turn.wait()
            found[place].append(outputs(model, batch, adapter_names=orders[place]))

    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, wanted in zip(found, expected, strict=True):
        assert len(mine) == 4
        for one in mine:
            torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-4)
    assert len(gathers) == 2 * len(adapted_layers(model))

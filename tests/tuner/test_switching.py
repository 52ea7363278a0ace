"""Switching adapters against PEFT's own ``set_adapter``, which it stands in for."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from small_bases import bert, llama

from randbasis import NolaConfig, RandbasisLinear, RandbasisModel, RandLoraConfig

WORDS = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}


def plain() -> PeftModel:
    """Two adapters of different methods, the second also on layers that the first leaves alone."""
    model = get_peft_model(llama(), NolaConfig(r=2, num_basis=4, target_modules=["q_proj"]), adapter_name="first")
    model.add_adapter("second", RandLoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    return model


def with_heads() -> PeftModel:
    """Two adapters, each with a classifier of its own."""
    model = get_peft_model(bert(classes=3), NolaConfig(r=2, num_basis=4, **WORDS), adapter_name="first")
    model.add_adapter("second", NolaConfig(r=2, num_basis=4, seed=1, **WORDS))
    return model


def state(model: PeftModel) -> dict[str, Any]:
    """Everything that a switch may change."""
    found: dict[str, Any] = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            found[f"{name}: active"] = list(module.active_adapters)
    return found


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize("make", [plain, with_heads])
def test_switching_leaves_what_peft_leaves(make: Callable[[], PeftModel], inference_mode: bool) -> None:
    ours, theirs = make(), make()
    for name in ("second", "first", "second"):
        ours.set_adapter(name, inference_mode=inference_mode)
        theirs.active_adapter = name
        BaseTuner.set_adapter(theirs.base_model, name, inference_mode=inference_mode)
        assert state(ours) == state(theirs)
    assert any(state(ours).values())


def test_a_copy_is_switched_and_not_the_original() -> None:
    model = plain()
    model.set_adapter("second")
    copy = deepcopy(model)
    copy.set_adapter("first")
    assert model.active_adapters == ["second"]
    assert active_of(model) == {("second",)}
    assert active_of(copy) == {("first",)}


def test_layers_that_a_later_adapter_brings_are_switched_too() -> None:
    model = plain()
    model.set_adapter("first")
    model.add_adapter("third", NolaConfig(r=2, num_basis=4, target_modules=["down_proj"]))
    model.set_adapter("third")
    assert active_of(model) == {("third",)}


def active_of(model: PeftModel) -> set[tuple[str, ...]]:
    return {tuple(layer.active_adapters) for layer in model.modules() if isinstance(layer, RandbasisLinear)}


def test_several_adapters_at_once_as_in_peft() -> None:
    ours, theirs = plain(), plain()
    ours.base_model.set_adapter(["first", "second"])
    BaseTuner.set_adapter(theirs.base_model, ["first", "second"])
    assert state(ours) == state(theirs)


def test_a_merged_model_is_unmerged_first() -> None:
    model = plain()
    layer = next(module for module in model.modules() if isinstance(module, RandbasisLinear))
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("second")
    assert not layer.merged


def test_switching_is_our_own() -> None:
    assert "set_adapter" in vars(RandbasisModel)

"""Which adapters of a model are active: PEFT's ``set_adapter``, in the time that a switch may take between two tokens.

PEFT walks through all modules of a model twice, by generators within generators, and sets every parameter of every
adapter. One plain walk that sets only what changes has the same effect.
"""

import warnings
from collections.abc import Sequence
from typing import cast

from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import _set_adapter  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
from torch import nn

from randbasis.tuner.layer import RandbasisLinear


def activate(model: nn.Module, adapters: str | list[str], *, inference_mode: bool) -> None:
    """Make adapters the active ones of a model, as PEFT's ``set_adapter`` does.

    Args:
        model: with adapters on its layers.
        adapters: one name or several.
        inference_mode: leave the active ones frozen.
    """
    layers, wrapped = _adapted(model)
    if wrapped:
        _set_adapter(model, adapters, inference_mode=inference_mode)
    names = [adapters] if isinstance(adapters, str) else adapters
    for layer in layers:
        if layer.merged:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=3)
            layer.unmerge()
        _activate_on(layer, names, () if inference_mode else names)


def _adapted(model: nn.Module) -> tuple[list[RandbasisLinear], bool]:
    """The adapted layers, and whether PEFT has wrapped other modules to train them whole."""
    layers: list[RandbasisLinear] = []
    # Asked once a class: these are abstract ones, for which issubclass is slow.
    ours: dict[type[nn.Module], bool] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        kind = type(module)
        if kind not in ours:
            ours[kind] = issubclass(kind, RandbasisLinear)
        if ours[kind]:
            layers.append(cast("RandbasisLinear", module))
        waiting.extend(child for child in _children(module).values() if child is not None)
    return layers, any(issubclass(kind, AuxiliaryTrainingWrapper) for kind in ours)


def _activate_on(layer: RandbasisLinear, names: list[str], trained: Sequence[str]) -> None:
    for attribute in layer.adapter_layer_names:
        for name, coefficients in _children(cast("nn.ModuleDict", _children(layer)[attribute])).items():
            for parameter in vars(coefficients)["_parameters"].values():
                wanted = name in trained
                if parameter.requires_grad is not wanted and parameter.is_leaf:
                    parameter.requires_grad_(wanted)
    layer._active_adapter = names  # pyright: ignore[reportPrivateUsage]


def _children(module: nn.Module) -> dict[str, nn.Module | None]:
    """Direct ones by name, as torch keeps them: its own accessors cost many times a look into a dictionary."""
    return vars(module)["_modules"]

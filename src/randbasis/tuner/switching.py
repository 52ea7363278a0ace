"""Which adapters of a model are active: PEFT's ``set_adapter``, in the time that a switch may take between two tokens.

PEFT walks through all modules of a model twice and sets every parameter of every adapter. Going over the adapted layers
alone, and setting only what changes, has the same effect.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import cast

from torch import nn

from randbasis.tuner.layer import RandbasisLinear


def activate(layers: Iterable[RandbasisLinear], adapters: str | list[str], *, inference_mode: bool) -> None:
    """Make adapters the active ones of some layers, as PEFT's ``set_adapter`` does.

    Args:
        layers: all adapted layers of a model.
        adapters: one name or several.
        inference_mode: leave the active ones frozen.
    """
    names = [adapters] if isinstance(adapters, str) else adapters
    trained: Sequence[str] = () if inference_mode else names
    for layer in layers:
        if layer.merged:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=3)
            layer.unmerge()
        for attribute in layer.adapter_layer_names:
            for name, coefficients in _children(layer, attribute).items():
                for parameter in vars(coefficients)["_parameters"].values():
                    wanted = name in trained
                    if parameter.requires_grad is not wanted and parameter.is_leaf:
                        parameter.requires_grad_(wanted)
        layer._active_adapter = names  # pyright: ignore[reportPrivateUsage]


def _children(layer: nn.Module, attribute: str) -> dict[str, nn.Module]:
    """What a container of a layer holds, by name: torch's own accessors cost many times a look into a dictionary."""
    return cast("dict[str, nn.Module]", vars(vars(layer)["_modules"][attribute])["_modules"])

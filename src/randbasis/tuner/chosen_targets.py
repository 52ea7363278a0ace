"""The layers that a configuration names, each checked before the first is replaced."""

from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from randbasis.errors import BaseMismatchError, LayerTypeError, TargetError, near
from randbasis.methods import Method
from randbasis.tuner.base_shapes import expected_shape
from randbasis.tuner.base_weight import check_derivable, layer_shape
from randbasis.tuner.bypasses import check_whole
from randbasis.tuner.config import RandbasisConfig
from randbasis.tuner.coverage import names_any
from randbasis.tuner.targets import Part, parts_of, resolve_parts

Target = tuple[Method, list[Part]]
"""The method and the parts of one layer."""


def check_target(config: RandbasisConfig, key: str, module: nn.Module, model_config: Mapping[str, Any]) -> Target:
    """The method and the parts of one layer, which can be adapted so.

    Raises:
        LayerTypeError: it is no linear layer.
        BaseMismatchError: the adapter was made for a layer of another shape.
        ShardedBaseError: its weight is not whole on this device.
        BaseWeightError: no frozen matrices can be made of its weight.
    """
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    check_whole(key, base)
    shape = layer_shape(base)
    if shape is None:
        raise LayerTypeError(
            f"target_modules matches {key!r}, a {type(base).__name__}, but only linear layers can be adapted "
            "(nn.Linear, Conv1D, quantized linear); leave it out, or train it whole with modules_to_save"
        )
    expected = expected_shape(config.base_shapes, key)
    if expected is not None and expected != shape:
        raise BaseMismatchError(
            f"this adapter was made for another base model: the first matrix that differs is {key!r}, "
            f"{expected[0]}×{expected[1]} there and {shape[0]}×{shape[1]} here (out×in); "
            f"load it on {config.base_model_name_or_path or 'the base model it was made for'}"
        )
    method = config.method_for(key)
    if method.needs_base:
        check_derivable(key, base)
    return method, _parts(config, key, shape[0], model_config)


def _parts(config: RandbasisConfig, key: str, rows: int, model_config: Mapping[str, Any]) -> list[Part]:
    """The rows of a layer that the configuration names: those that it was saved with, else by the model's code."""
    wanted = parts_of(key, config.target_slices)
    if not wanted:
        return [Part("", 0, rows)]
    saved = [(name, expected_shape(config.base_rows, f"{key}[{name}]")) for name in wanted]
    known = [Part(name, *bounds) for name, bounds in saved if bounds is not None]
    if known and len(known) == len(wanted):
        return sorted(known, key=lambda part: part.start)
    return resolve_parts(key, wanted, rows, model_config)


def nothing_matched(config: RandbasisConfig, keys: list[str]) -> TargetError:
    """What to say when a configuration names no module of a model."""
    listed = [] if isinstance(config.target_modules, str) else sorted(config.target_modules or [])
    if config.layers_to_transform is not None and any(names_any(one, keys) for one in listed):
        numbers = sorted({int(word) for key in keys for word in key.split(".") if word.isdigit()})
        return TargetError(
            f"layers_to_transform must name layers that have one of the modules {listed}, got "
            f"{config.layers_to_transform} with layers_pattern={config.layers_pattern!r}: the numbers in the paths of "
            f"this model are {numbers}, and a number counts where a name stands before its list, as in model.layers.0; "
            "correct them, or give target_modules as a regular expression"
        )
    names = {key.rpartition(".")[2] for key in keys if key and not key.rpartition(".")[2].isdigit()}
    if isinstance(config.target_modules, str):
        hint = "a string is one regular expression for whole module names; or pass a list of names"
        wanted = repr(config.target_modules)
    else:
        hint = near(listed[0].rpartition(".")[2], names) if listed else "name at least one module"
        wanted = str(listed)
    return TargetError(f"Target modules {wanted} not found in the base model: {hint}")

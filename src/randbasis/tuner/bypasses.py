"""Targets on which an adapter would be put and not be heard: what can be known before the model is changed."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from randbasis.errors import BypassedLayerError, ShardedBaseError
from randbasis.tuner.seen_adapters import ByAdapter
from randbasis.tuner.weight_reads import weight_reader

_SHOWN = 5
_SHAPE_NAMES: Mapping[type[nn.Module], tuple[str, str]] = {
    nn.Linear: ("out_features", "in_features"),
    Conv1D: ("nx", "nf"),
}
"""Where a layer says which shape its weight has as a whole."""


def check_reached(model: nn.Module, keys: Sequence[str]) -> None:
    """Raise unless the model calls each of these modules, and under one name.

    Args:
        model: before an adapter is put on it.
        keys: paths of the targets.

    Raises:
        BypassedLayerError: the weight of a target is read without calling it, or the target has two places.
    """
    places = _places(model, keys)
    for key in keys:
        if (reason := _bypass(model, key, places[key])) is not None:
            raise BypassedLayerError(
                f"target {key!r} cannot be adapted: {reason}; leave it out of target_modules, or name it in "
                f"exclude_modules=[{key!r}]"
            )


def leave_out_bypassed(model: nn.Module, keys: set[str]) -> set[str]:
    """The targets of ``"all-linear"`` without those that :func:`check_reached` refuses, of which a warning tells."""
    places = _places(model, sorted(keys))
    reasons = {key: reason for key in sorted(keys) if (reason := _bypass(model, key, places[key])) is not None}
    if reasons:
        shown = "; ".join(f"{key}: {reason}" for key, reason in list(reasons.items())[:_SHOWN])
        more = f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
        warnings.warn(f"all-linear leaves out {len(reasons)} linear layers ({shown}{more})", stacklevel=4)
    return keys - reasons.keys()


def check_whole(key: str, base: nn.Module) -> None:
    """Raise unless a process has the whole weight of a target.

    Args:
        key: path of the target.
        base: its layer.

    Raises:
        ShardedBaseError: the weight is spread over devices (tensor parallelism, FSDP).
    """
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor):
        return
    names = _SHAPE_NAMES.get(type(base), ())
    cut = bool(names) and weight.dim() == 2 and tuple(weight.shape) != tuple([getattr(base, name) for name in names])
    if cut or isinstance(weight, DTensor) or getattr(base, "_hf_tp_plan", None) is not None:
        raise ShardedBaseError(
            f"target {key!r} must have its whole weight in this process, got one that is spread over devices (a "
            "tp_plan, a device mesh or FSDP): an adapter of random matrices would be cut in other places than the "
            "weight; load the base model without tp_plan, or put the adapter on before it is sharded, or merge it into "
            "the weights with `randbasis merge` and load the merged model with tp_plan"
        )


def _bypass(model: nn.Module, key: str, places: Sequence[str]) -> str | None:
    if len(places) > 1:
        return f"it is one module in several places, {' and '.join(places[:3])}, of which one alone would be adapted"
    reader = weight_reader(model, key)
    if reader is None:
        return None
    return (
        f"{type(reader).__name__} reads its weight without calling it, at least on some devices or in some modes, "
        "where an adapter would have no effect"
    )


def _places(model: nn.Module, keys: Sequence[str]) -> dict[str, list[str]]:
    """The places of each module in the modules above: a block that is shared as a whole is one place."""
    wanted = {id(model.get_submodule(key)): key for key in keys}
    found: dict[str, list[str]] = {key: [] for key in keys}
    for above, module in cast("Iterator[tuple[str, nn.Module]]", model.named_modules()):
        if isinstance(module, (BaseTunerLayer, ByAdapter)):
            continue
        for name, child in module._modules.items():  # pyright: ignore[reportPrivateUsage]
            if id(child) in wanted:
                found[wanted[id(child)]].append(f"{above}.{name}" if above else name)
    return found

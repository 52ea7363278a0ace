"""Whether the sum ``W0 + ΔW`` of a layer may be rounded to half precision, because its adapters ask for that.

A rounded sum trades exactness for a product of the tokens, so it is made in training alone, and only where every active
adapter has asked for it in one way. Where it cannot be made the layer computes as without the option, exactly, and says
so once.
"""

import warnings
from collections.abc import Sequence
from functools import cache

import torch

from randbasis.contraction import HALF
from randbasis.ops import watched
from randbasis.rounding import RoundedSum, Rounding, RoundingChoice
from randbasis.tuner.chosen_orders import ByAdapter
from randbasis.tuner.layer_adapters import LayerAdapters


def rounding_of(layer: LayerAdapters, active: Sequence[str]) -> Rounding | None:
    """How the layer may round its sum in this pass; None where it must not.

    Args:
        layer: which.
        active: the active adapters on it.
    """
    if not active or not layer.training or torch.compiler.is_compiling():
        return None
    kinds: list[RoundingChoice] = [layer.options[name].fuse_rounding for name in active]
    kind, *others = dict.fromkeys(kinds)
    if kind == "none" and not others:
        return None
    if getattr(getattr(layer.base_layer, "weight", None), "dtype", None) not in HALF:
        return None  # a sum in float32 is exact and made anyway
    if others:
        say_exact(f"active adapters ask for different roundings of one sum: {', '.join((kind, *others))}")
        return None
    if watched():
        say_exact("a tracer, a transform of torch.func or a dispatch mode looks on")
        return None
    return Rounding(kind, layer.adapted[active[0]][0].bound.method.seed, f"fuse/{layer.path}")


def rounded_sum(layer: LayerAdapters, rounding: Rounding, by_adapter: ByAdapter) -> RoundedSum:
    """How the base weight of a layer and the ΔW of these adapters are added at their coefficients."""
    parts = [(name, one) for name, own in by_adapter.items() for one in own]
    return rounding.with_draws_of([c for name, one in parts for c in layer.trained_coefficients(name, one).values()])


@cache
def say_exact(reason: str) -> None:
    """Say why layers do what they were to do with a rounded sum."""
    warnings.warn(f"fuse_rounding has no effect here, ΔW keeps an exact product of its own: {reason}", stacklevel=2)

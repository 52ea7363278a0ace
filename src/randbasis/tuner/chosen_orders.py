"""In which order a layer multiplies what, decided once for inputs and a state that do not change: a small layer's
decisions cost more than its products.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from randbasis.rounding import Rounding
from randbasis.tuner.adapted_part import AdaptedPart

ByAdapter = Mapping[str, Sequence[AdaptedPart]]
"""Adapter → those of its parts on this layer that are multiplied in one order."""


@dataclass(frozen=True, slots=True)
class ChosenOrders:
    """The decisions of one forward pass.

    Attributes:
        state: all that they depend on; None where it cannot be told, so that the next pass decides anew.
        dtype: that the products are computed in.
        fused: whether ΔW may be added to the base weight for a pass.
        rounding: how that sum is rounded, where it is not exact.
        thin: whether this is a step of decoding, in which a sum of weights costs more than a second product.
        decoding: whether one token a row is decoded further, and it is known which dimension is that.
        token: what is multiplied in token order.
        weight: what is formed first.
        pair: what is fused, with the gradients of the factors taken from the tokens.
    """

    state: tuple[Any, ...] | None
    dtype: torch.dtype
    fused: bool
    rounding: Rounding | None
    thin: bool
    decoding: bool
    token: ByAdapter
    weight: ByAdapter
    pair: ByAdapter

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """None: the copy of a layer decides for itself."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

"""``W0 + ΔW`` as one matrix in half precision: two ways to round the sum, and what each costs.

A base weight in half precision has 8 (bfloat16) or 11 (float16) bits, and ΔW is often smaller than half of its last
one. Rounded to nearest, such a sum is W0 again, and the ΔW of that entry is lost until it has grown. Rounded to one of
the two neighbours at random, nearer ones more often, it is right in the mean (Gupta et al., arXiv 1502.02551).

The draws come from Philox, so that they are repeatable: words of a stream of the layer, the same in every pass, and
added to each of them a number that is made of the coefficients. So whoever has the same coefficients rounds alike: the
second run of a checkpointed layer, every process of a parallel training, a training that goes on from a checkpoint. And
coefficients that have changed round anew, each entry evenly over the steps of a training.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from randbasis.basis import Basis
from randbasis.errors import HyperparameterError, not_one_of
from randbasis.ops import Slab
from randbasis.ops.backends import words

RoundingChoice = Literal["none", "nearest", "stochastic"]

_DROPPED = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of a float32 that each dtype has no place for."""
_LEAST_NORMAL, _STEPS = 2.0**-14, 2.0**24
"""Below the first, numbers of float16 are multiples of one part in the second."""


def check_rounding(name: str) -> RoundingChoice:
    """The rounding of that name.

    Raises:
        HyperparameterError: there is no such rounding.
    """
    if name not in get_args(RoundingChoice):
        raise HyperparameterError(not_one_of("fuse_rounding", name, get_args(RoundingChoice)))
    return cast("RoundingChoice", name)


@dataclass(frozen=True, slots=True)
class Rounding:
    """How the sum ``W0 + ΔW`` of one layer is rounded.

    Attributes:
        kind: ``"nearest"`` or ``"stochastic"``.
        seed: of the draws.
        stream: that the draws of this layer are named after.
    """

    kind: RoundingChoice
    seed: int
    stream: str

    def with_draws_of(self, coefficients: Iterable[Tensor]) -> "RoundedSum":
        """The sum at some coefficients.

        Args:
            coefficients: all that ΔW is made of.
        """
        return RoundedSum(self, _digest(coefficients) if self.kind == "stochastic" else None)


@dataclass(frozen=True, slots=True)
class RoundedSum:
    """``W0 + ΔW`` in the dtype of ``W0``; called twice it gives the same.

    Attributes:
        rounding: how.
        shift: what is added to the words of the layer's stream; None where nothing is drawn.
    """

    rounding: Rounding
    shift: Tensor | None

    def __call__(self, weight: Tensor, delta: Tensor) -> Tensor:
        """The sum, added in float32 and rounded once; without a graph.

        Args:
            weight: ``W0``, ``[out, in]``, in half precision.
            delta: ``ΔW``, ``[out, in]``, in float32 or in half precision.
        """
        with torch.no_grad():
            total = weight.float().add_(delta)
            if self.shift is None:
                return total.to(weight.dtype)
            return round_to_neighbours(total, self._draws(weight, self.shift), weight.dtype)

    def _draws(self, weight: Tensor, shift: Tensor) -> Tensor:
        rows, cols = weight.shape
        slab = Slab(Basis.named(self.rounding.seed, self.rounding.stream, "normal"), 1, rows, cols)
        drawn = words(slab, weight.device)[0].view(torch.int16)[:, :cols]  # 16 bits an entry, as that law has
        return drawn.to(torch.int32).add_(shift).bitwise_and_(0xFFFF)


def round_to_neighbours(values: Tensor, draws: Tensor, dtype: torch.dtype) -> Tensor:
    """Each number as one of its two neighbours in half precision, the nearer the likelier; those that fit stay.

    Args:
        values: float32, any shape.
        draws: int32 of that shape, evenly from 0 to 2¹⁶ - 1.
        dtype: bfloat16 or float16.
    """
    dropped = _DROPPED[dtype]
    draws = (draws >> (16 - dropped)).masked_fill_(~values.isfinite(), 0)  # carries would make a number of a NaN
    rounded = (values.view(torch.int32) + draws).bitwise_and_(-(1 << dropped)).view(torch.float32)
    if dtype == torch.float16:
        steps = (values * _STEPS + draws * 2.0**-dropped).floor_()
        rounded = torch.where(values.abs() < _LEAST_NORMAL, steps / _STEPS, rounded)
    return rounded.to(dtype)


def _digest(coefficients: Iterable[Tensor]) -> Tensor:
    """A number that every bit of some tensors has a say in, int32 without dimensions, on their device."""
    found: Tensor | None = None
    for tensor in coefficients:
        bits = tensor.detach().float().flatten().view(torch.int32).long()
        places = torch.arange(bits.numel(), device=bits.device).mul_(0x9E3779B2).add_(0x85EBCA6B)  # odd ones
        own = bits.mul_(places).sum()
        found = own if found is None else found * 0x9E3779B1 + own
    if found is None:
        return torch.zeros((), dtype=torch.int32)
    found = (found ^ (found >> 29)) * 0x3C6EF372FE94F82B
    return ((found ^ (found >> 32)) & 0xFFFF).to(torch.int32)

"""Sums of many matrices that have a basis in common, or bases of one shape: one call for all, and one back.

The node of autograd keeps no tensor for its way back, which needs the frozen basis and nothing else. So it may be run
as often as parts of a graph are (two losses of one pass, a checkpointed segment), and a segment that a checkpoint runs
again saves the same tensors as it did with the sums of a whole model: none, in either way.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from randbasis.methods import WeightedSum
from randbasis.ops import Stored, combine_each, inner_each, no_autocast


class Values:
    """What a node has made, for as long as it has a way back ahead of it: a checkpoint will ask for it again.

    Attributes:
        sums: one for each of the coefficients; None before and after.
    """

    __slots__ = ("__weakref__", "sums")

    def __init__(self) -> None:
        self.sums: Tensor | None = None


def kind_of(one: WeightedSum) -> object:
    """Equal for sums that one call makes: those of one basis, or of bases of their own that are not stored densely.

    Bases that are stored densely and differ have nothing in common: a product with each is all that there is to do.
    Holds for as long as the sums live.
    """
    if one.basis.storage == "dense":
        return id(one.basis), one.factor, id(one.offset), one.offset_factor
    return _but_streams(one.basis), one.factor, one.offset and _but_streams(one.offset), one.offset_factor


def _but_streams(stored: Stored) -> tuple[object, ...]:
    slab = stored.slab
    return slab.basis.seed, slab.basis.law.name, slab.count, slab.rows, slab.cols, stored.storage


def joint_sums(
    sums: Sequence[WeightedSum], coefficients: Sequence[Tensor], values: Values | None = None
) -> tuple[Tensor, ...]:
    """``one.of(c)`` for each sum and its coefficients, in one call, which saves no tensor for its way back.

    Those that the graph is left without have no gradient after it (None), as if they had not been there.

    Args:
        sums: of one :func:`kind_of`.
        coefficients: ``[count]`` each, of one dtype on one device; either all require a gradient or none.
        values: is given what is made, where gradients are wanted.
    """
    if torch.is_grad_enabled() and any(c.requires_grad for c in coefficients):
        return cast("tuple[Tensor, ...]", _JointSums.apply(sums, values, None, *coefficients))  # pyright: ignore[reportUnknownMemberType]
    return _made(sums, coefficients).unbind()


def same_sum(one: WeightedSum, coefficients: Tensor, made: Tensor) -> Tensor:
    """``one.of(coefficients)`` where it is known what that is: without a product, but with its way back.

    Args:
        one: the sum.
        coefficients: ``[count]``.
        made: the sum, which was made of equal coefficients before.
    """
    if torch.is_grad_enabled() and coefficients.requires_grad:
        (result,) = cast("tuple[Tensor]", _JointSums.apply([one], None, made, coefficients))  # pyright: ignore[reportUnknownMemberType]
        return result
    return made.detach()


def _made(sums: Sequence[WeightedSum], coefficients: Sequence[Tensor]) -> Tensor:
    first = sums[0]
    with no_autocast(coefficients[0]):
        if len(coefficients) == 1:  # a vector costs less than a matrix of one row
            return first.of(coefficients[0]).unsqueeze(0)
        stacked = torch.stack(list(coefficients))
        if all(one.basis is first.basis for one in sums):
            return first.of(stacked)
        made = combine_each(stacked * first.factor, [one.basis for one in sums])
        offsets = [one.offset for one in sums if one.offset is not None]
        if offsets:
            made += combine_each(stacked.new_full((len(sums), 1), first.offset_factor), offsets)
        return made


def _gradient(sums: Sequence[WeightedSum], of_sums: Tensor) -> Tensor:
    first = sums[0]
    with no_autocast(of_sums):
        if all(one.basis is first.basis for one in sums):
            return first.gradient(of_sums)
        return inner_each(of_sums, [one.basis for one in sums]) * first.factor


class _JointSums(torch.autograd.Function):
    """Many sums and their coefficients."""

    @staticmethod
    def forward(
        ctx: Any, sums: Sequence[WeightedSum], values: Values | None, made: Tensor | None, *coefficients: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.sums, ctx.values = sums, values
        if made is not None:
            return (made.detach(),)
        results = _made(sums, coefficients)
        if values is not None:
            values.sums = results
        return results.unbind()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.values is not None:
            ctx.values.sums = None  # all that needed them has been
        reached = [place for place, gradient in enumerate(gradients) if gradient is not None]
        found: list[Tensor | None] = [None] * len(gradients)
        if reached:
            of_sums = torch.stack([cast("Tensor", gradients[place]) for place in reached])
            of_coefficients = _gradient([ctx.sums[place] for place in reached], of_sums)
            rows = cast("tuple[Tensor, ...]", cast("Any", torch).unbind_copy(of_coefficients))
            for place, row in zip(reached, rows, strict=True):
                found[place] = row
        return None, None, None, *found

"""Sums, norms and products of several ΔW by their factors: no matrix of ``out × in`` where the rank is low.

With thin QR decompositions ``[B₁ B₂ …] = Q R`` and ``[A₁; A₂; …]ᵀ = P S``, every ``ΔWᵢ = Q (Rᵢ Sᵢᵀ) Pᵀ``: norms and
products of the ΔW are those of the small cores ``Rᵢ Sᵢᵀ``, without the cancellation that Gram matrices have. Where the
ranks add up to a side of the matrix, the matrices themselves are the smaller cores.
"""

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from randbasis.methods import Factors


def triangular(tall: Tensor) -> tuple[Tensor, Tensor]:
    """The thin QR decomposition of ``[n, q]``: ``[n, min(n, q)]`` and ``[min(n, q), q]``."""
    return cast("Callable[[Tensor], tuple[Tensor, Tensor]]", torch.linalg.qr)(tall)


def sides(change: Factors) -> tuple[int, int]:
    """``(out, in)`` of ΔW."""
    rows = change.down.shape[0] if change.up is None else change.up.shape[0]
    return rows, change.down.shape[1]


def is_low_rank(*changes: Factors) -> bool:
    """Whether the ranks of these factors add up to less than both sides of the matrix."""
    side = min(min(sides(one)) for one in changes)
    return all(one.up is not None for one in changes) and sum(one.down.shape[0] for one in changes) < side


def weighted_sum(terms: Sequence[tuple[float, Factors]]) -> Factors:
    """``Σ wᵢ ΔWᵢ`` as one pair of factors; as the matrix itself, with no ``up``, where the ranks are not low.

    Args:
        terms: weights, and factors of one shape ``out × in``.
    """
    changes = [change for _, change in terms]
    if not is_low_rank(*changes):
        total = torch.zeros(sides(changes[0]), dtype=changes[0].down.dtype)
        for weight, change in terms:
            total.add_(change.matrix(), alpha=weight)
        return Factors(None, total)
    ups = [weight * change.up for weight, change in terms if change.up is not None]
    return Factors(torch.cat(ups, 1), torch.cat([change.down for change in changes]))


def cores(*changes: Factors) -> list[Tensor]:
    """One small matrix for each ΔW, with the same norms, products and differences among them.

    Args:
        changes: factors of one shape ``out × in``.
    """
    if not is_low_rank(*changes):
        return [change.matrix() for change in changes]
    ranks = [change.down.shape[0] for change in changes]
    split = cast("Callable[[Tensor, list[int], int], tuple[Tensor, ...]]", torch.split)
    left = triangular(torch.cat([change.up for change in changes if change.up is not None], 1))[1]
    right = triangular(torch.cat([change.down for change in changes]).T)[1]
    return [r @ s.T for r, s in zip(split(left, ranks, 1), split(right, ranks, 1), strict=True)]


def norm(change: Factors) -> float:
    """The Frobenius norm ``‖ΔW‖``."""
    return math.sqrt(float(cores(change)[0].square().sum()))


def distance(first: Factors, second: Factors) -> float:
    """The Frobenius norm ``‖ΔW₁ − ΔW₂‖``."""
    one, two = cores(first, second)
    return math.sqrt(float((one - two).square().sum()))

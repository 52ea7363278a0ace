"""One half of an alternation: a symmetric linear system, also where it does not have full rank."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

SMALLEST_PIVOT = 1e-6
"""Of a Cholesky factor, as a share of its largest; below it the system has a null space for what float32 can hold."""
CUT = 1e-12
"""Eigenvalues below this share of the largest count as 0."""


def solve(gram: Tensor, right: Tensor) -> Tensor:
    """``x`` with ``gram x = right``; of all minima the one of least norm where there are many.

    Args:
        gram: ``[n, n]``, symmetric, without negative eigenvalues.
        right: ``[n]``.
    """
    factor, failed = cast("Any", torch.linalg.cholesky_ex)(gram)
    pivots = factor.diagonal()
    if not int(failed) and bool(pivots.min() > SMALLEST_PIVOT * pivots.max()):
        return torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
    values, vectors = cast("Callable[[Tensor], tuple[Tensor, Tensor]]", torch.linalg.eigh)(gram)
    kept = values > CUT * values[-1]
    return vectors[:, kept] @ ((vectors[:, kept].T @ right) / values[kept])

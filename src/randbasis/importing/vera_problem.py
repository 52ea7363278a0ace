"""The nearest VeRA to a ΔW, math (12), as two linear systems that take turns.

``ΔŴ = Λ_b B Λ_d A``. With ``d`` fixed, each ``b`` scales one row and is found alone: ``⟨t, w⟩ / ⟨w, w⟩`` for that
row of ΔW and of ``B Λ_d A``. With ``b`` fixed, the system for ``d`` has the entries ``(Bᵀ Λ_b² B) ∘ (A Aᵀ)``. Rows
of ``in`` entries meet only in ``A Aᵀ`` and ``ΔW Aᵀ``, which are made once.
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from randbasis.importing.normal_equations import CUT, solve
from randbasis.methods import Bound, Factors, Vera


class VeraProblem:
    """One ΔW against one basis; the first vector is ``d``, the second ``b``.

    Args:
        bound: the method there.
        wanted: ΔW.
    """

    bilinear = True

    def __init__(self, bound: Bound[Vera], wanted: Factors) -> None:
        assert wanted.up is not None
        shapes = bound.method.coefficient_shapes(bound.out_features, bound.in_features)
        frozen = bound.factors({name: torch.ones(shape, dtype=torch.float64) for name, shape in shapes.items()})
        assert frozen.up is not None
        self.method, self.wide = bound.method, frozen.up
        self.gram = frozen.down @ frozen.down.T
        self.met = wanted.up @ (wanted.down @ frozen.down.T)
        self.total = float(((wanted.up.T @ wanted.up) * (wanted.down @ wanted.down.T)).sum())

    def starts(self) -> Iterator[Tensor]:
        """Where training starts, and the ``d`` of the nearest product of two vectors to ``(ΔW A⁺) / B``.

        Where ΔW is a VeRA of this basis and ``r ≤ in``, ``ΔW A⁺ = Λ_b B Λ_d`` has that form exactly, entry by entry.
        """
        yield torch.ones(self.method.r, dtype=torch.float64)
        inverse = cast("Tensor", cast("Any", torch.linalg.pinv)(self.gram, hermitian=True, rtol=CUT))
        scales = (self.met @ inverse) * self.wide
        yield torch.linalg.eigh(scales.T @ scales).eigenvectors[:, -1]

    def turn(self, first: Tensor) -> tuple[Tensor, Tensor, float]:
        """The best ``b`` for this ``d``, then the best ``d`` for that ``b``, and the squared residual."""
        rows = self.wide * first
        sizes = ((rows @ self.gram) * rows).sum(1)
        second = torch.where(sizes > 0, (self.met * rows).sum(1) / sizes.clamp_min(torch.finfo(sizes.dtype).tiny), 0.0)
        scaled = second.unsqueeze(1) * self.wide
        system = (scaled.T @ scaled) * self.gram
        right = (scaled * self.met).sum(0)
        first = solve(system, right)
        return first, second, max(0.0, self.total - float(2 * first @ right - first @ (system @ first)))

    def coefficients(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        """The scale of one vector against the other is free: ``d`` gets the size that training starts it with."""
        size = math.sqrt(float(first.square().sum()))
        if size > 0:
            wanted = (abs(self.method.d_initial) or 1.0) * self.method.r**0.5
            scale = wanted / size * (-1.0 if float(first.sum()) < 0 else 1.0)
            first, second = first * scale, second / scale
        return {"vera_d": first, "vera_b": second}

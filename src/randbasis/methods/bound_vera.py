"""The arithmetic of VeRA, math (12)-(13), (21)."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from randbasis.methods.bound import Bound, Coefficients, Factors, Site
from randbasis.methods.vera import Vera
from randbasis.ops import entries, project, sandwich


class BoundVera(Bound[Vera]):
    """A is r × in; B is r × out and transposed on use."""

    def __init__(self, method: Vera, site: Site) -> None:
        super().__init__(method, site, (1, method.r, site.in_features), (1, method.r, site.out_features))
        # Standard deviations √(2/in) of A, with the matrix's own in, and √(2/r) of B.
        unit = self.bases[0].slab.basis.law.unit
        self._scale_a = unit * math.sqrt(2 / site.in_features)
        self._scale_b = unit * math.sqrt(2 / method.r)
        self._scale = unit**2 * math.sqrt(2 / site.in_features) * math.sqrt(2 / method.r)

    def factors(self, coefficients: Coefficients) -> Factors:
        """``Λ_b B Λ_d`` of ``[..., out, r]`` and the frozen ``A`` of ``[..., r, in]``.

        With both scalings on one side, the gradients of both come from one matrix ``[out, r]``, and the graph of the
        product keeps no more than the coefficients.
        """
        a, b = self.bases
        d, rows = coefficients["vera_d"], coefficients["vera_b"]
        frozen_a = entries(a, d.dtype, d.device)[0]
        frozen_b = entries(b, d.dtype, d.device)[0]
        scalings = (self._scale * rows).unsqueeze(-1) * d.unsqueeze(-2)
        return Factors(scalings * frozen_b.T, frozen_a.expand(*d.shape[:-1], *frozen_a.shape))

    def matrix(self, coefficients: Coefficients, dtype: torch.dtype | None = None) -> Tensor:
        """``Λ_b (B Λ_d A)``: the inner product has its own backward."""
        d, b = coefficients["vera_d"], coefficients["vera_b"]
        if d.dim() > 1:
            return super().matrix(coefficients, dtype)
        inner = sandwich(d.unsqueeze(0), None, *self.bases, dtype=dtype)
        scale = (self._scale * b).unsqueeze(-1)
        return (scale if dtype is None else scale.to(dtype)) * inner

    def apply(self, x: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        """``b ⊙ (B (d ⊙ (A x)))`` by row, math (21): two shared products, whatever the number of adapters."""
        a, b = self.bases
        d, rows = prepared["vera_d"].to(x.dtype), prepared["vera_b"].to(x.dtype)
        inner = project(x, a) * (self._scale_a * d).unsqueeze(1)
        return project(inner, b, transpose=True) * (self._scale_b * rows).unsqueeze(1)

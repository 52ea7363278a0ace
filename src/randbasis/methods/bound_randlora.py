"""The arithmetic of RandLoRA, math (14)-(17), (22)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from randbasis.methods.bound import Bound, Coefficients, Factors, Site
from randbasis.methods.randlora import RandLora
from randbasis.ops import entries, project, sandwich


class BoundRandLora(Bound[RandLora]):
    """A is r × min; the Bⱼ are r × max and transposed on use."""

    def __init__(self, method: RandLora, site: Site) -> None:
        out, in_ = site.out_features, site.in_features
        terms = method.terms(out, in_)
        super().__init__(method, site, (1, method.r, min(out, in_)), (terms, method.r, max(out, in_)))
        self._terms, self._wide_in = terms, in_ > out
        # Scaling times the unit factors of A and B.
        self._scale = method.scaling_at(out, in_) * method.unit**2

    def factors(self, coefficients: Coefficients) -> Factors:
        """``[B₀ B₁ …]`` and ``[Λ₀ A Γ₀; Λ₁ A Γ₁; …]``, swapped and transposed when in > out."""
        a, b = self.bases
        lam, gamma = coefficients["randlora_lambda"], coefficients["randlora_gamma"]
        frozen_a = entries(a, lam.dtype, lam.device)[0]
        wide = entries(b, lam.dtype, lam.device).flatten(0, 1).T
        scalings = (self._scale * lam).unsqueeze(-1) * gamma.unsqueeze(-2)
        narrow = (scalings * frozen_a).flatten(-3, -2)
        wide = wide.expand(*narrow.shape[:-2], *wide.shape)
        if self._wide_in:
            return Factors(narrow.transpose(-1, -2), wide.transpose(-1, -2))
        return Factors(wide, narrow)

    def matrix(self, coefficients: Coefficients) -> Tensor:
        """``scaling · Σⱼ Bⱼ Λⱼ A Γⱼ`` in weight order, with its own backward."""
        lam, gamma = coefficients["randlora_lambda"], coefficients["randlora_gamma"]
        if lam.dim() > 2:
            return self.factors(coefficients).matrix()
        delta = sandwich(lam * self._scale, gamma, *self.bases)
        return delta.T if self._wide_in else delta

    def apply(self, x: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        """``Σⱼ Bⱼ (λⱼ ⊙ A (γⱼ ⊙ x))`` by row, math (22): two shared products, whatever the number of adapters."""
        a, b = self.bases
        lam, gamma = (prepared[name].to(x.dtype).unsqueeze(1) for name in ("randlora_lambda", "randlora_gamma"))
        scale: float | Tensor = self._scale
        if x.dtype == torch.float16:
            # γ starts at 1/width: x ⊙ γ would be lost below float16's smallest numbers, and a sum without it leave its
            # largest. Its size goes, as a power of two, to where the sums are scaled.
            size = torch.exp2(
                gamma.detach().float().abs().amax((-2, -1), keepdim=True).clamp_min(2.0**-24).log2().ceil()
            )
            gamma, scale = (gamma / size).to(x.dtype), scale * size
        scaled = (scale * lam).to(x.dtype)
        if self._wide_in:
            wide = project(x, b).view(*x.shape[:-1], self._terms, self.method.r)
            return (project(wide * scaled, a, transpose=True) * gamma).sum(-2)
        narrow = project(x.unsqueeze(-2) * gamma, a)
        return project((narrow * scaled).flatten(-2), b, transpose=True)

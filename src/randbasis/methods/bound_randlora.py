"""The arithmetic of RandLoRA, math (14)-(17), (22)."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear

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
        self._scale = method.scaling_at(out, in_) * self.bases[0].slab.basis.law.unit ** 2

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

    def matrix(self, coefficients: Coefficients, dtype: torch.dtype | None = None) -> Tensor:
        """``scaling · Σⱼ Bⱼ Λⱼ A Γⱼ`` in weight order, with its own backward."""
        lam, gamma = coefficients["randlora_lambda"], coefficients["randlora_gamma"]
        if lam.dim() > 2:
            return super().matrix(coefficients, dtype)
        delta = sandwich(lam * self._scale, gamma, *self.bases, dtype=dtype)
        return delta.T if self._wide_in else delta

    def apply(self, x: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        """``Σⱼ Bⱼ (λⱼ ⊙ A (γⱼ ⊙ x))`` by row, math (22): two shared products, whatever the number of adapters.

        Where all rows have the same coefficients and there are more tokens than a term has ranks, their factors are
        smaller than ``n`` scaled copies of the tokens, and are formed instead.
        """
        a, b = self.bases
        lam, gamma = prepared["randlora_lambda"], prepared["randlora_gamma"]
        if lam.shape[0] == 1 and x.shape[0] * x.shape[1] > self.method.r:
            return self._by_factors(x, lam.squeeze(0), gamma.squeeze(0))
        lam, gamma = lam.to(x.dtype).unsqueeze(1), gamma.to(x.dtype).unsqueeze(1)
        scale: float | Tensor = self._scale
        if x.dtype == torch.float16:
            # γ starts at 1/width: x ⊙ γ would be lost below float16's smallest numbers, and a sum without it leave its
            # largest. Its size goes, as a power of two, to where the sums are scaled.
            gamma, size = _levelled(gamma)
            gamma, scale = gamma.to(x.dtype), scale * size
        scaled = (scale * lam).to(x.dtype)
        if self._wide_in:
            wide = project(x, b).view(*x.shape[:-1], self._terms, self.method.r)
            return (project(wide * scaled, a, transpose=True) * gamma).sum(-2)
        narrow = project(x.unsqueeze(-2) * gamma, a)
        return project((narrow * scaled).flatten(-2), b, transpose=True)

    def _by_factors(self, x: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
        """``B' (M x)``, or ``Mᵀ (B'ᵀ x)`` where in > out, with ``M = [Λ₀ A Γ₀; Λ₁ A Γ₁; …]``."""
        a, b = self.bases
        half = x.dtype in (torch.float16, torch.bfloat16)
        lam, gamma = (one.float() if half else one.to(x.dtype) for one in (lam, gamma))
        scalings = (self._scale * lam).unsqueeze(-1) * gamma.unsqueeze(-2)
        narrow = (scalings * entries(a, scalings.dtype, x.device)[0]).flatten(0, 1)
        size = None
        if x.dtype == torch.float16:
            narrow, size = _levelled(narrow)
        narrow = narrow.to(x.dtype)
        h = linear(project(x, b), narrow.T) if self._wide_in else project(linear(x, narrow), b, transpose=True)
        return h if size is None else h * size.to(h.dtype)

    def token_cost(self, tokens: int, *, training: bool) -> float:
        """As the contract's, plus in training the gradient of ``M``."""
        narrow = min(self.in_features, self.out_features) if training else 0
        return super().token_cost(tokens, training=training) + tokens * self.rank * narrow


def _levelled(values: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices with entries up to 1, and the powers of two that they were divided by, for float16."""
    largest = values.detach().float().abs().amax((-2, -1), keepdim=True)
    size = torch.exp2(largest.clamp_min(2.0**-24).log2().ceil())
    return values / size, size

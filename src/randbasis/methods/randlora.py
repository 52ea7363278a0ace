"""RandLoRA, Albert et al., ICLR 2025, arXiv 2502.00987: math (14)-(17)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from randbasis.errors import HyperparameterError
from randbasis.methods.bound import Bound, Coefficients, Factors, Site
from randbasis.methods.method import Method, check_finite, check_positive
from randbasis.ops import entries, project, sandwich

Scaling = Literal["hf", "paper"]


@dataclass(frozen=True, kw_only=True)
class RandLora(Method):
    """``ΔW = scaling · Σⱼ Bⱼ Λⱼ A Γⱼ``: full rank from ``n = ceil(min / r)`` random terms, math (14).

    Attributes:
        r: rank of one term; coefficients go with its inverse (16).
        scaling: ``"paper"`` = 2/√n, ``"hf"`` = alpha / r (15).
        alpha: of the ``"hf"`` scaling; None means ``20 r``.
    """

    name: ClassVar[str] = "randlora"
    roles: ClassVar[tuple[str, ...]] = ("A", "B")

    r: int
    scaling: Scaling = "hf"
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        check_finite("alpha", 20.0 * self.r if self.alpha is None else self.alpha)
        if self.scaling not in get_args(Scaling):
            raise HyperparameterError(
                f"scaling must be one of {list(get_args(Scaling))}, got {self.scaling!r}; "
                "'paper' is 2/√n, 'hf' is alpha / r"
            )
        if self.scaling == "paper" and self.alpha is not None:
            raise HyperparameterError(
                f"alpha has no meaning with scaling='paper' (2/√n), got alpha={self.alpha}; "
                "leave alpha out or use scaling='hf'"
            )

    def identity(self) -> dict[str, bool | float | str | None]:
        """As for every method, the default of ``alpha`` written out."""
        default = 20.0 * self.r if self.scaling == "hf" else None
        return {**super().identity(), "alpha": default if self.alpha is None else self.alpha}

    def terms(self, out_features: int, in_features: int) -> int:
        """``n_b = ceil(min / r)``; one term when ``r`` is above the smaller side, which adds no rank."""
        return -(-min(out_features, in_features) // self.r)

    def coefficient_shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """``λ`` of ``[n, r]`` and ``γ`` of ``[n, min]``, math (16)."""
        terms = self.terms(out_features, in_features)
        return {"randlora_lambda": (terms, self.r), "randlora_gamma": (terms, min(out_features, in_features))}

    def starts(self, out_features: int, in_features: int) -> dict[str, float]:
        """λ = 0, so ΔW = 0, and ``γ = 1 / max(n, min)``."""
        smaller = min(out_features, in_features)
        return {"randlora_lambda": 0.0, "randlora_gamma": 1.0 / max(self.terms(out_features, in_features), smaller)}

    def rank(self, out_features: int, in_features: int) -> int:
        """``n_b · r``, about min(out, in)."""
        return self.terms(out_features, in_features) * self.r

    def scaling_at(self, out_features: int, in_features: int) -> float:
        """The factor of math (15)."""
        if self.scaling == "paper":
            return 2.0 / math.sqrt(self.terms(out_features, in_features))
        return (20.0 * self.r if self.alpha is None else self.alpha) / self.r

    def bind(self, site: Site, weight: Tensor | None = None) -> "BoundRandLora":
        """See :class:`BoundRandLora`."""
        return BoundRandLora(self, site)


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

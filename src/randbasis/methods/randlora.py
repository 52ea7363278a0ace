"""RandLoRA, Albert et al., ICLR 2025, arXiv 2502.00987: math (14)-(17)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from randbasis.errors import HyperparameterError
from randbasis.methods.method import Method, check_finite, check_positive

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
    arithmetic: ClassVar[str] = "randbasis.methods.bound_randlora.BoundRandLora"
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

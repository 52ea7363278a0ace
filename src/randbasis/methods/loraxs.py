"""LoRA-XS, Bałazy et al., 2024, arXiv 2405.17604: math (27)-(28)."""

from dataclasses import dataclass
from typing import ClassVar

from randbasis.methods.method import Method, check_finite, check_positive


@dataclass(frozen=True, kw_only=True)
class LoraXs(Method):
    """``ΔW = (alpha / r) · U R Σ Vᵀ`` with the leading singular vectors and values of the base weight, math (27).

    Seed and law decide nothing of ΔW, and are compared all the same, as those of every method; from the seed comes the
    noise of ``init_weights=False``.

    Attributes:
        r: singular vectors; a matrix with a smaller side has as many as that.
        alpha: numerator of the scaling ``alpha / r``.
    """

    name: ClassVar[str] = "loraxs"
    arithmetic: ClassVar[str] = "randbasis.methods.bound_loraxs.BoundLoraXs"
    roles: ClassVar[tuple[str, ...]] = ()
    needs_base: ClassVar[bool] = True

    r: int
    alpha: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        check_finite("alpha", self.alpha)

    def coefficient_shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """``R``, whatever the shape of the matrix, math (28)."""
        q = self.rank(out_features, in_features)
        return {"loraxs_r": (q, q)}

    def starts(self, out_features: int, in_features: int) -> dict[str, float]:
        """0, so ΔW = 0; ΔW is linear in R, so all of it has a gradient. The authors draw R with deviation 1e-5."""
        return {"loraxs_r": 0.0}

    def rank(self, out_features: int, in_features: int) -> int:
        """``r``, or the smaller side of the matrix."""
        return min(self.r, out_features, in_features)

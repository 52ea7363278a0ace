"""PRANC, Nooralinejad et al., ICCV 2023, NOLA's predecessor: math (18)."""

from dataclasses import dataclass
from typing import ClassVar

from randbasis.methods.method import Method, check_positive


@dataclass(frozen=True, kw_only=True)
class Pranc(Method):
    """``ΔW = (1/√k) Σᵢ aᵢ Wᵢ`` with dense random matrices of unit variance, math (18).

    Attributes:
        num_basis: ``k``, coefficients a matrix.
        share_basis: one basis for all layers, or one a matrix.
    """

    name: ClassVar[str] = "pranc"
    arithmetic: ClassVar[str] = "randbasis.methods.bound_pranc.BoundPranc"
    roles: ClassVar[tuple[str, ...]] = ("W",)
    sums_its_basis: ClassVar[bool] = True

    num_basis: int
    share_basis: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("num_basis", self.num_basis)

    @property
    def shares_basis(self) -> bool:
        """Whether all layers use the stream ``pranc/W``."""
        return self.share_basis

    def coefficient_shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """``k`` coefficients, whatever the shape of the matrix."""
        return {"pranc_a": (self.num_basis,)}

    def starts(self, out_features: int, in_features: int) -> dict[str, float]:
        """0, so ΔW = 0; ΔW is linear in the coefficients, so all have a gradient."""
        return {"pranc_a": 0.0}

    def rank(self, out_features: int, in_features: int) -> int:
        """``out``: its B is the identity."""
        return out_features

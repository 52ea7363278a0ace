"""PRANC, Nooralinejad et al., ICCV 2023, NOLA's predecessor: math (18)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from randbasis.methods.bound import Bound, Coefficients, Factors, Site, matmul_rows
from randbasis.methods.method import Method, check_positive
from randbasis.ops import weighted_sum


@dataclass(frozen=True, kw_only=True)
class Pranc(Method):
    """``ΔW = (1/√k) Σᵢ aᵢ Wᵢ`` with dense random matrices of unit variance, math (18).

    Attributes:
        num_basis: ``k``, coefficients a matrix.
        share_basis: one basis for all layers, or one a matrix.
    """

    name: ClassVar[str] = "pranc"
    roles: ClassVar[tuple[str, ...]] = ("W",)

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

    def bind(self, site: Site, weight: Tensor | None = None) -> "BoundPranc":
        """See :class:`BoundPranc`."""
        return BoundPranc(self, site)


class BoundPranc(Bound[Pranc]):
    """``Wᵢ`` is out × in."""

    def __init__(self, method: Pranc, site: Site) -> None:
        super().__init__(method, site, (method.num_basis, site.out_features, site.in_features))
        self._scale = method.unit / math.sqrt(method.num_basis)

    def factors(self, coefficients: Coefficients) -> Factors:
        """No low-rank factors: the identity and ΔW itself."""
        return Factors(None, self.matrix(coefficients))

    def matrix(self, coefficients: Coefficients) -> Tensor:
        """``ΔW``, math (18)."""
        (basis,) = self.bases
        return weighted_sum(coefficients["pranc_a"], basis, self._scale)

    def prepare(self, coefficients: Coefficients) -> dict[str, Tensor]:
        """ΔW itself."""
        return {"delta": self.matrix(coefficients)}

    def apply(self, x: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        """``ΔW x`` by row."""
        return matmul_rows(x, prepared["delta"])

    def token_cost(self, tokens: int, *, training: bool) -> float:
        """One product with ΔW, two more for its gradients."""
        return tokens * self.out_features * self.in_features * (3 if training else 1)

    def weight_cost(self, tokens: int, *, training: bool, fused: bool) -> float:
        """As the contract's, without the product of factors: there are none."""
        products = (0 if fused else 1) + ((1 if fused else 2) if training else 0)
        return products * tokens * self.out_features * self.in_features

    def pair_cost(self, tokens: int) -> float:
        """Never the cheapest: there is no pair."""
        return math.inf

"""NOLA, Koohpayegani et al., ICLR 2024, arXiv 2310.02556: math (6)-(10)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from randbasis.errors import HyperparameterError
from randbasis.methods.bound import Bound, Coefficients, Factors, Site, matmul_rows
from randbasis.methods.method import Method, check_finite, check_positive
from randbasis.ops import scaled_entries, weighted_sum

Parametrization = Literal["offset", "plain"]


@dataclass(frozen=True, kw_only=True)
class Nola(Method):
    """``ΔW = (alpha / r) · B A``, ``A`` and ``B`` linear combinations of frozen random matrices, math (6).

    Attributes:
        r: rank of the factors; costs no coefficients.
        num_basis: ``k``, basis matrices of A.
        num_basis_b: ``l``, basis matrices of B; None means ``k``.
        alpha: numerator of the scaling ``alpha / r``.
        parametrization: ``"offset"`` (7): frozen ``A⁰`` and coefficients that start at 0, so ΔW = 0 at the start;
            ``"plain"`` (8): no offset, coefficients that start at ``1/k`` and ``1/l``.
        share_basis: one basis for all layers (9), or one a matrix.
    """

    name: ClassVar[str] = "nola"
    roles: ClassVar[tuple[str, ...]] = ("A", "B", "A0")
    trained_factors: ClassVar[int] = 2

    r: int
    num_basis: int
    num_basis_b: int | None = None
    alpha: float
    parametrization: Parametrization = "offset"
    share_basis: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        check_positive("num_basis", self.num_basis)
        check_positive("num_basis_b", self.basis_b)
        check_finite("alpha", self.alpha)
        if self.parametrization not in get_args(Parametrization):
            raise HyperparameterError(
                f"parametrization must be one of {list(get_args(Parametrization))}, got {self.parametrization!r}; "
                "'offset' is the authors' language-model code, 'plain' their first release and ViT code"
            )

    @property
    def basis_b(self) -> int:
        """``l``: basis matrices of B."""
        return self.num_basis if self.num_basis_b is None else self.num_basis_b

    @property
    def shares_basis(self) -> bool:
        """Whether all layers use the streams ``nola/A``, ``nola/B`` and ``nola/A0``."""
        return self.share_basis

    def identity(self) -> dict[str, bool | float | str | None]:
        """As for every method, the default of ``num_basis_b`` written out."""
        return {**super().identity(), "num_basis_b": self.basis_b}

    def coefficient_shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """``a`` of k and ``b`` of l entries, whatever the shape of the matrix, math (9)."""
        return {"nola_a": (self.num_basis,), "nola_b": (self.basis_b,)}

    def starts(self, out_features: int, in_features: int) -> dict[str, float]:
        """0 with an offset (7), ``1/k`` and ``1/l`` without (8)."""
        if self.parametrization == "offset":
            return {"nola_a": 0.0, "nola_b": 0.0}
        return {"nola_a": 1.0 / self.num_basis, "nola_b": 1.0 / self.basis_b}

    def rank(self, out_features: int, in_features: int) -> int:
        """``r``."""
        return self.r

    def bind(self, site: Site, weight: Tensor | None = None) -> "BoundNola":
        """See :class:`BoundNola`."""
        return BoundNola(self, site)


class BoundNola(Bound[Nola]):
    """``Aᵢ`` is r × in, ``Bⱼ`` r × out and transposed on use, ``A⁰``, where there is one, r × in."""

    def __init__(self, method: Nola, site: Site) -> None:
        out, in_ = site.out_features, site.in_features
        shapes = (method.num_basis, method.r, in_), (method.basis_b, method.r, out), (1, method.r, in_)
        has_offset = method.parametrization == "offset"
        super().__init__(method, site, *shapes[: 3 if has_offset else 2])
        # Real factors of the sums of A and B: standard deviation and, with an offset, 1/√k and 1/√l.
        unit, scaling = method.unit, method.alpha / method.r
        if has_offset:
            self._scale_a = unit / math.sqrt(3 * method.num_basis)
            self._scale_b = unit / math.sqrt(3 * method.basis_b) * scaling
        else:
            deviation = unit / math.sqrt(3 * method.r)
            self._scale_a = deviation / math.sqrt(in_)
            self._scale_b = deviation / math.sqrt(out) * scaling
        self._scale_offset = unit / math.sqrt(3 * in_)

    def factors(self, coefficients: Coefficients) -> Factors:
        """``B · alpha / r`` of ``[..., out, r]`` and ``A`` of ``[..., r, in]``, math (6)-(8)."""
        a, b, *rest = self.bases
        of_a = coefficients["nola_a"]
        offset = scaled_entries(rest[0], self._scale_offset, of_a) if rest else None
        down = weighted_sum(of_a, a, self._scale_a, offset)
        return Factors(weighted_sum(coefficients["nola_b"], b, self._scale_b).transpose(-1, -2), down)

    def prepare(self, coefficients: Coefficients) -> dict[str, Tensor]:
        """The factors themselves: rank r, cheap to keep and to gather by row."""
        factors = self.factors(coefficients)
        assert factors.up is not None
        return {"up": factors.up, "down": factors.down}

    def apply(self, x: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        """``B (A x)`` by row, math (24)."""
        return matmul_rows(matmul_rows(x, prepared["down"]), prepared["up"])

    def token_cost(self, tokens: int, *, training: bool) -> float:
        """As the contract's, plus in training the gradient of the factors themselves."""
        return tokens * self.rank * (self.in_features + self.out_features) * (3 if training else 1)

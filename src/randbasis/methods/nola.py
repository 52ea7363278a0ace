"""NOLA, Koohpayegani et al., ICLR 2024, arXiv 2310.02556: math (6)-(10)."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from randbasis.errors import HyperparameterError
from randbasis.methods.method import Method, check_finite, check_positive

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
    arithmetic: ClassVar[str] = "randbasis.methods.bound_nola.BoundNola"
    roles: ClassVar[tuple[str, ...]] = ("A", "B", "A0")
    sums_its_basis: ClassVar[bool] = True
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

"""VeRA, Kopiczko et al., ICLR 2024, arXiv 2310.11454: math (12)-(13)."""

from dataclasses import dataclass
from typing import ClassVar

from randbasis.methods.method import Method, check_finite, check_positive


@dataclass(frozen=True, kw_only=True)
class Vera(Method):
    """``ΔW = Λ_b B Λ_d A`` with one frozen random pair for all layers, math (12).

    Attributes:
        r: rank of the pair; may exceed the width.
        d_initial: value that ``d`` starts at; ``b`` starts at 0, so ΔW = 0.
    """

    name: ClassVar[str] = "vera"
    arithmetic: ClassVar[str] = "randbasis.methods.bound_vera.BoundVera"
    roles: ClassVar[tuple[str, ...]] = ("A", "B")

    r: int
    d_initial: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        check_finite("d_initial", self.d_initial)

    def identity(self) -> dict[str, bool | float | str | None]:
        """As for every method, without ``d_initial``, which is where training starts."""
        told = super().identity()
        del told["d_initial"]
        return told

    def coefficient_shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """``d`` scales the rank axis, ``b`` the output rows: ``r + out`` coefficients, math (13)."""
        return {"vera_d": (self.r,), "vera_b": (out_features,)}

    def starts(self, out_features: int, in_features: int) -> dict[str, float]:
        """``d_initial`` and 0."""
        return {"vera_d": self.d_initial, "vera_b": 0.0}

    def rank(self, out_features: int, in_features: int) -> int:
        """``r``."""
        return self.r

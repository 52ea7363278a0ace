"""VeRA, Kopiczko et al., ICLR 2024, arXiv 2310.11454: math (12)-(13)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from randbasis.methods.bound import Bound, Coefficients, Factors, Site
from randbasis.methods.method import Method, check_finite, check_positive
from randbasis.ops import entries, project, sandwich


@dataclass(frozen=True, kw_only=True)
class Vera(Method):
    """``ΔW = Λ_b B Λ_d A`` with one frozen random pair for all layers, math (12).

    Attributes:
        r: rank of the pair; may exceed the width.
        d_initial: value that ``d`` starts at; ``b`` starts at 0, so ΔW = 0.
    """

    name: ClassVar[str] = "vera"
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

    def bind(self, site: Site, weight: Tensor | None = None) -> "BoundVera":
        """See :class:`BoundVera`."""
        return BoundVera(self, site)


class BoundVera(Bound[Vera]):
    """A is r × in; B is r × out and transposed on use."""

    def __init__(self, method: Vera, site: Site) -> None:
        super().__init__(method, site, (1, method.r, site.in_features), (1, method.r, site.out_features))
        # Standard deviations √(2/in) of A, with the matrix's own in, and √(2/r) of B.
        self._scale_a = method.unit * math.sqrt(2 / site.in_features)
        self._scale_b = method.unit * math.sqrt(2 / method.r)
        self._scale = method.unit**2 * math.sqrt(2 / site.in_features) * math.sqrt(2 / method.r)

    def factors(self, coefficients: Coefficients) -> Factors:
        """``Λ_b B Λ_d`` of ``[..., out, r]`` and the frozen ``A`` of ``[..., r, in]``.

        With both scalings on one side, the gradients of both come from one matrix ``[out, r]``, and the graph of the
        product keeps no more than the coefficients.
        """
        a, b = self.bases
        d, rows = coefficients["vera_d"], coefficients["vera_b"]
        frozen_a = entries(a, d.dtype, d.device)[0]
        frozen_b = entries(b, d.dtype, d.device)[0]
        scalings = (self._scale * rows).unsqueeze(-1) * d.unsqueeze(-2)
        return Factors(scalings * frozen_b.T, frozen_a.expand(*d.shape[:-1], *frozen_a.shape))

    def matrix(self, coefficients: Coefficients) -> Tensor:
        """``Λ_b (B Λ_d A)``: the inner product has its own backward."""
        d, b = coefficients["vera_d"], coefficients["vera_b"]
        if d.dim() > 1:
            return self.factors(coefficients).matrix()
        inner = sandwich(d.unsqueeze(0), None, *self.bases)
        return (self._scale * b).unsqueeze(-1) * inner

    def apply(self, x: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        """``b ⊙ (B (d ⊙ (A x)))`` by row, math (21): two shared products, whatever the number of adapters."""
        a, b = self.bases
        d, rows = prepared["vera_d"].to(x.dtype), prepared["vera_b"].to(x.dtype)
        inner = project(x, a) * (self._scale_a * d).unsqueeze(1)
        return project(inner, b, transpose=True) * (self._scale_b * rows).unsqueeze(1)

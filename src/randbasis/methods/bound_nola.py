"""The arithmetic of NOLA, math (6)-(10)."""

import math
from collections.abc import Mapping

from torch import Tensor

from randbasis.methods.bound import Bound, Coefficients, Factors, Site, matmul_rows
from randbasis.methods.nola import Nola
from randbasis.ops import scaled_entries, weighted_sum


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

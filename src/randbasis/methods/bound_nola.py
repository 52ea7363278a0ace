"""The arithmetic of NOLA, math (6)-(10)."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from randbasis.methods.bound import Bound, Coefficients, Factors, Site, WeightedSum, matmul_rows
from randbasis.methods.nola import Nola
from randbasis.ops import project


class BoundNola(Bound[Nola]):
    """``Aᵢ`` is r × in, ``Bⱼ`` r × out and transposed on use, ``A⁰``, where there is one, r × in."""

    def __init__(self, method: Nola, site: Site) -> None:
        out, in_ = site.out_features, site.in_features
        shapes = (method.num_basis, method.r, in_), (method.basis_b, method.r, out), (1, method.r, in_)
        has_offset = method.parametrization == "offset"
        super().__init__(method, site, *shapes[: 3 if has_offset else 2])
        # Real factors of the sums of A and B: standard deviation and, with an offset, 1/√k and 1/√l.
        scaling = method.alpha / method.r
        a, b, *rest = self.bases
        unit_a, unit_b = (one.slab.basis.law.unit for one in (a, b))
        if has_offset:
            scale_a, scale_b = unit_a / math.sqrt(3 * method.num_basis), unit_b / math.sqrt(3 * method.basis_b)
            of_a = WeightedSum(a, scale_a, rest[0], rest[0].slab.basis.law.unit / math.sqrt(3 * in_))
        else:
            of_a = WeightedSum(a, unit_a / math.sqrt(3 * method.r) / math.sqrt(in_))
            scale_b = unit_b / math.sqrt(3 * method.r) / math.sqrt(out)
        self.sums = {"nola_a": of_a, "nola_b": WeightedSum(b, scale_b * scaling)}

    def factors(self, coefficients: Coefficients) -> Factors:
        """``B · alpha / r`` of ``[..., out, r]`` and ``A`` of ``[..., r, in]``, math (6)-(8)."""
        of_a, of_b = self.sums.values()
        return self.factors_of((of_a.of(coefficients["nola_a"]), of_b.of(coefficients["nola_b"])))

    def factors_of(self, sums: Sequence[Tensor]) -> Factors:
        """``A`` as it is, ``B`` transposed."""
        down, up = sums
        return Factors(up.transpose(-1, -2), down)

    def prepare(self, coefficients: Coefficients) -> dict[str, Tensor]:
        """The factors themselves: rank r, cheap to keep and to gather by row."""
        return self.prepared(self.factors(coefficients))

    def prepared(self, factors: Factors) -> dict[str, Tensor]:
        """Both, by name."""
        assert factors.up is not None
        return {"up": factors.up, "down": factors.down}

    def apply(self, x: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        """``B (A x)`` by row, math (24)."""
        return matmul_rows(matmul_rows(x, prepared["down"]), prepared["up"])

    def apply_shared(self, x: Tensor, coefficients: Coefficients) -> Tensor:
        """``Σⱼ bⱼ Bⱼ (A⁰ x + Σᵢ aᵢ (Aᵢ x))`` by row, math (23): products with the basis, whatever the adapters.

        The factors of a disjoint basis cost one pass over them, whatever ``k`` is: there each row has its own.
        """
        if self.disjoint:
            return self.apply(x, {name: one.to(x.dtype) for name, one in self.prepare(coefficients).items()})
        r, (a, b) = self.method.r, self.bases[:2]
        of_a, of_b = self.sums.values()
        # The smallest of the real factors goes with the coefficients, which float16 holds; the sums are near 1 in size.
        weights = (coefficients["nola_a"] * of_a.factor).to(x.dtype)[:, None, :, None]
        down = (project(x, a).view(*x.shape[:-1], -1, r) * weights).sum(-2)
        if of_a.offset is not None:
            down = down + project(x, of_a.offset) * of_a.offset_factor
        weights = (coefficients["nola_b"] * of_b.factor).to(x.dtype)[:, None, :, None]
        return project((down.unsqueeze(-2) * weights).flatten(-2), b, transpose=True)

    def shared_cost(self, tokens: int) -> float:
        """Every matrix of the basis instead of one sum; of a disjoint one the sums, at most one a token."""
        if self.disjoint:
            return 2 * self.token_cost(tokens, training=False)
        k, basis_b = self.method.num_basis, self.method.basis_b
        return tokens * self.rank * (k * self.in_features + basis_b * self.out_features)

    def token_cost(self, tokens: int, *, training: bool) -> float:
        """As the contract's, plus in training the gradient of the factors themselves."""
        return tokens * self.rank * (self.in_features + self.out_features) * (3 if training else 1)

"""The arithmetic of PRANC, math (18)."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from randbasis.methods.bound import Bound, Coefficients, Factors, Site, WeightedSum, matmul_rows
from randbasis.methods.pranc import Pranc
from randbasis.ops import project


class BoundPranc(Bound[Pranc]):
    """``Wᵢ`` is out × in."""

    def __init__(self, method: Pranc, site: Site) -> None:
        super().__init__(method, site, (method.num_basis, site.out_features, site.in_features))
        (basis,) = self.bases
        self.sums = {"pranc_a": WeightedSum(basis, basis.slab.basis.law.unit / math.sqrt(method.num_basis))}

    def factors(self, coefficients: Coefficients) -> Factors:
        """No low-rank factors: the identity and ΔW itself."""
        return Factors(None, self.matrix(coefficients))

    def matrix(self, coefficients: Coefficients, dtype: torch.dtype | None = None) -> Tensor:
        """``ΔW``, math (18)."""
        delta = self.sums["pranc_a"].of(coefficients["pranc_a"])
        return delta if dtype is None else delta.to(dtype)

    def factors_of(self, sums: Sequence[Tensor]) -> Factors:
        """The one sum is ΔW."""
        (delta,) = sums
        return Factors(None, delta)

    def prepare(self, coefficients: Coefficients) -> dict[str, Tensor]:
        """ΔW itself."""
        return self.prepared(self.factors(coefficients))

    def prepared(self, factors: Factors) -> dict[str, Tensor]:
        """ΔW, by name."""
        return {"delta": factors.down}

    def apply(self, x: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        """``ΔW x`` by row."""
        return matmul_rows(x, prepared["delta"])

    def apply_shared(self, x: Tensor, coefficients: Coefficients) -> Tensor:
        """``Σᵢ aᵢ (Wᵢ x)`` by row: one product with the basis, whatever the adapters.

        ΔW of a disjoint basis costs one pass over it, whatever ``k`` is: there each row has its own, one at a time.
        """
        if self.disjoint:
            a = coefficients["pranc_a"].expand(x.shape[0], -1)
            pairs = zip(x, a, strict=True)
            return torch.stack([linear(row, self.matrix({"pranc_a": own}, x.dtype)) for row, own in pairs])
        (basis,) = self.bases
        weights = (coefficients["pranc_a"] * self.sums["pranc_a"].factor).to(x.dtype)[:, None, :, None]
        return (project(x, basis).view(*x.shape[:-1], -1, self.out_features) * weights).sum(-2)

    def shared_cost(self, tokens: int) -> float:
        """A product with every matrix of the basis; of a disjoint one ΔW itself, at most one a token."""
        if self.disjoint:
            return 2 * self.token_cost(tokens, training=False)
        return self.method.num_basis * self.token_cost(tokens, training=False)

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

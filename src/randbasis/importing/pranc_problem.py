"""The nearest PRANC to a ΔW, math (18): one linear system, so that the first turn is the last.

``ΔŴ = Σ aᵢ Wᵢ`` with the real factor taken in. The system has the entries ``⟨Wᵢ, Wₘ⟩`` and the right side
``⟨Wᵢ, ΔW⟩ = ⟨Wᵢ V, U⟩`` of ``ΔW = U Vᵀ``.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from randbasis.errors import HyperparameterError
from randbasis.importing.normal_equations import solve
from randbasis.low_rank import cores
from randbasis.methods import Factors, Pranc, Site

ENTRY_LIMIT = 1 << 28
"""Largest number of entries of all basis matrices of a layer together: they then take 2 GiB."""


@dataclass(frozen=True)
class PrancBasis:
    """The basis matrices of one shape.

    Attributes:
        stack: ``[k, out, in]``, real factor included.
        gram: ``[k, k]``, their inner products.
    """

    stack: Tensor
    gram: Tensor

    @classmethod
    def of(cls, method: Pranc, site: Site) -> "PrancBasis":
        """The basis of a matrix.

        Raises:
            HyperparameterError: the basis matrices would be too large.
        """
        k, out, in_ = method.num_basis, site.out_features, site.in_features
        if k * out * in_ > ENTRY_LIMIT:
            raise HyperparameterError(
                f"num_basis · out · in must be at most {ENTRY_LIMIT} for a fit of pranc, got {k} · {out} · {in_}; use "
                "fewer basis matrices, or nola, whose basis matrices are smaller"
            )
        stack = method.bind(site).factors({"pranc_a": torch.eye(k, dtype=torch.float64)}).down
        rows = stack.flatten(1)
        return cls(stack, rows @ rows.T)


class PrancProblem:
    """One ΔW against one basis; there is one vector, ``a``.

    Args:
        basis: for the shape of ΔW.
        wanted: ΔW.
    """

    bilinear = False

    def __init__(self, basis: PrancBasis, wanted: Factors) -> None:
        assert wanted.up is not None
        self.basis = basis
        self.met = ((basis.stack @ wanted.down.T) * wanted.up).flatten(1).sum(1)
        self.total = float(cores(wanted)[0].square().sum())

    def starts(self) -> Iterator[Tensor]:
        """Any will do: the best vector does not depend on it."""
        yield torch.zeros(len(self.met), dtype=torch.float64)

    def turn(self, first: Tensor) -> tuple[Tensor, Tensor, float]:
        """The best ``a``, nothing, and the squared residual."""
        first = solve(self.basis.gram, self.met)
        reached = float(first @ (self.basis.gram @ first))
        return first, first.new_empty(0), max(0.0, self.total - 2 * float(first @ self.met) + reached)

    def coefficients(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        """The vector under its name."""
        return {"pranc_a": first}

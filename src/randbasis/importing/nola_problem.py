"""The nearest NOLA to a ΔW, math (6)-(8), as two linear systems that take turns.

``A = A⁰ + Σ aᵢ Aᵢ`` and ``B = Σ bⱼ Bⱼ`` with their real factors taken in; ``ΔW = Q_u C Q_vᵀ``, both ``Q`` orthonormal.
With ``a`` fixed, the system for ``b`` has the entries ``⟨Bⱼ A, Bₘ A⟩ = ⟨Bⱼᵀ Bₘ, A Aᵀ⟩`` and the right side
``⟨Bⱼ A, ΔW⟩ = ⟨Bⱼᵀ Q_u, A Q_v Cᵀ⟩``: traces of matrices of ``r × r`` and ``r × rank``, once there is the Gram
matrix of the basis. The other half is the same with the sides exchanged.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from randbasis.errors import HyperparameterError
from randbasis.importing.normal_equations import solve
from randbasis.low_rank import triangular
from randbasis.methods import Factors, Nola, Site

GRAM_LIMIT = 1 << 14
"""Largest number of rows of all basis matrices of one side together: its Gram matrix then takes 2 GiB."""


@dataclass(frozen=True)
class NolaSide:
    """The basis matrices of A, or of Bᵀ; at index 0 what has no coefficient, ``A⁰`` or zeros.

    Attributes:
        stack: ``[1 + k, r, width]``, real factors included.
        gram: ``[1 + k, 1 + k, r · r]``, inner products of row ``p`` of one and row ``q`` of another.
    """

    stack: Tensor
    gram: Tensor

    @classmethod
    def of(cls, method: Nola, streams: tuple[int, ...], width: int, *, down: bool) -> "NolaSide":
        """The side of A for matrices with that many columns, or of B for that many rows.

        Raises:
            HyperparameterError: the Gram matrix would be too large.
        """
        number = method.num_basis if down else method.basis_b
        if (1 + number) * method.r > GRAM_LIMIT:
            raise HyperparameterError(
                f"r · num_basis must be below {GRAM_LIMIT} for a fit, got {method.r} · {number}: the Gram matrix of "
                "the basis has the square of that many entries; use a smaller rank or fewer basis matrices"
            )
        site = Site(1, width, streams) if down else Site(width, 1, streams)
        one = torch.eye(1 + number, dtype=torch.float64)[:, 1:]  # first no coefficient, then each of them alone
        none = torch.zeros(1 + number, method.basis_b if down else method.num_basis, dtype=torch.float64)
        found = method.bind(site).factors({"nola_a": one if down else none, "nola_b": none if down else one})
        if down:
            stack = found.down
            stack[1:] -= stack[:1].clone()
        else:
            assert found.up is not None
            stack = found.up.mT.contiguous()
        rows = stack.flatten(0, 1)
        gram = (rows @ rows.T).view(1 + number, method.r, 1 + number, method.r)
        return cls(stack, gram.permute(0, 2, 1, 3).flatten(2))

    def self_product(self, weights: Tensor) -> Tensor:
        """``M Mᵀ`` of ``M = Σ wᵢ stack[i]``, ``[r, r]``."""
        number, _, square = self.gram.shape
        half = (weights @ self.gram.reshape(number, -1)).view(number, square)
        return (weights @ half).view(self.stack.shape[1], -1)


@dataclass(frozen=True)
class NolaBasis:
    """Both sides of the basis of a matrix."""

    down: NolaSide
    up: NolaSide


class NolaProblem:
    """One ΔW against one basis; the first vector is ``a``, the second ``b``.

    Args:
        method: hyper-parameters.
        basis: for the shape of ΔW.
        wanted: ΔW.
    """

    bilinear = True

    def __init__(self, method: Nola, basis: NolaBasis, wanted: Factors) -> None:
        assert wanted.up is not None
        self.method, self.basis = method, basis
        left, left_core = triangular(wanted.up)
        right, right_core = triangular(wanted.down.T)
        self.core = left_core @ right_core.T
        self.down_met = basis.down.stack @ right
        self.up_met = basis.up.stack @ left
        self.total = float(self.core.square().sum())

    def starts(self) -> Iterator[Tensor]:
        """Where training starts, and the ``a`` whose A is nearest to the row space of ΔW.

        Where ΔW is a NOLA of this basis, its rows span those of A: ``A (1 − Q_v Q_vᵀ) = 0`` is linear in ``a`` and has
        the right one for its solution (with an offset), or for its null space (without).
        """
        number, rank = self.basis.down.stack.shape[:2]
        offset = self.method.parametrization == "offset"
        start = 0.0 if offset else 1.0 / self.method.num_basis
        yield torch.full((number - 1,), start, dtype=torch.float64)
        same_row = torch.eye(rank, dtype=torch.float64).flatten()
        met = self.down_met.flatten(1)
        outside = self.basis.down.gram @ same_row - met @ met.T
        if offset:
            yield solve(outside[1:, 1:], -outside[1:, 0])
        else:
            yield torch.linalg.eigh(outside[1:, 1:]).eigenvectors[:, 0]

    def turn(self, first: Tensor) -> tuple[Tensor, Tensor, float]:
        """The best ``b`` for this ``a``, then the best ``a`` for that ``b``, and the squared residual."""
        a = _with_constant(first)
        product, met = self.basis.down.self_product(a), _combined(a, self.down_met)
        second = _half(self.basis.up, self.up_met, product, met @ self.core.T)
        b = _with_constant(second)
        product, met = self.basis.up.self_product(b), _combined(b, self.up_met)
        first = _half(self.basis.down, self.down_met, product, met @ self.core)
        a = _with_constant(first)
        reached = float((product * self.basis.down.self_product(a)).sum())
        shared = float((self.core * (met.T @ _combined(a, self.down_met))).sum())
        return first, second, max(0.0, self.total - 2 * shared + reached)

    def coefficients(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        """Without an offset the scale of one vector against the other is free: that of the start is taken."""
        if self.method.parametrization == "plain":
            size_a = float(first.square().sum()) * self.method.num_basis
            size_b = float(second.square().sum()) * self.method.basis_b
            if size_a > 0 and size_b > 0:
                scale = (size_b / size_a) ** 0.25 * (-1.0 if float(first.sum()) < 0 else 1.0)
                first, second = first * scale, second / scale
        return {"nola_a": first, "nola_b": second}


def _half(side: NolaSide, met: Tensor, product: Tensor, wanted: Tensor) -> Tensor:
    """The best coefficients of one side.

    Args:
        side: that side.
        met: its basis matrices times the orthonormal factor of ΔW, ``[1 + k, r, rank]``.
        product: of the other side with itself, ``[r, r]``.
        wanted: the other side times the rest of ΔW, ``[r, rank]``.
    """
    system = side.gram @ product.flatten()
    return solve(system[1:, 1:], (met[1:].flatten(1) @ wanted.flatten()) - system[1:, 0])


def _combined(weights: Tensor, stack: Tensor) -> Tensor:
    return (weights @ stack.flatten(1)).view(stack.shape[1:])


def _with_constant(coefficients: Tensor) -> Tensor:
    return torch.cat([coefficients.new_ones(1), coefficients])

"""The contract of a method: coefficients and a basis become factors; nothing else.

A method is a frozen record of hyper-parameters. It holds no tensor and knows no layer. What it is told of a layer is a
:class:`Matrix`: a shape and the streams of its bases. Everything above (apply, merge, export, cost) is written once,
on this contract.

Shapes: coefficients may carry leading batch dimensions ``[n, ...]``, one entry for each of ``n`` adapters of the same
method; ``out`` and ``in`` are those of ``ΔW`` in ``h = W0 x + ΔW x``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from randbasis.basis import Basis, Law, check_seed, parse_law, stream_of
from randbasis.errors import CoefficientCountError, HyperparameterError, RankError
from randbasis.ops import BasisStorage, Slab, check_storage, choose_storage, hold, project
from randbasis.ops.storage import Stored

RANK_LIMIT = 1 << 16
"""Largest rank and largest number of basis matrices that any method allows."""

Coefficients = Mapping[str, Tensor]
"""Coefficient name → tensor, in the method's order."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One adapted matrix as a method sees it.

    Attributes:
        out_features: rows of ΔW.
        in_features: columns of ΔW.
        streams: one 32-bit stream for each of the method's roles, math (4).
    """

    out_features: int
    in_features: int
    streams: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Factors:
    """``ΔW = up @ down``.

    Attributes:
        up: ``[..., out, q]``, or None for the identity (PRANC).
        down: ``[..., q, in]``.
    """

    up: Tensor | None
    down: Tensor

    def delta(self) -> Tensor:
        """``ΔW``, ``[..., out, in]``."""
        return self.down if self.up is None else self.up @ self.down


def check_positive(argument: str, value: int) -> None:
    """Raise unless a rank or a number of basis matrices is a positive integer of a size that can be meant.

    Raises:
        RankError: it is not positive, or above :data:`RANK_LIMIT`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise RankError(f"{argument} must be a positive integer, got {value!r}; use for example {argument}=8")
    if value > RANK_LIMIT:
        raise RankError(
            f"{argument} must be at most {RANK_LIMIT} (a factor of that height is larger than any layer), got {value}; "
            f"use for example {argument}=1024"
        )


def check_finite(argument: str, value: float) -> None:
    """Raise unless a real hyper-parameter is a finite number.

    Raises:
        HyperparameterError: it is not.
    """
    if not isinstance(value, (int, float)) or not math.isfinite(value):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise HyperparameterError(f"{argument} must be a finite number, got {value!r}; use for example {argument}=1.0")


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Hyper-parameters that every method has.

    Attributes:
        seed: 64-bit seed of all its bases.
        law: law of their entries.
        basis_storage: how the bases are kept between calls; changes cost, never values.
    """

    name: ClassVar[str]
    roles: ClassVar[tuple[str, ...]]
    trained_factors: ClassVar[int] = 1
    """How many of the two factors depend on coefficients; the other is frozen."""

    seed: int = 0
    law: str = "sign"
    basis_storage: BasisStorage = "auto"

    def __post_init__(self) -> None:
        check_seed(self.seed)
        parse_law(self.law)
        check_storage(self.basis_storage)

    # --- what is counted and stored ---

    @abstractmethod
    def coefficient_shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """Shape of each coefficient tensor of one matrix, in the order in which files hold them."""

    @abstractmethod
    def starts(self, out_features: int, in_features: int) -> dict[str, float]:
        """Value that each coefficient tensor is filled with before training."""

    def count(self, out_features: int, in_features: int) -> int:
        """Coefficients of one matrix: math (9), (13) or (16)."""
        return sum(math.prod(shape) for shape in self.coefficient_shapes(out_features, in_features).values())

    @abstractmethod
    def rank(self, out_features: int, in_features: int) -> int:
        """``q`` of math §2: the inner dimension of the factors."""

    def identity(self) -> dict[str, bool | float | str | None]:
        """What fixes ΔW once coefficients and streams are given: by name, equal for equal ΔW.

        A start value, or a default against the same value written out, makes no difference.
        """
        told = {one.name: getattr(self, one.name) for one in fields(self)}
        del told["basis_storage"]
        return {"method": self.name, **told, "law": parse_law(self.law).name}

    # --- the basis of a matrix ---

    @property
    def shares_basis(self) -> bool:
        """Whether all layers use the same streams."""
        return True

    def streams(self, path: str = "") -> tuple[int, ...]:
        """The stream of each role, math (4).

        Args:
            path: module path of the matrix; used only when the basis is not shared.
        """
        return _streams(self.name, self.roles, "" if self.shares_basis else f"/{path}")

    def slab(self, matrix: Matrix, role: str, count: int, rows: int, cols: int) -> Slab:
        """The part of a role's basis that a matrix uses."""
        stream = matrix.streams[self.roles.index(role)]
        return Slab(Basis(self.seed, stream, parse_law(self.law)), count, rows, cols)

    @abstractmethod
    def slabs(self, matrix: Matrix) -> tuple[Slab, ...]:
        """Every slab that a matrix uses, one a role."""

    def storage(self, slab: Slab) -> BasisStorage:
        """How one slab is kept."""
        return choose_storage(slab, self.basis_storage, shared=self.shares_basis)

    def hold(self, matrix: Matrix) -> tuple[Stored, ...]:
        """Keep the slabs of a matrix stored for as long as the result lives."""
        return tuple(hold(slab, kind) for slab in self.slabs(matrix) if (kind := self.storage(slab)) != "recompute")

    @property
    def unit(self) -> float:
        """The part of the real factor for unit variance that the entries do not carry, in [1, 2), math (5)."""
        law = parse_law(self.law)
        return law.unit_scale / law.power

    # --- coefficients become a change of the layer ---

    @abstractmethod
    def factors(self, coefficients: Coefficients, matrix: Matrix) -> Factors:
        """The pair ``(B, A)`` with ``ΔW = B A``, scaling included; differentiable."""

    def delta(self, coefficients: Coefficients, matrix: Matrix) -> Tensor:
        """``ΔW``, ``[..., out, in]``; differentiable."""
        return self.factors(coefficients, matrix).delta()

    def prepare(self, coefficients: Coefficients, matrix: Matrix) -> dict[str, Tensor]:
        """What :meth:`apply` needs of the coefficients and what is worth caching while they do not change."""
        return dict(coefficients)

    def project(self, x: Tensor, slab: Slab, *, transpose: bool = False) -> Tensor:
        """A product with the entries of a slab, which still needs :attr:`unit` for unit variance, math (5)."""
        return project(x, slab, self.storage(slab), transpose=transpose)

    @abstractmethod
    def apply(self, x: Tensor, prepared: Mapping[str, Tensor], matrix: Matrix) -> Tensor:
        """``ΔW x`` in token order (19), a coefficient set for each row of a batch.

        Args:
            x: ``[rows, tokens, in]``.
            prepared: from :meth:`prepare`, each tensor with a leading dimension ``rows``, or 1 for all rows alike.
            matrix: shape and streams.

        Returns:
            ``[rows, tokens, out]``.
        """

    # --- cost ---

    def token_cost(self, tokens: int, matrix: Matrix, *, training: bool) -> float:
        """Multiply-adds of math (19) above the base layer for one forward (and backward) pass."""
        q = self.rank(matrix.out_features, matrix.in_features)
        return (2 if training else 1) * tokens * q * (matrix.in_features + matrix.out_features)

    def weight_cost(self, tokens: int, matrix: Matrix, *, training: bool, fused: bool) -> float:
        """Multiply-adds of math (20) above the base layer for one forward (and backward) pass.

        ``fused`` says that ``W0 + ΔW`` is one matrix, so that only the gradient of ΔW costs a product of T·in·out.
        """
        area = matrix.out_features * matrix.in_features
        rank = self.rank(matrix.out_features, matrix.in_features)
        build = (1 + self.trained_factors) * rank * area if training else 0
        products = (0 if fused else 1) + ((1 if fused else 2) if training else 0)
        return build + products * tokens * area

    def pair_cost(self, tokens: int, matrix: Matrix) -> float:
        """Multiply-adds of math (20) in training, fused, with the gradient of the factors taken from the tokens."""
        out, in_ = matrix.out_features, matrix.in_features
        rank = self.rank(out, in_)
        return rank * out * in_ + self.trained_factors * tokens * rank * (in_ + out)


@lru_cache(maxsize=1024)
def _streams(method: str, roles: tuple[str, ...], suffix: str) -> tuple[int, ...]:
    """Those of a shared basis are asked for by every matrix."""
    return tuple([stream_of(f"{method}/{role}{suffix}") for role in roles])


def check_coefficients(coefficients: Coefficients, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise unless every coefficient tensor is there with its shape (after leading batch dimensions).

    Raises:
        CoefficientCountError: one is missing or has another shape.
    """
    for name, shape in shapes.items():
        found = tuple(coefficients[name].shape) if name in coefficients else None
        if found is None or found[len(found) - len(shape) :] != shape:
            got = "nothing" if found is None else f"shape {list(found)}"
            raise CoefficientCountError(
                f"{where}: coefficients {name!r} must have shape {list(shape)}, got {got}; "
                "use the rank and basis that the adapter was made with"
            )


def matmul_rows(x: Tensor, weight: Tensor) -> Tensor:
    """``x[r] @ weight[r]ᵀ`` for each row; one weight for all rows is one plain product.

    Args:
        x: ``[rows, tokens, in]``.
        weight: ``[rows or 1, out, in]``.
    """
    if weight.shape[0] == 1:
        return torch.nn.functional.linear(x, weight.squeeze(0))
    return torch.bmm(x, weight.transpose(1, 2))


__all__ = [
    "Coefficients",
    "Factors",
    "Law",
    "Matrix",
    "Method",
    "check_coefficients",
    "check_finite",
    "check_positive",
    "matmul_rows",
]

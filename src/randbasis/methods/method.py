"""The contract of a method: coefficients and a basis become factors; nothing else.

A method is a frozen record of hyper-parameters. It holds no tensor and knows no layer. What it is told of a layer is a
:class:`~randbasis.methods.bound.Site`, a shape and the streams of its bases, which it is bound to:
:mod:`randbasis.methods.bound`. Everything above (apply, merge, export, cost) is written once, on this contract. What
only counts and checks loads no torch: the arithmetic of a method is a file of its own, imported where it is bound.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from randbasis.basis_storage import BasisStorage, check_storage
from randbasis.errors import CoefficientCountError, HyperparameterError, LawError, RankError
from randbasis.laws import check_seed, parse_law, stream_of

if TYPE_CHECKING:
    from torch import Tensor

    from randbasis.methods.bound import Bound, Coefficients, Site

RANK_LIMIT = 1 << 16
"""Largest rank and largest number of basis matrices that any method allows."""


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
        law: law of their entries; ``"hashed"``, for methods that sum matrices, has their number for its k.
        basis_storage: how the bases are kept between calls; changes cost, never values.
    """

    name: ClassVar[str]
    roles: ClassVar[tuple[str, ...]]
    arithmetic: ClassVar[str]
    """Path of the :class:`~randbasis.methods.bound.Bound` that it becomes on a matrix."""
    trained_factors: ClassVar[int] = 1
    """How many of the two factors depend on coefficients; the other is frozen."""
    needs_base: ClassVar[bool] = False
    """Whether its frozen matrices are made of the base weight, and not drawn from the seed."""
    sums_its_basis: ClassVar[bool] = False
    """Whether coefficients weight whole matrices in a sum, so that these may be disjoint, math (25)."""

    seed: int = 0
    law: str = "sign"
    basis_storage: BasisStorage = "auto"

    def __post_init__(self) -> None:
        check_seed(self.seed)
        self._check_law()
        check_storage(self.basis_storage)

    def _check_law(self) -> None:
        law = parse_law(self.law)
        if not law.disjoint:
            return
        if not self.sums_its_basis:
            raise LawError(
                f"law must be one whose matrices are whole for {self.name}: 'hashed' gives each entry of a sum of "
                f"matrices to one coefficient (25), and {self.name} has no such sum, got {self.law!r}; use law='sign', "
                "or nola or pranc with law='hashed'"
            )
        if law.matrices:
            raise LawError(
                f"law must not say its k for {self.name}: the number of its basis matrices says it, got {self.law!r}; "
                f"use law='hashed' and num_basis={law.matrices}"
            )

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

    # --- coefficients become a change of the layer ---

    def bind(self, site: "Site", weight: "Tensor | None" = None) -> "Bound[Any]":
        """The method on one matrix: whoever uses it more than once keeps the result.

        Args:
            site: shape and streams.
            weight: ``[out, in]``, the frozen weight there, for a method that needs it; others ignore it. Without it, or
                on the meta device, such a method counts, and makes no ΔW.

        Raises:
            BaseWeightError: no frozen matrices can be made of the weight.
        """
        module, _, kind = self.arithmetic.rpartition(".")
        return getattr(import_module(module), kind).at(self, site, weight)


@lru_cache(maxsize=1024)
def _streams(method: str, roles: tuple[str, ...], suffix: str) -> tuple[int, ...]:
    """Those of a shared basis are asked for by every matrix."""
    return tuple([stream_of(f"{method}/{role}{suffix}") for role in roles])


def check_coefficients(coefficients: "Coefficients", shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
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

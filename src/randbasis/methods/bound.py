"""A method on one matrix: all that its shape, streams, law, storage and scales decide is decided once.

:meth:`Method.bind` makes a :class:`Bound` of a :class:`Site`; :meth:`Bound.delta` makes a :class:`Delta` of
coefficients: ΔW as an object, with a cheap product and an honest matrix. A layer, which knows what to keep between its
passes, asks the :class:`Bound` itself.

Shapes: coefficients may carry leading batch dimensions ``[n, ...]``, one entry for each of ``n`` adapters of the same
method; ``out`` and ``in`` are those of ``ΔW`` in ``h = W0 x + ΔW x``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor

from randbasis.basis import Basis
from randbasis.basis_storage import BasisStorage
from randbasis.errors import BaseWeightError
from randbasis.laws import parse_law
from randbasis.ops import Derived, Slab, Stored, choose_storage, hold, inner, scaled_entries, weighted_sum

Coefficients = Mapping[str, Tensor]
"""Coefficient name → tensor, in the method's order."""


class Hyperparameters(Protocol):
    """What is asked here of a :class:`~randbasis.methods.Method`, and means what it does there."""

    name: ClassVar[str]
    trained_factors: ClassVar[int]

    @property
    def seed(self) -> int:
        """Of the frozen matrices."""
        ...

    @property
    def law(self) -> str:
        """Of their entries."""
        ...

    @property
    def basis_storage(self) -> BasisStorage:
        """How they are kept."""
        ...

    @property
    def shares_basis(self) -> bool:
        """Whether all layers have the same."""
        ...

    def rank(self, out_features: int, in_features: int) -> int:
        """The inner dimension of the factors."""
        ...


M = TypeVar("M", bound=Hyperparameters)


@dataclass(frozen=True, slots=True)
class Site:
    """Where ΔW goes, as a method sees it.

    Attributes:
        out_features: rows of ΔW.
        in_features: columns of ΔW.
        streams: one 32-bit stream for each of the method's roles, math (4).
        device: of the base weight, when it is known: ``basis_storage="auto"`` asks it for free memory. Sites that
            differ in it alone are the same.
    """

    out_features: int
    in_features: int
    streams: tuple[int, ...]
    device: torch.device | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Factors:
    """``ΔW = up @ down``.

    Attributes:
        up: ``[..., out, q]``, or None for the identity (PRANC).
        down: ``[..., q, in]``.
    """

    up: Tensor | None
    down: Tensor

    def matrix(self) -> Tensor:
        """``ΔW``, ``[..., out, in]``."""
        return self.down if self.up is None else self.up @ self.down


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """``factor · Σᵢ cᵢ · entries[i] + offset``: a factor that is a sum of frozen matrices, math (6), (8) and (18).

    Equal ones, those of all matrices that share a basis, may be made of their coefficients in one product.

    Attributes:
        basis: the frozen matrices.
        factor: real factor of the sum.
        offset: one frozen matrix, or None.
        offset_factor: its real factor.
    """

    basis: Stored
    factor: float
    offset: Stored | None = None
    offset_factor: float = 0.0

    def of(self, coefficients: Tensor) -> Tensor:
        """The sum, ``[..., rows, cols]``, of ``[..., count]``; differentiable."""
        offset = None if self.offset is None else scaled_entries(self.offset, self.offset_factor, coefficients)
        return weighted_sum(coefficients, self.basis, self.factor, offset)

    def gradient(self, of_sums: Tensor) -> Tensor:
        """That of the coefficients, ``[..., count]``, from that of the sums, math (10); differentiable."""
        return inner(of_sums, self.basis) * self.factor


class Bound(ABC, Generic[M]):
    """One method on one matrix. Its frozen matrices stay stored for as long as it lives.

    Nothing of it is trained, and nothing changes: copies of a model share it.

    Attributes:
        method: the hyper-parameters.
        site: shape and streams.
        rank: ``q`` of math §2, the inner dimension of the factors.
        bases: the frozen matrices that are drawn from the seed, one a role of the method that is used here.
        derived: those that are made of the base weight; None where there are none, or the weight is not at hand.
        digest: of that weight.
        sums: for each coefficient the sum that it is for, where factors are nothing but such sums; else none.
    """

    sums: Mapping[str, WeightedSum] = MappingProxyType({})

    def __init__(self, method: M, site: Site, *shapes: tuple[int, int, int], derived: Derived | None = None) -> None:
        """``shapes``: ``(count, rows, cols)`` of the matrices of each role that is used, the first roles first."""
        self.method = method
        self.site = site
        self.out_features, self.in_features = site.out_features, site.in_features
        self.rank = method.rank(site.out_features, site.in_features)
        self.derived = derived
        self.digest = None if derived is None else derived.digest
        self._hash = hash((method, site, self.digest))
        law = parse_law(method.law)
        bases: list[Stored] = []
        for stream, shape in zip(site.streams, shapes, strict=False):
            slab = Slab(Basis(method.seed, stream, law), *shape)
            kept = choose_storage(slab, method.basis_storage, shared=method.shares_basis, device=site.device)
            bases.append(hold(slab, kept))
        self.bases = tuple(bases)

    @classmethod
    def at(cls, method: M, site: Site, weight: Tensor | None) -> "Bound[M]":
        """See :meth:`randbasis.methods.Method.bind`; a method that needs the weight makes its matrices here."""
        return cls(method, site)

    @property
    def disjoint(self) -> bool:
        """Whether a sum of its matrices costs one pass over one of them, math (25): nothing is then shared by rows."""
        return any(one.basis.slab.disjoint for one in self.sums.values())

    def of_base(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """The frozen matrices that are made of the base weight.

        Raises:
            BaseWeightError: the weight is not at hand, or not what it was.
        """
        if self.derived is None:
            raise no_weights(self.method.name)
        return self.derived.tensors(dtype, device)

    def delta(self, coefficients: Coefficients) -> "Delta":
        """ΔW of some coefficients."""
        return Delta(self, coefficients)

    @abstractmethod
    def factors(self, coefficients: Coefficients) -> Factors:
        """The pair ``(B, A)`` with ``ΔW = B A``, scaling included; differentiable."""

    def factors_of(self, sums: Sequence[Tensor]) -> Factors:
        """The factors, once :attr:`sums` are made, in their order."""
        raise NotImplementedError(f"the factors of {self.method.name} are not sums alone")

    def prepared(self, factors: Factors) -> dict[str, Tensor]:
        """:meth:`prepare`, once the factors are made, for a method with :attr:`sums`."""
        raise NotImplementedError(f"{self.method.name} prepares other things than factors")

    def matrix(self, coefficients: Coefficients, dtype: torch.dtype | None = None) -> Tensor:
        """``ΔW``, ``[..., out, in]``; differentiable.

        Args:
            coefficients: of the method.
            dtype: of the result; a method may then make it of operands of that dtype. None takes that of the
                coefficients, in which it is as exact as they are.
        """
        delta = self.factors(coefficients).matrix()
        return delta if dtype is None else delta.to(dtype)

    def prepare(self, coefficients: Coefficients) -> dict[str, Tensor]:
        """What :meth:`apply` needs of the coefficients and what is worth keeping while they do not change."""
        return dict(coefficients)

    @abstractmethod
    def apply(self, x: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        """``ΔW x`` in token order (19), a coefficient set for each row of a batch.

        Args:
            x: ``[rows, tokens, in]``.
            prepared: from :meth:`prepare`, each tensor with a leading dimension ``rows``, or 1 for all rows alike.

        Returns:
            ``[rows, tokens, out]``.
        """

    def apply_shared(self, x: Tensor, coefficients: Coefficients) -> Tensor:
        """:meth:`apply` of coefficients that nothing was made of: what is large in it is the same for all rows.

        Args:
            x: ``[rows, tokens, in]``.
            coefficients: each tensor with a leading dimension ``rows``, or 1 for all rows alike.

        Returns:
            ``[rows, tokens, out]``.
        """
        return self.apply(x, self.prepare(coefficients))

    def shared_cost(self, tokens: int) -> float:
        """Multiply-adds of :meth:`apply_shared`, one coefficient set a row."""
        return self.token_cost(tokens, training=False)

    # --- cost ---

    def token_cost(self, tokens: int, *, training: bool) -> float:
        """Multiply-adds of math (19) above the base layer for one forward (and backward) pass."""
        return (2 if training else 1) * tokens * self.rank * (self.in_features + self.out_features)

    def weight_cost(self, tokens: int, *, training: bool, fused: bool) -> float:
        """Multiply-adds of math (20) above the base layer for one forward (and backward) pass.

        ``fused`` says that ``W0 + ΔW`` is one matrix, so that only the gradient of ΔW costs a product of T·in·out.
        """
        area = self.out_features * self.in_features
        build = (1 + self.method.trained_factors) * self.rank * area if training else 0
        products = (0 if fused else 1) + ((1 if fused else 2) if training else 0)
        return build + products * tokens * area

    def pair_cost(self, tokens: int) -> float:
        """Multiply-adds of math (20) in training, fused, with the gradient of the factors taken from the tokens."""
        sides = self.in_features + self.out_features
        area = self.out_features * self.in_features
        return self.rank * area + self.method.trained_factors * tokens * self.rank * sides

    # --- equality and copies ---

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Bound):
            return NotImplemented
        there = cast("Bound[Any]", other)
        return bool(self.method == there.method) and self.site == there.site and self.digest == there.digest

    def __hash__(self) -> int:
        return self._hash

    def __deepcopy__(self, memo: dict[int, Any]) -> "Bound[M]":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.method, self.site, *(() if self.derived is None else (self.derived,)))


@dataclass(frozen=True, slots=True)
class Delta:
    """``ΔW`` of one matrix.

    Attributes:
        bound: the method there.
        coefficients: its coefficients, without batch dimensions.
    """

    bound: Bound[Any]
    coefficients: Coefficients

    def apply(self, x: Tensor) -> Tensor:
        """``ΔW x`` by the factors, math (19), at the price of :meth:`Bound.token_cost`.

        Args:
            x: ``[..., in]``.

        Returns:
            ``[..., out]``.
        """
        prepared = self.bound.prepare({name: value.unsqueeze(0) for name, value in self.coefficients.items()})
        h = self.bound.apply(x.reshape(1, -1, x.shape[-1]), prepared)
        return h.view(*x.shape[:-1], self.bound.out_features)

    def matrix(self) -> Tensor:
        """``ΔW`` itself, ``[out, in]``, math (20)."""
        return self.bound.matrix(self.coefficients)

    def factors(self) -> Factors:
        """``B`` and ``A`` with ``ΔW = B A``."""
        return self.bound.factors(self.coefficients)

    def double(self) -> "Delta":
        """The same in float64, for whatever measures it."""
        return Delta(self.bound, {name: values.double() for name, values in self.coefficients.items()})


def no_weights(method: str) -> BaseWeightError:
    """What is said where ΔW is asked for and only coefficients are at hand."""
    return BaseWeightError(
        f"{method} makes its frozen matrices of the base model's weights, so that ΔW needs them, got coefficients "
        "alone; put the adapter on its base model with its weights (PeftModel.from_pretrained, randbasis.put) and "
        "take ΔW from there, or merge it (randbasis merge)"
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

"""The rows of a mixed batch on one layer, planned once: a step of decoding must not pay for each of its adapters.

Types and data flow::

    MixedBatch, x            names of the rows, where they are
        │ the first pass with them: RandbasisLinear groups the rows and gathers what the method prepares
        ▼
    RowPlan                  groups, index tensors, gathered tensors; what they were made of (SeenRows)
        │ each further pass: RowPlan.fits
        ▼
    RowPlan.add_to           two products a group, whatever the number of adapters

A layer keeps one plan for each thread that sends mixed batches, in :class:`RowPlans` of its cache: two threads with
different names do not push out each other's, other names take the place of the old ones, and a thread that ends takes
its plan along.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from randbasis.methods import Bound
from randbasis.ops import traced
from randbasis.tuner.adapted_part import AdapterOptions
from randbasis.tuner.snapshot import Together
from randbasis.tuner.targets import Part


@dataclass(frozen=True, slots=True)
class RowGroup:
    """The rows that one batched product serves.

    Attributes:
        bound: the method there.
        part: the output rows that it adapts.
        index: the rows of the batch; None where it is all of them.
        gathered: what the method prepared of the coefficients of each row, ``[rows, ...]``; 1 where all agree.
    """

    bound: Bound[Any]
    part: Part
    index: Tensor | None
    gathered: Mapping[str, Tensor]

    def add_to(self, result: Tensor, rows: Tensor) -> Tensor:
        """The result of the base layer plus ΔW x of these rows, dimension 0 being that of the rows."""
        own = rows if self.index is None else rows[self.index]
        h = self.bound.apply(own, self.gathered)
        if self.part.rows != result.shape[-1]:
            h = functional.pad(h, (self.part.start, result.shape[-1] - self.part.stop))
        h = h.to(result.dtype).view(own.shape[0], *result.shape[1:])
        return result + h if self.index is None else result.index_add(0, self.index, h)


@dataclass(frozen=True, slots=True)
class SeenRows:
    """The coefficients and stored streams of some adapters on a layer: where they lay, and what they held.

    Attributes:
        held: the children of each of them, and what these were. All are compared, those of other adapters too: two
            dictionaries are compared in less time than a few names are looked up.
        holders: the dictionaries in which the modules of these adapters have their ``weight``.
        weights: what they held.
    """

    held: Sequence[tuple[dict[str, nn.Module], dict[str, nn.Module]]]
    holders: Sequence[Mapping[str, Tensor | None]]
    weights: Together

    @classmethod
    def of(cls, containers: Iterable[nn.ModuleDict], adapters: Sequence[str]) -> "SeenRows | None":
        """What containers hold of these adapters; None where a later change could not be seen."""
        held: list[tuple[dict[str, nn.Module], dict[str, nn.Module]]] = []
        holders: list[Mapping[str, Tensor | None]] = []
        for container in containers:
            modules = cast("dict[str, nn.Module]", vars(container)["_modules"])
            held.append((modules, dict(modules)))
            for inside in (vars(modules[name]) for name in adapters if name in modules):
                kind = next((kind for kind in ("_parameters", "_buffers") if "weight" in inside[kind]), None)
                if kind is None:
                    return None  # a parametrization, say
                holders.append(inside[kind])
        weights = Together.of([cast("Tensor", holder["weight"]) for holder in holders])
        return None if weights is None else cls(held, holders, weights)

    def stands(self) -> bool:
        """Whether the same tensors lie there still, and hold the same."""
        for modules, before in self.held:
            if modules != before:
                return False
        weights, now = self.weights, [holder.get("weight") for holder in self.holders]
        return all(map(is_, now, weights.tensors)) and weights.stand()


@dataclass(frozen=True, slots=True)
class RowPlan:
    """What a layer adds to the rows of a mixed batch, for as long as nothing changes that it was made of.

    Attributes:
        asked: names, shape, dtypes and device, and whatever else it depends on that is compared as a whole.
        options: those of all adapters on the layer.
        dimension: that of the rows in the input.
        dtype: that the products are computed in.
        groups: of the rows.
        seen: what they were made of; None where a change could not be seen, so that the plan serves one pass.
    """

    asked: object
    options: Mapping[str, AdapterOptions]
    dimension: int
    dtype: torch.dtype
    groups: Sequence[RowGroup]
    seen: SeenRows | None = None

    @property
    def nbytes(self) -> int:
        """Of the gathered tensors."""
        return sum(one.numel() * one.element_size() for group in self.groups for one in group.gathered.values())

    def fits(self, asked: object, options: Mapping[str, AdapterOptions]) -> bool:
        """Whether planning anew would lead to the same."""
        return self.seen is not None and self.asked == asked and self.options == options and self.seen.stands()

    def add_to(self, result: Tensor, x: Tensor) -> Tensor:
        """The result of the base layer plus all groups, whose products take ``x`` in their dtype."""
        if self.dimension:
            result, x = result.transpose(0, self.dimension), x.transpose(0, self.dimension)
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        for group in self.groups:
            result = group.add_to(result, rows)
        return result.transpose(0, self.dimension) if self.dimension else result


def plannable() -> bool:
    """Whether a plan of this pass could serve another one: no graph is made, and nothing but torch looks on."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or traced())


class RowPlans(threading.local):
    """The plan that each thread keeps; copies and pickles have none."""

    plan: RowPlan | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "RowPlans":
        return RowPlans()

    def __reduce__(self) -> tuple[Any, ...]:
        return RowPlans, ()

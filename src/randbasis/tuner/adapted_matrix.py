"""One adapter on one part of a layer, and which of them serve which rows of a mixed batch."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from randbasis.contraction import OrderChoice
from randbasis.methods import Matrix, Method
from randbasis.ops import Stored
from randbasis.tuner.targets import Part

BASE = "__base__"
"""The name that stands for no adapter in a mixed batch."""


@dataclass
class AdaptedMatrix:
    """One adapter on one part of a layer.

    Attributes:
        part: which output rows.
        method: hyper-parameters.
        matrix: shape and streams.
        attributes: coefficient name → name of the layer's attribute that holds it.
        held: keeps the frozen matrices stored while this lives.
    """

    part: Part
    method: Method
    matrix: Matrix
    attributes: dict[str, str]
    held: tuple[Stored, ...]


@dataclass(frozen=True)
class AdapterOptions:
    """What an adapter asks of every layer beside its method."""

    dropout: float
    contraction: OrderChoice
    init_weights: bool
    quantize_coefficients: int | None = None


@dataclass(frozen=True)
class BatchGroup:
    """The rows of a batch that one product serves: adapters with the same method, basis and part.

    Attributes:
        matrix: what they have in common.
        names: the distinct adapters.
        rows: the rows of the batch that use one of them.
        slots: for each of these rows, the index of its adapter in ``names``.
    """

    matrix: AdaptedMatrix
    names: list[str]
    rows: list[int]
    slots: list[int]


def batch_groups(adapter_names: Sequence[str], matrices: Callable[[str], Sequence[AdaptedMatrix]]) -> list[BatchGroup]:
    """Group the rows of a batch by what one batched product can serve.

    Args:
        adapter_names: one name for each row; :data:`BASE` rows are in no group.
        matrices: the matrices of an adapter on this layer.
    """
    groups: dict[Hashable, tuple[AdaptedMatrix, list[str]]] = {}
    for name in dict.fromkeys(adapter_names):
        if name == BASE:
            continue
        for one in matrices(name):
            groups.setdefault((one.method, one.matrix, one.part), (one, []))[1].append(name)
    result: list[BatchGroup] = []
    for one, names in groups.values():
        rows = [row for row, name in enumerate(adapter_names) if name in names]
        result.append(BatchGroup(one, names, rows, [names.index(adapter_names[row]) for row in rows]))
    return result

"""TWO ADAPTERS → HOW FAR APART, layer by layer: norms, distance and angle of their ΔW."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from randbasis.adapters.saved import AdapterLocation, open_adapter
from randbasis.arithmetic.changes import Changes, OurChanges, read_changes
from randbasis.arithmetic.same_basis import check_same_basis
from randbasis.errors import BaseMismatchError, BasisMismatchError, MatrixMismatchError
from randbasis.low_rank import cores, norm
from randbasis.progress import Track


@dataclass(frozen=True)
class Apart:
    """Two vectors, by what decides their distance and angle.

    Attributes:
        first: norm of the first.
        second: norm of the second.
        distance: norm of their difference.
        product: inner product.
    """

    first: float
    second: float
    distance: float
    product: float

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> "Apart":
        """Of the entries of two tensors of one shape."""
        one, two, apart = (math.sqrt(float(each.square().sum())) for each in (first, second, first - second))
        return cls(one, two, apart, float((first * second).sum()))

    @classmethod
    def joined(cls, parts: Iterable["Apart"]) -> "Apart":
        """Of the vectors that the parts make one after the other."""
        parts = list(parts)
        return cls(
            math.hypot(*(part.first for part in parts)),
            math.hypot(*(part.second for part in parts)),
            math.hypot(*(part.distance for part in parts)),
            math.fsum(part.product for part in parts),
        )

    @property
    def relative(self) -> float | None:
        """The distance as a share of the norm of the first; None where that is 0."""
        return self.distance / self.first if self.first else None

    @property
    def cosine(self) -> float | None:
        """The cosine of the angle between them; None where one is 0."""
        size = self.first * self.second
        return max(-1.0, min(1.0, self.product / size)) if size else None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "norm_first": self.first,
            "norm_second": self.second,
            "distance": self.distance,
            "relative": self.relative,
            "cosine": self.cosine,
        }


@dataclass(frozen=True)
class LayerDifference:
    """One layer that both adapt.

    Attributes:
        name: path in the base model.
        out_features: rows.
        in_features: columns.
        change: of the two ΔW.
        coefficients: of the two vectors of coefficients, where they belong to one basis; else None, and None where
            an earlier layer has them too (``tie``).
    """

    name: str
    out_features: int
    in_features: int
    change: Apart
    coefficients: Apart | None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        own = None if self.coefficients is None else self.coefficients.as_json()
        shape = {"name": self.name, "out": self.out_features, "in": self.in_features}
        return {**shape, **self.change.as_json(), "coefficients": own}


@dataclass(frozen=True)
class Difference:
    """Two adapters side by side.

    Attributes:
        methods: what made them.
        layers: those that both adapt.
        only_first: norm of ΔW of each layer that the first alone adapts; the other's ΔW is 0 there.
        only_second: the same of the second.
        other_basis: why coefficients were not compared; None where they were.
    """

    methods: tuple[str, str]
    layers: tuple[LayerDifference, ...]
    only_first: dict[str, float]
    only_second: dict[str, float]
    other_basis: str | None

    @property
    def total(self) -> Apart:
        """Of all ΔW as one vector, layers of one alone included."""
        return Apart.joined(
            [
                *(one.change for one in self.layers),
                *(Apart(size, 0.0, size, 0.0) for size in self.only_first.values()),
                *(Apart(0.0, size, size, 0.0) for size in self.only_second.values()),
            ]
        )

    @property
    def coefficients(self) -> Apart | None:
        """Of all coefficients as one vector, where they belong to one basis."""
        parts = [one.coefficients for one in self.layers if one.coefficients is not None]
        return Apart.joined(parts) if parts else None

    def as_json(self) -> dict[str, Any]:
        """Plain values, one row a layer."""
        own = self.coefficients
        return {
            "methods": list(self.methods),
            "layers": len(self.layers),
            **self.total.as_json(),
            "coefficients": None if own is None else own.as_json(),
            "other_basis": self.other_basis,
            "only_first": self.only_first,
            "only_second": self.only_second,
            "rows": [one.as_json() for one in self.layers],
        }


def difference(
    first: AdapterLocation, second: AdapterLocation, *, model: str | None = None, track: Track = iter
) -> Difference:
    """How far apart the ΔW of two adapters are, whatever their methods and seeds.

    Where the ranks are low, no matrix of a layer's size is formed.

    Args:
        first: of this package, or a LoRA, VeRA or RandLoRA of PEFT; where it is: see
            :func:`randbasis.adapters.saved.open_adapter`.
        second: the same.
        model: folder or hub name of the base, of which only the configuration is read; needed where an adapter does not
            tell the shapes of its layers.
        track: shows the progress over the layers.

    Raises:
        BaseMismatchError: a layer has another shape in one than in the other.
        RandbasisError: there is no such adapter, or a file of it is damaged; each rule has its class.
    """
    saved = open_adapter(first), open_adapter(second)
    one, two = (read_changes(each, model) for each in saved)
    names = saved[0].where, saved[1].where
    shapes, others = one.shapes, two.shapes
    shared = [key for key in shapes if key in others]
    for key in shared:
        if shapes[key] != others[key]:
            raise BaseMismatchError(
                f"{names[0]} and {names[1]} must be for one base model to be compared, but {key!r} is {shapes[key]} "
                f"and {others[key]} (out, in); use adapters for one base"
            )
    reason = _other_basis(one, two, names)
    vectors = None if reason else (_vectors(one), _vectors(two))
    rows: list[LayerDifference] = []
    with torch.no_grad():
        alone = [
            {key: norm(c.change(key)) for key in c.shapes if key not in o} for c, o in ((one, others), (two, shapes))
        ]
        for key in track(shared):
            own = None if vectors is None or key not in vectors[0] else Apart.of(vectors[0][key], vectors[1][key])
            change = Apart.of(*cores(one.change(key), two.change(key)))
            rows.append(LayerDifference(key, *shapes[key], change, own))
    return Difference((one.method, two.method), tuple(rows), alone[0], alone[1], reason)


def _other_basis(one: Changes, two: Changes, names: tuple[str, str]) -> str | None:
    if not isinstance(one, OurChanges) or not isinstance(two, OurChanges):
        return "PEFT's own methods have no basis of this package"
    try:
        check_same_basis(one.packed, two.packed, names, base_name="")
    except (BasisMismatchError, MatrixMismatchError, BaseMismatchError) as error:
        return str(error)
    return None


def _vectors(changes: Changes) -> dict[str, Tensor]:
    """All coefficients of each layer as one vector; those that layers share are of the first of them alone."""
    assert isinstance(changes, OurChanges)
    found: dict[str, list[Tensor]] = {}
    owners = changes.packed.spec.owners
    for one, delta in (each for place, each in enumerate(changes.packed.matrices()) if owners[place] == place):
        found.setdefault(one.name, []).extend(values.flatten().double() for values in delta.coefficients.values())
    return {key: torch.cat(values) for key, values in found.items()}

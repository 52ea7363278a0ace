"""The spec of a packed file: everything about an adapter but its numbers, as one canonical JSON document.

Canonical means: keys sorted, no spaces, text as UTF-8, and a number that is whole written without a fraction. The same
adapter always gives the same text.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from randbasis.adapter_file.paths import Numbers, boxes, expand, range_text, split_path
from randbasis.errors import BaseMismatchError, TieError
from randbasis.methods import Method
from randbasis.precision import run_count
from randbasis.ties import UNTIED, owners

if TYPE_CHECKING:
    from torch import Tensor

    from randbasis.methods import Bound

STORED = "stored"
"""What the spec of an adapter that shares coefficients says where its streams are not those of the paths."""

Shapes = Mapping[str, tuple[int, int]]
"""Module path → ``(out, in)`` of a linear layer of the base model."""


@dataclass(frozen=True, slots=True)
class Base:
    """The base model that an adapter was made for.

    Attributes:
        name: hub name or plain folder name, where one is known.
        architecture: ``model_type`` of its configuration, where one is known.
        weights: digest of the weights that frozen matrices are made of, 16 hexadecimal digits; None where the method
            needs none.
    """

    name: str | None = None
    architecture: str | None = None
    weights: str | None = None


@dataclass(frozen=True, slots=True)
class SpecMatrix:
    """One adapted matrix: a layer of the base model, or a range of its output rows.

    Attributes:
        name: module path in the base model.
        part: name of the range of rows as the user wrote it; empty for the whole layer.
        start: first row of the range.
        rows: rows of ΔW.
        out_features: rows of the whole layer.
        in_features: columns of ΔW.
        method: hyper-parameters here.
    """

    name: str
    part: str
    start: int
    rows: int
    out_features: int
    in_features: int
    method: Method

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Coefficient name → shape, in the method's order."""
        return self.method.coefficient_shapes(self.rows, self.in_features)

    @property
    def count(self) -> int:
        """Its coefficients: math (9), (13), (16) or (18)."""
        return self.method.count(self.rows, self.in_features)

    def coefficients(self, values: "Tensor", start: int) -> dict[str, "Tensor"]:
        """Coefficient name → tensor, views of all coefficients of an adapter.

        Args:
            values: ``[..., n]``.
            start: place of the first one of this matrix.
        """
        found: dict[str, Tensor] = {}
        for name, shape in self.shapes.items():
            size = math.prod(shape)
            found[name] = values[..., start : start + size].unflatten(-1, shape)
            start += size
        return found

    def bind(self, streams: tuple[int, ...] | None = None) -> "Bound[Any]":
        """Its method there. No basis is kept: an adapter at rest may have thousands of them.

        Args:
            streams: as stored; None takes those that all layers share.
        """
        from randbasis.methods.bound import Site  # torch, which specs do without

        site = Site(self.rows, self.in_features, self.method.streams() if streams is None else streams)
        return replace(self.method, basis_storage="recompute").bind(site)


@dataclass(frozen=True, slots=True)
class MatrixGroup:
    """Adapted matrices that differ in layer numbers alone.

    Attributes:
        like: any of them, its name being the pattern.
        layers: the numbers of each ``*`` of the pattern.
    """

    like: SpecMatrix
    layers: tuple[Numbers, ...]

    @property
    def size(self) -> int:
        """How many matrices there are."""
        return math.prod(sum(len(part) for part in numbers) for numbers in self.layers)

    @property
    def names(self) -> Iterable[str]:
        """Their module paths, in order."""
        return expand(self.like.name, self.layers)

    def __iter__(self) -> Iterator[SpecMatrix]:
        one = self.like
        for name in self.names:
            yield SpecMatrix(name, one.part, one.start, one.rows, one.out_features, one.in_features, one.method)

    def document(self, common: Method) -> dict[str, Any]:
        """Plain values; what the method has in common with the others is left out."""
        one = self.like
        options = changed_options(one.method, common)
        return {
            "name": one.name,
            "out": one.out_features,
            "in": one.in_features,
            **({"layers": [range_text(numbers) for numbers in self.layers]} if self.layers else {}),
            **({"part": one.part, "rows": [one.start, one.start + one.rows]} if one.part else {}),
            **({"options": options} if options else {}),
        }


def group_matrices(matrices: Iterable[SpecMatrix]) -> tuple[MatrixGroup, ...]:
    """Compress a list of matrices; the order of the result, and with it of all coefficients, is that of the patterns.

    Args:
        matrices: in any order.
    """
    alike: dict[SpecMatrix, set[tuple[int, ...]]] = {}
    for one in matrices:
        pattern, numbers = split_path(one.name)
        key = SpecMatrix(pattern, one.part, one.start, one.rows, one.out_features, one.in_features, one.method)
        alike.setdefault(key, set()).add(numbers)
    return ordered(MatrixGroup(like, layers) for like, numbers in alike.items() for layers in boxes(numbers))


def ordered(groups: Iterable[MatrixGroup]) -> tuple[MatrixGroup, ...]:
    """In the order that a file has them."""
    return tuple(sorted(groups, key=_place))


def options_of(method: Method) -> dict[str, Any]:
    """The hyper-parameters of a method that decide values: all but how its basis is kept."""
    return {f.name: getattr(method, f.name) for f in fields(method) if f.name not in ("seed", "law", "basis_storage")}


def changed_options(method: Method, common: Method) -> dict[str, Any]:
    """Those that are not the common ones."""
    return {key: value for key, value in options_of(method).items() if value != getattr(common, key)}


def fingerprint(architecture: str | None, shapes: Shapes) -> str:
    """SHA-256 of what an adapter needs of its base model: architecture, and path and shape of each adapted layer.

    Args:
        architecture: ``model_type``, where it is known.
        shapes: of the adapted layers.
    """
    alike: dict[tuple[str, int, int], set[tuple[int, ...]]] = {}
    for name, (rows, cols) in shapes.items():
        pattern, numbers = split_path(name)
        alike.setdefault((pattern, rows, cols), set()).add(numbers)
    rows = [
        [pattern, [range_text(numbers) for numbers in layers], out, in_]
        for (pattern, out, in_), numbers in alike.items()
        for layers in boxes(numbers)
    ]
    return sha256(canonical({"architecture": architecture, "matrices": sorted(rows)}))


@dataclass(frozen=True)
class Spec:
    """Everything about an adapter but its numbers.

    Attributes:
        method: hyper-parameters, seed and law; a matrix may differ in single ones.
        base: the model it was made for.
        groups: the adapted matrices, in the order of their coefficients.
        bits: of a stored coefficient.
        group: coefficients that share a scale; 0 for one scale a vector.
        extra: names of the tensors that training saved beside the adapter, sorted.
        peft: options of the PEFT configuration that are not the usual ones; not read here.
        task: what the adapter was trained for, as training describes it: labels, columns, lengths; empty where that is
            not known. Not read here.
        tie: which matrices share one vector of coefficients, math (26); see :mod:`randbasis.ties`.
        path_streams: whether the streams of an adapter that shares coefficients are those that the paths of its
            matrices give, so that the file holds none.
    """

    method: Method
    base: Base
    groups: tuple[MatrixGroup, ...]
    bits: int
    group: int = 0
    extra: tuple[str, ...] = ()
    peft: Mapping[str, Any] = field(default_factory=dict[str, Any])
    task: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tie: str = UNTIED
    path_streams: bool = False

    @cached_property
    def size(self) -> int:
        """Number of adapted matrices."""
        return sum(group.size for group in self.groups)

    @cached_property
    def count(self) -> int:
        """Number of coefficients; takes no memory however many the spec claims, where none are shared."""
        if self.tie != UNTIED:
            return sum(self.vector_lengths)
        return sum(group.size * group.like.count for group in self.groups)

    @cached_property
    def run_count(self) -> int:
        """Number of scales, were the coefficients quantized."""
        if self.tie != UNTIED:
            return sum(run_count(length, self.group) for length in self.vector_lengths)
        return sum(
            group.size * sum(run_count(math.prod(shape), self.group) for shape in group.like.shapes.values())
            for group in self.groups
        )

    @cached_property
    def streams_shape(self) -> tuple[int, int] | None:
        """Matrices and roles, of the streams; None where all layers share a basis."""
        return None if self.method.shares_basis else (self.size, len(self.method.roles))

    @cached_property
    def streams_of_paths(self) -> list[tuple[int, ...]]:
        """The streams that the paths of the matrices give, math (4)."""
        return [self.method.streams(f"{one.name}[{one.part}]" if one.part else one.name) for one in self.matrices]

    @cached_property
    def vector_lengths(self) -> list[int]:
        """Entries of each coefficient tensor, in the order of the file; those that matrices share stand once."""
        if self.tie != UNTIED:
            own = [one for place, one in enumerate(self.matrices) if self.owners[place] == place]
            return [math.prod(shape) for one in own for shape in one.shapes.values()]
        return [
            math.prod(shape) for group in self.groups for _ in range(group.size) for shape in group.like.shapes.values()
        ]

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """For each matrix the place of the first one that has its coefficients: its own where nothing is shared.

        Raises:
            TieError: the method has no streams for each matrix, or coefficients of one group have several shapes.
        """
        if self.tie == UNTIED:
            return tuple(range(self.size))
        check_tied(self.method)
        found = owners([one.name for one in self.matrices], self.tie)
        for one, place in zip(self.matrices, found, strict=True):
            check_alike(self.matrices[place], one, self.tie)
        return tuple(found)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """For each matrix the place of its first coefficient among all."""
        found: list[int] = []
        stop = 0
        for place, (one, owner) in enumerate(zip(self.matrices, self.owners, strict=True)):
            found.append(stop if owner == place else found[owner])
            stop += one.count if owner == place else 0
        return tuple(found)

    @cached_property
    def matrices(self) -> tuple[SpecMatrix, ...]:
        """The adapted matrices, in the order of their coefficients."""
        return tuple(one for group in self.groups for one in group)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module path → shape of the layer, for each adapted layer."""
        return {one.name: (one.out_features, one.in_features) for one in self.matrices}

    @cached_property
    def fingerprint(self) -> str:
        """See :func:`fingerprint`."""
        return fingerprint(self.base.architecture, self.shapes)

    @cached_property
    def clash(self) -> tuple[SpecMatrix, SpecMatrix] | None:
        """The first two matrices that claim the same rows of a layer, or disagree on its shape."""
        taken: dict[str, list[SpecMatrix]] = {}
        for one in self.matrices:
            taken.setdefault(one.name, []).append(one)
        for matrices in taken.values():
            matrices.sort(key=_start)
            for first, second in pairwise(matrices):
                same = (first.out_features, first.in_features) == (second.out_features, second.in_features)
                if not same or second.start < first.start + first.rows:
                    return first, second
        return None

    def document(self, digest: str, digest_rest: str | None) -> dict[str, Any]:
        """The spec as plain values, of version 1 of the format.

        Args:
            digest: SHA-256 of the bytes of the coefficients.
            digest_rest: SHA-256 of the bytes of all other tensors, where there are any.
        """
        found = self.values([group.document(self.method) for group in self.groups])
        found["base"]["fingerprint"] = self.fingerprint
        return found | {"digest": digest, **({"digest_rest": digest_rest} if digest_rest is not None else {})}

    def values(self, matrices: list[dict[str, Any]]) -> dict[str, Any]:
        """What the spec says but for digests.

        Args:
            matrices: as plain values.
        """
        base = {"architecture": self.base.architecture, "name": self.base.name, "weights": self.base.weights}
        return {
            "method": self.method.name,
            "options": options_of(self.method),
            "seed": self.method.seed,
            "law": self.method.law,
            "base": {key: value for key, value in base.items() if value is not None},
            "matrices": matrices,
            "bits": self.bits,
            **({"group": self.group} if self.group else {}),
            **({"extra": list(self.extra)} if self.extra else {}),
            **({"peft": dict(self.peft)} if self.peft else {}),
            **({"task": dict(self.task)} if self.task else {}),
            **({"tie": self.tie} if self.tie != UNTIED else {}),
            **({"streams": STORED} if self.tie != UNTIED and not self.path_streams else {}),
        }

    def check_base(self, shapes: Shapes, architecture: str | None, where: str) -> None:
        """Raise unless a model is the one that the adapter was made for, as far as its fingerprint tells.

        Args:
            shapes: all linear layers of the model; a path may have a wrapper's names before it.
            architecture: its ``model_type``, where it is known.
            where: the file, for the message.

        Raises:
            BaseMismatchError: naming the architectures, or the first matrices that differ.
        """
        made_for = f"load it on {self.base.name or 'the base model it was made for'}"
        if self.base.architecture and architecture and self.base.architecture != architecture:
            raise BaseMismatchError(
                f"{where}: this adapter was made for a base model of type {self.base.architecture!r}, "
                f"this one is a {architecture!r}; {made_for}"
            )
        differing = [
            f"{name} is {out}×{in_} there and {'not' if found is None else f'{found[0]}×{found[1]}'} here"
            for name, (out, in_) in self.shapes.items()
            if (found := _shape_in(shapes, name)) != (out, in_)
        ]
        if differing:
            more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise BaseMismatchError(
                f"{where}: this adapter was made for another base model; {len(differing)} of {len(self.shapes)} layers "
                f"differ (out×in): {'; '.join(differing[:3])}{more}; {made_for}"
            )


def check_tied(method: Method) -> None:
    """Raise unless matrices of a method may share coefficients: each needs streams of its own, which are stored.

    Raises:
        TieError: they may not.
    """
    if method.shares_basis:
        raise TieError(
            f"tie needs a method with a basis of its own for each matrix, whose streams are stored (nola, pranc), got "
            f"{method.name!r}: with one basis, or frozen matrices that no stream names, one vector means the same "
            f"change or none in every layer; leave tie at {UNTIED!r}, or use one of these methods"
        )


def check_alike(first: SpecMatrix, one: SpecMatrix, tie: str) -> None:
    """Raise unless one vector can serve two matrices.

    Raises:
        TieError: their coefficients have other shapes.
    """
    if first.method is not one.method and first.shapes != one.shapes:
        raise TieError(
            f"tie={tie!r} needs one shape of coefficients for all matrices that share them, but {first.name!r} has "
            f"{first.shapes} and {one.name!r} {one.shapes}; give them the same num_basis, or use another tie"
        )


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces; whole numbers without a fraction.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    text = json.dumps(_whole(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def sha256(*content: bytes | bytearray) -> str:
    """The digest in hexadecimal."""
    digest = hashlib.sha256()
    for piece in content:
        digest.update(piece)
    return digest.hexdigest()


def _whole(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _whole(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_whole(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _start(one: SpecMatrix) -> int:
    return one.start


def _place(group: MatrixGroup) -> tuple[str, int, str, tuple[tuple[int, ...], ...], str]:
    """Pattern, rows and layers; the method last, for patterns that mix several."""
    one = group.like
    firsts = tuple(tuple(number for part in numbers for number in part) for numbers in group.layers)
    return one.name, one.start, one.part, firsts, repr((one.out_features, one.in_features, one.method))


def _shape_in(shapes: Shapes, name: str) -> tuple[int, int] | None:
    """The shape of a layer by its whole path or, under a wrapper, by the one path that ends alike."""
    if name in shapes:
        return shapes[name]
    alike = [shape for known, shape in shapes.items() if known.endswith(f".{name}") or name.endswith(f".{known}")]
    return alike[0] if len(alike) == 1 else None


__all__ = ["Base", "MatrixGroup", "Spec", "SpecMatrix", "canonical", "fingerprint", "group_matrices"]

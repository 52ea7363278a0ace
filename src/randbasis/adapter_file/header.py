"""The header of a safetensors file that nothing is known of, read without making a tensor."""

import json
import math
from dataclasses import dataclass
from typing import Any, cast

from randbasis.errors import HeaderError

NESTING_LIMIT = 32
"""Deepest nesting of JSON that is read."""

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U32": 4, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Dtype in the header → bytes of one number: what an adapter may hold."""

_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class Entry:
    """What a header says of one tensor.

    Attributes:
        name: of the tensor.
        dtype: one of :data:`BYTES`.
        shape: of the tensor.
        start: first of its bytes, counted from the end of the header.
        stop: the byte after its last.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def bad_header(where: str, rule: str, found: object) -> HeaderError:
    """The error of a header that breaks a rule."""
    shown = repr(found)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}…"
    return HeaderError(
        f"{where}: the header of a safetensors file must be {rule}, got {shown}; take the file from its source again"
    )


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object in which no key stands twice, no number is NaN or infinite, and all text is Unicode.

    Raises:
        ValueError: the text is anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice")
        return found

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        value: object = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
        _check_plain(value, NESTING_LIMIT)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}, not an object")
    return cast("dict[str, Any]", value)


def _check_plain(value: object, depth: int) -> None:
    """Raise ValueError unless a parsed value can be written as JSON again."""
    if depth < 0:
        raise ValueError("it is nested too deeply")
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is too large")
    elif isinstance(value, list):
        for item in cast("list[object]", value):
            _check_plain(item, depth - 1)
    elif isinstance(value, dict):
        for key, item in cast("dict[str, object]", value).items():
            key.encode()
            _check_plain(item, depth - 1)


def parse_header(text: bytes, where: str) -> tuple[dict[str, str], list[Entry]]:
    """The metadata, and the tensors in the order of their data, which have neither holes nor overlaps.

    Raises:
        HeaderError: the header is not one of a safetensors file.
    """
    try:
        header = parse_object(text.decode())
    except ValueError as error:
        raise bad_header(where, f"a JSON object in UTF-8 ({error})", text[:60]) from error
    metadata: Any = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in cast("dict[str, Any]", metadata).values()):
        raise bad_header(where, "strings by name in __metadata__", cast("object", metadata))
    entries = sorted((_parse_entry(name, entry, where) for name, entry in header.items()), key=_place)
    position = 0
    for entry in entries:
        if entry.start != position:
            raise bad_header(where, f"without holes and overlaps (tensor {entry.name!r} at {position})", entry.start)
        position = entry.stop
    return cast("dict[str, str]", metadata), entries


def _place(entry: Entry) -> tuple[int, int]:
    return entry.start, entry.stop


def _parse_entry(name: str, entry: Any, where: str) -> Entry:
    if not isinstance(entry, dict) or cast("dict[str, Any]", entry).keys() != _ENTRY_KEYS:
        raise bad_header(where, f"dtype, shape and data_offsets of tensor {name!r}", cast("object", entry))
    values = cast("dict[str, Any]", entry)
    label, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
    if not isinstance(label, str) or label not in BYTES:
        raise bad_header(where, f"a dtype of {', '.join(BYTES)} for tensor {name!r}", label)
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise bad_header(where, f"lists of whole numbers for tensor {name!r}", values)
    if math.prod(max(side, 1) for side in shape) >= 1 << 60:
        raise bad_header(where, f"a shape that can be meant for tensor {name!r}", shape)
    if offsets[1] - offsets[0] != BYTES[label] * math.prod(shape):
        raise bad_header(where, f"offsets that fit dtype and shape of tensor {name!r}", values)
    return Entry(name, label, tuple(shape), offsets[0], offsets[1])


def _whole_numbers(value: object) -> bool:
    items = cast("list[object]", value) if isinstance(value, list) else [None]
    return len(items) <= 64 and all(type(item) is int and 0 <= item < 1 << 63 for item in items)

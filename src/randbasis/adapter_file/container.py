"""Named tensors and a few strings as the bytes of a safetensors file, and back.

The bytes are canonical: the header is JSON without spaces, ``__metadata__`` first, tensors in the order of their data
(wide dtypes first, so that all are aligned, then by name), spaces up to a multiple of eight. What is read may come from
anywhere: nothing is trusted, and no memory is taken that the file does not back.
"""

import json
import math
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from randbasis.errors import (
    HeaderError,
    HeaderSizeError,
    PackedFileMissingError,
    PrecisionError,
    TruncatedFileError,
)
from randbasis.files.locations import Location, reading

HEADER_LIMIT = 16 << 20
"""Longest header in bytes that is read or written."""
NESTING_LIMIT = 32
"""Deepest nesting of JSON that is read."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U32": torch.uint32,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Name in the header → dtype: what an adapter may hold."""

_LABELS = {dtype: label for label, dtype in DTYPES.items()}
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class Container:
    """What a safetensors file holds.

    Attributes:
        metadata: the strings of ``__metadata__``.
        tensors: name → tensor.
    """

    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def label_of(dtype: torch.dtype, what: str) -> str:
    """The name of a dtype in a header.

    Raises:
        PrecisionError: a file cannot hold it.
    """
    if dtype not in _LABELS:
        raise PrecisionError(
            f"the dtype of {what} must be one of {', '.join(DTYPES)}, got {dtype}; convert the tensor before packing"
        )
    return _LABELS[dtype]


def tensor_bytes(tensor: Tensor) -> bytes:
    """The content of a tensor, little-endian, in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def data_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names in the order in which the data of canonical files stand."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def to_bytes(container: Container) -> bytes:
    """The canonical bytes of a file.

    Raises:
        PrecisionError: a tensor has a dtype that a file cannot hold.
        HeaderSizeError: the header would be longer than a reader accepts.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(container.metadata.items()))}
    pieces: list[bytes] = []
    position = 0
    for name in data_order(container.tensors):
        tensor = container.tensors[name]
        pieces.append(tensor_bytes(tensor))
        end = position + len(pieces[-1])
        label = label_of(tensor.dtype, f"tensor {name!r}")
        header[name] = {"dtype": label, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise HeaderSizeError(
            f"the header of a packed file must be at most {HEADER_LIMIT} bytes, this adapter's would have {len(text)}; "
            "adapt fewer matrices in one adapter, or keep the directory"
        )
    return b"".join([len(text).to_bytes(8, "little"), text, *pieces])


def load(stream: BinaryIO, size: int, where: str) -> Container:
    """Read a file that nothing is known of.

    Args:
        stream: at its start.
        size: bytes that the stream has.
        where: the file, for messages.

    Raises:
        TruncatedFileError: the file ends too early or too late.
        HeaderSizeError: the header is longer than :data:`HEADER_LIMIT` or than the file.
        HeaderError: the header is not one of a safetensors file.
    """
    if size < 8:
        raise _truncated(where, f"a file begins with 8 bytes of length, this one has {size} bytes")
    length = int.from_bytes(stream.read(8), "little")
    if length > HEADER_LIMIT or length > size - 8:
        raise HeaderSizeError(
            f"{where}: a header must be at most {HEADER_LIMIT} bytes and fit the file of {size} bytes, this one says "
            f"{length}; it is damaged or no safetensors file: take it from its source again"
        )
    metadata, entries = _parse_header(stream.read(length), where)
    expected = 8 + length + (entries[-1].stop if entries else 0)
    if size != expected:
        raise _truncated(where, f"its header speaks of {expected} bytes, it has {size}")
    data = bytearray(stream.read(expected - 8 - length))
    if len(data) != expected - 8 - length:
        raise _truncated(where, f"its size is {size} bytes, it ended after {8 + length + len(data)}")
    return Container(metadata, {entry.name: _tensor(entry, data, where) for entry in entries})


@contextmanager
def opened(path: Location) -> Generator[tuple[BinaryIO, int]]:
    """Open a packed file, and tell its size in bytes.

    Raises:
        PackedFileMissingError: it is not there, or is a directory.
        RemoteError: it is behind a URL that could not be reached.
    """
    with ExitStack() as stack:
        try:
            found = stack.enter_context(reading(path))
        except IsADirectoryError as error:
            raise _no_file(path, "a directory; `randbasis pack` makes a file of an adapter directory") from error
        except FileNotFoundError as error:
            raise _no_file(path, "not there") from error
        yield found


def read(path: Location) -> tuple[Container, int]:
    """Read a file, and tell its size in bytes.

    Raises:
        PackedFileMissingError: it is not there, or is a directory.
        PackedFileError: see :func:`load`.
        RemoteError: it is behind a URL that could not be reached.
    """
    with opened(path) as (stream, size):
        return load(stream, size, str(path)), size


def _no_file(path: Location, found: str) -> PackedFileMissingError:
    return PackedFileMissingError(f"a packed adapter must be a file, {str(path)!r} is {found}")


def _truncated(where: str, what: str) -> TruncatedFileError:
    return TruncatedFileError(f"{where}: the file must be whole, but {what}; copy it again from its source")


def _bad_header(where: str, rule: str, found: object) -> HeaderError:
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


def _parse_header(text: bytes, where: str) -> tuple[dict[str, str], list[_Entry]]:
    try:
        header = parse_object(text.decode())
    except ValueError as error:
        raise _bad_header(where, f"a JSON object in UTF-8 ({error})", text[:60]) from error
    metadata: Any = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in cast("dict[str, Any]", metadata).values()):
        raise _bad_header(where, "strings by name in __metadata__", cast("object", metadata))
    entries = sorted((_parse_entry(name, entry, where) for name, entry in header.items()), key=_place)
    position = 0
    for entry in entries:
        if entry.start != position:
            raise _bad_header(where, f"without holes and overlaps (tensor {entry.name!r} at {position})", entry.start)
        position = entry.stop
    return cast("dict[str, str]", metadata), entries


def _place(entry: _Entry) -> tuple[int, int]:
    return entry.start, entry.stop


def _parse_entry(name: str, entry: Any, where: str) -> _Entry:
    if not isinstance(entry, dict) or cast("dict[str, Any]", entry).keys() != _ENTRY_KEYS:
        raise _bad_header(where, f"dtype, shape and data_offsets of tensor {name!r}", cast("object", entry))
    values = cast("dict[str, Any]", entry)
    label, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
    if not isinstance(label, str) or label not in DTYPES:
        raise _bad_header(where, f"a dtype of {', '.join(DTYPES)} for tensor {name!r}", label)
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise _bad_header(where, f"lists of whole numbers for tensor {name!r}", values)
    bytes_each = torch.empty((), dtype=DTYPES[label]).element_size()
    if math.prod(max(side, 1) for side in shape) >= 1 << 60:
        raise _bad_header(where, f"a shape that can be meant for tensor {name!r}", shape)
    if offsets[1] - offsets[0] != bytes_each * math.prod(shape):
        raise _bad_header(where, f"offsets that fit dtype and shape of tensor {name!r}", values)
    return _Entry(name, DTYPES[label], tuple(shape), offsets[0], offsets[1])


def _whole_numbers(value: object) -> bool:
    items = cast("list[object]", value) if isinstance(value, list) else [None]
    return len(items) <= 64 and all(type(item) is int and 0 <= item < 1 << 63 for item in items)


def _tensor(entry: _Entry, data: bytearray, where: str) -> Tensor:
    if entry.start == entry.stop:
        return torch.empty(entry.shape, dtype=entry.dtype)
    content = data[entry.start : entry.stop]
    if entry.dtype is torch.bool and max(content) > 1:
        raise _bad_header(where, f"followed by bytes 0 and 1 in the BOOL tensor {entry.name!r}", max(content))
    return torch.frombuffer(content, dtype=entry.dtype).reshape(entry.shape)

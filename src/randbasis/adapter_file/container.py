"""Named tensors and a few strings as the bytes of a safetensors file, and back.

The bytes are canonical: the header is JSON without spaces, ``__metadata__`` first, tensors in the order of their data
(wide dtypes first, so that all are aligned, then by name), spaces up to a multiple of eight. What is read may come from
anywhere: nothing is trusted, and no memory is taken that the file does not back.
"""

import json
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from randbasis.adapter_file.header import Entry, bad_header, parse_header
from randbasis.errors import (
    HeaderSizeError,
    PackedFileMissingError,
    PrecisionError,
    TruncatedFileError,
)
from randbasis.files.locations import Location, reading

HEADER_LIMIT = 16 << 20
"""Longest header in bytes that is read or written."""

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


@dataclass(frozen=True)
class Container:
    """What a safetensors file holds.

    Attributes:
        metadata: the strings of ``__metadata__``.
        tensors: name → tensor.
    """

    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor]


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
    metadata, entries = parse_header(stream.read(length), where)
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


def _tensor(entry: Entry, data: bytearray, where: str) -> Tensor:
    dtype = DTYPES[entry.dtype]
    if entry.start == entry.stop:
        return torch.empty(entry.shape, dtype=dtype)
    content = data[entry.start : entry.stop]
    if dtype is torch.bool and max(content) > 1:
        raise bad_header(where, f"followed by bytes 0 and 1 in the BOOL tensor {entry.name!r}", max(content))
    return torch.frombuffer(content, dtype=dtype).reshape(entry.shape)

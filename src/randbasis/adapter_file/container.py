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
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from randbasis.adapter_file.header import BYTES, Entry, bad_header, parse_header
from randbasis.errors import (
    HeaderSizeError,
    PackedFileMissingError,
    TruncatedFileError,
)
from randbasis.files.locations import Location, reading

if TYPE_CHECKING:
    from numpy.typing import NDArray

HEADER_LIMIT = 16 << 20
"""Longest header in bytes that is read or written."""

# Numbers in a file are little-endian; bfloat16, which numpy has not, is its bits.
_NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "U32": "<u4",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as its bytes.

    Attributes:
        dtype: as a header names it, one of :data:`~randbasis.adapter_file.header.BYTES`.
        shape: of the tensor.
        data: the numbers, little-endian, in row-major order.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return math.prod(self.shape)

    def array(self) -> "NDArray[Any]":
        """The numbers in a row; bfloat16 as its bits."""
        return np.frombuffer(self.data, _NUMPY[self.dtype])


@dataclass(frozen=True)
class Container:
    """What a safetensors file holds.

    Attributes:
        metadata: the strings of ``__metadata__``.
        tensors: name → tensor.
    """

    metadata: Mapping[str, str]
    tensors: Mapping[str, RawTensor]


def data_order(tensors: Mapping[str, RawTensor]) -> list[str]:
    """The names in the order in which the data of canonical files stand."""
    return sorted(tensors, key=lambda name: (-BYTES[tensors[name].dtype], name))


def to_bytes(container: Container) -> bytes:
    """The canonical bytes of a file.

    Raises:
        HeaderSizeError: the header would be longer than a reader accepts.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(container.metadata.items()))}
    pieces: list[bytes | bytearray] = []
    position = 0
    for name in data_order(container.tensors):
        tensor = container.tensors[name]
        pieces.append(tensor.data)
        end = position + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
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


def _tensor(entry: Entry, data: bytearray, where: str) -> RawTensor:
    content = data[entry.start : entry.stop]
    if entry.dtype == "BOOL" and max(content, default=0) > 1:
        raise bad_header(where, f"followed by bytes 0 and 1 in the BOOL tensor {entry.name!r}", max(content))
    return RawTensor(entry.dtype, entry.shape, content)

"""Text that people wrote: UTF-8, or what a mark at its beginning says; anything else is told with the way out."""

import codecs
import gzip
import io
from contextlib import closing
from pathlib import Path
from typing import IO, cast

from randbasis.errors import DataFormatError

GUESS = "windows-1252"
"""What most files that are no UTF-8 were written in; Latin-1 but for a few signs."""
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_AROUND = 12
"""Letters on each side of the one that cannot be read, in a message."""


def open_text(path: Path) -> io.TextIOWrapper:
    """A file, also gzipped, as text with its line ends as they are: UTF-8, or UTF-16 where a mark says so."""
    with closing(_bytes_of(path)) as raw:
        wide = raw.read(2) in _WIDE
    return io.TextIOWrapper(_bytes_of(path), encoding="utf-16" if wide else "utf-8-sig", newline="")


def read_text(path: Path) -> str:
    """All of a file.

    Raises:
        DataFormatError: it is no text in UTF-8.
    """
    try:
        with open_text(path) as stream:
            return stream.read().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise not_text(path, error) from error


def not_text(path: Path, error: UnicodeDecodeError) -> DataFormatError:
    """What to say of a file that cannot be decoded: where, how it would read, and how to save it."""
    with closing(_bytes_of(path)) as raw:
        for number, line in enumerate(raw, 1):
            try:
                line.decode("utf-8-sig")
            except UnicodeDecodeError as found:
                return DataFormatError(_told(path, number, line, found))
    return DataFormatError(f"{path.name} is not text in UTF-8 ({error}); save it as UTF-8")


def _told(path: Path, number: int, line: bytes, error: UnicodeDecodeError) -> str:
    where = f"line {number} of {path.name} is not text in UTF-8: byte 0x{line[error.start]:02x}"
    around = line[max(error.start - _AROUND, 0) : error.start + 1 + _AROUND].decode(GUESS, errors="replace")
    if b"\0" in line or not around.strip().isprintable():
        return f"{where}; is it a text at all? Save it as text in UTF-8"
    plain = Path(path.stem) if path.suffix == ".gz" else Path(path.name)
    read = f"gunzip -c {path.name} | iconv -f {GUESS}" if path.suffix == ".gz" else f"iconv -f {GUESS}"
    source = "" if path.suffix == ".gz" else f" {path.name}"
    return (
        f"{where}, which in {GUESS} (of which Latin-1 is a part) reads {around.strip()!r}; save it as UTF-8, for "
        f"example: {read} -t utf-8{source} > {plain.stem}-utf8{plain.suffix}"
    )


def _bytes_of(path: Path) -> IO[bytes]:
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    return cast("IO[bytes]", gzip.open(path, "rb")) if packed else path.open("rb")

"""One file, whole or absent: a kill at any point leaves the old one or the new one."""

import os
import secrets
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from randbasis.files.locations import Location, Remote
from randbasis.files.output_checks import check_output_file
from randbasis.files.saving import KEPT, saving


def write(path: Location, data: bytes, *, overwrite: bool = False) -> None:
    """Write a file of bytes; see :func:`whole_file`.

    Raises:
        OutputExistsError: the file exists and ``overwrite`` is not given.
        SaveError: the file could not be written, for example because the disk is full.
        RemoteError: it is behind a URL that could not be written.
    """
    local = check_output_file(path, overwrite=overwrite)
    if local is None:
        Remote(str(path)).write(data)
        return
    with _whole_local(local) as temporary, temporary.open("xb") as file:
        file.write(data)


@contextmanager
def whole_file(location: Location, *, overwrite: bool = False, kept: str = KEPT) -> Generator[Path]:
    """A path to write to, whose file takes its place only when the block has succeeded.

    The bytes go to a temporary file in the same directory, reach the disk, and only then take the name. What a URL
    names is made on this machine and sent as a whole; an object store takes it as a whole or not at all.

    Args:
        location: of the file.
        overwrite: replace the file.
        kept: what is there where it fails, for the message.

    Raises:
        OutputExistsError: the file exists and ``overwrite`` is not given.
        SaveError: the operating system refused, or there is no such folder; what was there before is untouched.
        RemoteError: it is behind a URL that could not be written.
    """
    path = check_output_file(location, overwrite=overwrite)
    if path is not None:
        with _whole_local(path, kept=kept) as temporary:
            yield temporary
        return
    with TemporaryDirectory() as folder:
        temporary = Path(folder) / "file"
        with saving(location, kept=kept):
            yield temporary
        Remote(str(location)).upload("", temporary)


def write_many(files: Mapping[Path, bytes], *, kept: str = KEPT) -> None:
    """Write files of this machine with their folders, each whole or absent, in place of what is there.

    None is waited for until it is on the disk: before anything vouches for them, :func:`flush_everything` has to be
    called, once for all.

    Args:
        files: path → bytes.
        kept: what is there where it fails, for the message.

    Raises:
        SaveError: the operating system refused.
    """
    for path, data in files.items():
        with saving(path, kept=kept):
            path.parent.mkdir(parents=True, exist_ok=True)
        with _whole_local(path, kept=kept, flushed=False) as temporary:
            temporary.write_bytes(data)


@contextmanager
def _whole_local(path: Path, *, kept: str = KEPT, flushed: bool = True) -> Generator[Path]:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    with saving(path, kept=kept):
        try:
            yield temporary
            if flushed:
                _flush(temporary)
            temporary.replace(path)
            if flushed:
                flush_directory(path.parent)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()


def flush_directory(path: Path) -> None:
    """Make the names in a directory reach the disk; where the system has no such call, it does so by itself."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def flush_everything() -> None:
    """Make all that was written reach the disk: one call for many files, where the system has it."""
    if hasattr(os, "sync"):
        os.sync()


def _flush(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())

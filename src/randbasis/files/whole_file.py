"""One file, whole or absent: a kill at any point leaves the old one or the new one."""

import os
import secrets
from contextlib import suppress
from pathlib import Path

from randbasis.errors import OutputExistsError, SaveError
from randbasis.files.locations import Location, Remote, local_path


def write(path: Location, data: bytes, *, overwrite: bool = False) -> None:
    """Write a file so that a kill at any point leaves the old one or the new one.

    The bytes go to a temporary file in the same directory, reach the disk, and only then take the name. What a URL
    names is sent as a whole; an object store takes it as a whole or not at all.

    Raises:
        OutputExistsError: the file exists and ``overwrite`` is not given.
        SaveError: the file could not be written, for example because the disk is full.
        RemoteError: it is behind a URL that could not be written.
    """
    refuse_existing(path, overwrite=overwrite)
    local = local_path(path)
    if local is None:
        Remote(str(path)).write(data)
    else:
        _write_local(local, data)


def refuse_existing(path: Location, *, overwrite: bool) -> None:
    """Raise unless a file may be written.

    Raises:
        OutputExistsError: the file exists and ``overwrite`` is not given, or it is a directory.
        RemoteError: it is behind a URL that could not be reached.
    """
    local = local_path(path)
    if local is None:
        kind = Remote(str(path)).kind()
    else:
        kind = "directory" if local.is_dir() else "file" if local.exists() else None
    if kind == "directory" or (kind is not None and not overwrite):
        raise OutputExistsError(f"output {str(path)!r} exists; name another one, or say overwrite")


def _write_local(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        flush_directory(path.parent)
    except OSError as error:
        raise _not_saved(path, error) from error
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


def _not_saved(path: Path, error: OSError) -> SaveError:
    return SaveError(f"{path} could not be written ({error}); what was there before is untouched: make room, retry")

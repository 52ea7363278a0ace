"""What may be written where: one rule for every output, told before the work begins.

What exists is replaced only with ``overwrite``, and nothing that is read is ever replaced. A file needs its folder; a
folder is made with those above it.
"""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from randbasis.errors import OutputExistsError, SaveError
from randbasis.files.locations import Location, Remote, local_output, local_path
from randbasis.files.our_files import has_foreign_model, is_ours

Sources = Sequence[Location | None]
"""What is read: folders, files, URLs, names on a hub; None is nothing."""


def check_output_file(output: Location, sources: Sources = (), *, overwrite: bool) -> Path | None:
    """Raise unless a file can be written.

    Args:
        output: the file; a URL is looked at.
        sources: what is read.
        overwrite: whether a file that is there may be replaced.

    Returns:
        Its path on this machine, or None where it is behind a URL.

    Raises:
        OutputExistsError: it exists and may not be replaced, is a folder, a device or a pipe, or is a source or a part
            of one.
        SaveError: there is no folder that it could lie in, or none that may be written to.
        LocationError: it is a ``Path`` made of a URL, which has lost a slash.
        RemoteError: it is behind a URL that could not be reached.
    """
    path = local_output(output) if isinstance(output, Path) else local_path(output)
    if path is None:
        kind = Remote(str(output)).kind()
    else:
        kind = "directory" if path.is_dir() else "file" if os.path.lexists(path) else None
        if path.exists() and kind == "file" and not path.is_file():
            raise OutputExistsError(
                f"output {str(output)!r} must be a file or a new name, it is a device or a pipe, whose place a "
                "file would take; name a file"
            )
        _check_above(path, path.parent)
    if kind == "directory":
        raise OutputExistsError(f"output {str(output)!r} exists and is a folder, not a file; give another name")
    if kind is not None and not overwrite:
        raise _exists(output)
    for source in filter(None, sources):
        if kind is not None and path is not None and _reads(path, source):
            raise OutputExistsError(
                f"output must not be a file that is read from, got {str(output)!r} of {str(source)!r}; name another one"
            )
    return path


def check_output_folder(output: Location, sources: Sources = (), *, overwrite: bool, model: bool = False) -> Path:
    """Raise unless a folder can be written.

    Args:
        output: the folder.
        sources: what is read.
        overwrite: whether files of this package that are there may be replaced.
        model: whether a whole model is to be written, else an adapter.

    Returns:
        The path of the folder.

    Raises:
        OutputExistsError: it is a file, or is, contains or lies inside of a source, or holds something that may not be
            replaced.
        SaveError: it cannot be made, since a file is in the way or a right is missing.
        LocationError: it is not of this machine.
    """
    folder = local_output(output)
    for source in filter(None, sources):
        _check_apart(folder, source)
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"output {str(folder)!r} exists and is a file, not a folder; give another name")
    _check_above(folder, next((one for one in (folder, *folder.parents) if one.exists()), folder))
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    if not overwrite:
        raise _exists(folder)
    if not model and has_foreign_model(folder):
        raise OutputExistsError(
            f"output {str(folder)!r} must not hold a model that this package did not write, beside which an adapter "
            "would be read as a part of it; name another folder"
        )
    return folder


def never_replaced(output: Location, ours: str) -> OutputExistsError:
    """The error where something is there that no ``overwrite`` replaces.

    Args:
        output: where.
        ours: what could have been gone on with, in words.
    """
    return OutputExistsError(f"output {str(output)!r} exists and is no {ours}; give another name")


def _exists(output: Location) -> OutputExistsError:
    return OutputExistsError(f"output {str(output)!r} exists; give overwrite to replace it, or another name")


def _check_above(output: Path, folder: Path) -> None:
    """Raise unless the folder is one that something can be put into."""
    if not folder.exists():
        raise SaveError(
            errno.ENOENT,
            f"output {str(output)!r} could not be written: there is no folder {str(folder)!r}; make it first",
        )
    if not folder.is_dir():
        raise SaveError(
            errno.ENOTDIR,
            f"output {str(output)!r} could not be written: {str(folder)!r} is a file; give another name",
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SaveError(
            errno.EACCES,
            f"output {str(output)!r} could not be written: there is no right to write into the folder "
            f"{str(folder)!r}; give another name, or get that right",
        )


def _reads(file: Path, source: Location) -> bool:
    """Whether a file is a source, or one of ours in a source."""
    path = local_path(source)
    if path is None or not path.exists():
        return False
    inside = path.is_dir() and file.resolve().parent == path.resolve()
    return file.resolve() == path.resolve() or (inside and is_ours(file, model=True))


def _check_apart(folder: Path, source: Location) -> None:
    path = local_path(source)
    if path is None or not path.exists():
        return
    ours, theirs = folder.resolve(), path.resolve()
    if ours == theirs:
        raise OutputExistsError(f"output must not be the folder that is read from, got {str(folder)!r} for both")
    for outer, inner, how in ((ours, theirs, "contain"), (theirs, ours, "lie inside of")):
        if outer in inner.parents:
            raise OutputExistsError(
                f"output must not {how} what is read from, got {str(folder)!r} and {str(source)!r}; name another folder"
            )

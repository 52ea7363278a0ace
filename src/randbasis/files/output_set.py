"""One way to write a folder: the files of this package are replaced as a set, whole or not at all, and others stay.

What a command writes into a folder is one set: an adapter with what was told of it, or a model with its tokenizer. Ours
that the new set does not have go, since they would be read as a part of it; what somebody else put there stays.

Everything is written beside its place first. Then the old files are moved out, all of them before the first new one is
moved in, so that no folder ever holds a mixture; each failure is undone, and where the process was killed in between,
the journal that the folder holds then says so to readers, and the next writer undoes it.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from randbasis.errors import AdapterFilesError, SaveError
from randbasis.files.our_files import our_names
from randbasis.files.saving import saving
from randbasis.files.whole_file import flush_directory

_JOURNAL, _MOVES, _OLD = ".replaced-set", "moves.json", "old"


@contextmanager
def replaced_set(output: Path, *, model: bool = False, kept: Collection[str] = ()) -> Generator[Path]:
    """A folder to write into, whose files take the place of ours in ``output`` only when the block has succeeded.

    Args:
        output: the folder; made where there is none.
        model: whether a whole model is written, which takes the place of an adapter too.
        kept: names of ours that stay although the new set does not have them.

    Raises:
        SaveError: the operating system refused; ``output`` is as it was.
    """
    is_new = not output.exists()
    with saving(output), _made_folder(output.parent if is_new else output):
        if not is_new:
            _undo(output)
        stage = Path(tempfile.mkdtemp(prefix=".writing-", dir=output.parent if is_new else output))
        try:
            new = stage / "new"
            new.mkdir()
            yield new
            if is_new:
                os.replace(new, output)
                flush_directory(output.parent)
            else:
                _exchange(output, stage, our_names(output, model=model) - {*kept})
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def check_finished(folder: Path) -> None:
    """Raise if a process was killed while it replaced the files of a folder.

    Raises:
        AdapterFilesError: it was.
    """
    journal = folder / _JOURNAL
    if journal.is_dir():
        raise AdapterFilesError(
            f"{folder} must hold one whole set of files, but a process was stopped while it replaced them; write into "
            f"it again with overwrite, or move the files of {journal / _OLD} back and remove {journal}"
        )


# --- a folder that grows while the work goes on ---


def set_aside(folder: Path, aside: Path) -> None:
    """Make a folder anew; what was in it lies aside until :func:`put_back`, or until a set is written without it.

    Raises:
        SaveError: the operating system refused.
    """
    with saving(folder):
        if folder.exists() and not aside.exists():
            os.replace(folder, aside)
        elif folder.exists():  # begun by another that had set aside too, and was stopped
            shutil.rmtree(folder)
        folder.mkdir(parents=True)


def put_back(folder: Path, aside: Path) -> None:
    """Leave everything as it was before :func:`set_aside`."""
    shutil.rmtree(folder, ignore_errors=True)
    if aside.exists():
        os.replace(aside, folder)
    with suppress(OSError):
        folder.parent.rmdir()  # only where nothing is left in it


# --- the exchange ---


def _exchange(output: Path, stage: Path, ours: set[str]) -> None:
    """Move the old files out and the new ones in, or leave everything as it was."""
    new = sorted(path.name for path in (stage / "new").iterdir())
    old = sorted(name for name in {*ours, *new} if os.path.lexists(output / name))
    journal, begun = output / _JOURNAL, stage / "journal"
    (begun / _OLD).mkdir(parents=True)
    (begun / _MOVES).write_text(json.dumps({"old": old, "new": new}), encoding="utf-8")
    try:
        os.replace(begun, journal)
        for name in old:
            os.replace(output / name, journal / _OLD / name)
        for name in new:
            os.replace(stage / "new" / name, output / name)
        flush_directory(output)
        os.replace(journal, stage / "replaced")
    except BaseException:
        _undo(output)
        raise


def _undo(output: Path) -> None:
    """Put back what an exchange that did not come to its end had moved; without one, nothing.

    Raises:
        SaveError: the operating system refused; says where the files are.
    """
    journal = output / _JOURNAL
    if not journal.is_dir():
        return
    try:
        moves: dict[str, list[str]] = json.loads((journal / _MOVES).read_text(encoding="utf-8"))
        moved = [name for name in moves["old"] if os.path.lexists(journal / _OLD / name)]
        if len(moved) == len(moves["old"]):  # no new file is moved in before
            for name in moves["new"]:
                _remove(output / name)
        for name in moved:
            os.replace(journal / _OLD / name, output / name)
        shutil.rmtree(journal)
    except (OSError, ValueError, KeyError) as error:
        raise SaveError(
            errno.EIO,
            f"{output} could not be written, nor could its files be put back ({error}); those that were there lie in "
            f"{journal / _OLD}: move them back, and remove {journal}",
        ) from error


@contextmanager
def _made_folder(folder: Path) -> Generator[None]:
    """A folder with those above it; those that were not there go again where the block fails."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()] if not folder.exists() else []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for one in missing:
            with suppress(OSError):
                one.rmdir()
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

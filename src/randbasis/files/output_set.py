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
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from randbasis.errors import AdapterFilesError, OutputExistsError, RandbasisError, SaveError
from randbasis.files.locations import Location, local_output, local_path
from randbasis.files.whole_file import flush_directory

ADAPTER_SET = frozenset(
    {
        *("adapter_config.json", "adapter_model.safetensors", "head.safetensors", "packed.safetensors"),
        *("task.json", "summary.json", "history.jsonl", "loss.png"),
        *("checkpoints", ".checkpoints-before"),
    }
)
"""Names of what this package writes of an adapter; a model card, whose name anybody uses, is told by its content."""
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Files of a tokenizer or image processor."""
MODEL_SET = frozenset({"config.json", "generation_config.json", "model.safetensors.index.json", *COMPANIONS})
"""Names of what this package writes of a whole model, beside its weights."""
MERGED_MARK = "merged_by"
"""Key of a ``config.json`` that this package wrote."""
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_ANY_WEIGHTS = re.compile(r"(model|pytorch_model|tf_model|flax_model).*\.(safetensors|bin|h5|msgpack|json)")
_CARD = "README.md"
_CARD_LIBRARY = "library_name: peft"
_JOURNAL, _MOVES, _OLD = ".replaced-set", "moves.json", "old"


def check_output(output: Location, sources: Sequence[Location | None], *, overwrite: bool, model: bool = False) -> Path:
    """Raise unless a folder can be written.

    Args:
        output: the folder.
        sources: what is read: folders, files, URLs, names on a hub; None is nothing.
        overwrite: whether files of this package that are there may be replaced.
        model: whether a whole model is to be written, else an adapter.

    Returns:
        The path of the folder.

    Raises:
        OutputExistsError: it is a file, or is, contains or lies inside of a source, or holds something that may not be
            replaced.
        LocationError: it is not of this machine.
    """
    folder = local_output(output)
    for source in filter(None, sources):
        _check_apart(folder, source)
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"output {str(folder)!r} is a file; give a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    if not overwrite:
        raise OutputExistsError(f"output {str(folder)!r} exists; give overwrite to replace it, or another folder")
    if not model and _foreign_model(folder):
        raise OutputExistsError(
            f"output {str(folder)!r} must not hold a model that this package did not write, beside which an adapter "
            "would be read as a part of it; name another folder"
        )
    return folder


def check_file_output(output: Location, sources: Sequence[Location | None], *, overwrite: bool) -> None:
    """Raise if a file to write is one that is read, or a part of an adapter or model that is read.

    Args:
        output: the file.
        sources: what is read.
        overwrite: whether a file that is there may be replaced; else it is refused anyway.

    Raises:
        OutputExistsError: it is.
    """
    file = local_path(output)
    if file is None or not overwrite or not file.exists():
        return
    for source in filter(None, sources):
        path = local_path(source)
        if path is None or not path.exists():
            continue
        inside = path.is_dir() and file.resolve().parent == path.resolve()
        if file.resolve() == path.resolve() or (inside and _is_ours(file, model=True)):
            raise OutputExistsError(
                f"output must not be a file that is read from, got {str(output)!r} of {str(source)!r}; name another one"
            )


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
    made: list[Path] = []
    stage: Path | None = None
    with saving(output):
        try:
            is_new = not output.exists()
            if is_new:
                made = _make(output.parent)
            else:
                _undo(output)
            stage = Path(tempfile.mkdtemp(prefix=".writing-", dir=output.parent if is_new else output))
            new = stage / "new"
            new.mkdir()
            yield new
            if is_new:
                os.replace(new, output)
                flush_directory(output.parent)
            else:
                _exchange(output, stage, _replaced(output, model=model) - {*kept})
            made = []
        finally:
            if stage is not None:
                shutil.rmtree(stage, ignore_errors=True)
            for folder in reversed(made):
                with suppress(OSError):
                    folder.rmdir()


@contextmanager
def saving(target: Path, undo: Callable[[], None] | None = None) -> Generator[None]:
    """Turn what a failed write raises into one message.

    Args:
        target: what is being written.
        undo: removes what was written by half.

    Raises:
        SaveError: the operating system refused.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, RandbasisError):
            raise
        if undo is not None:
            undo()
        number = getattr(error, "errno", None) or errno.EIO
        full = number == errno.ENOSPC or "No space left" in str(error)
        reason = f"the disk is full ({error}); free some space" if full else f"{error}; check the folder and its rights"
        raise SaveError(number, f"{target} could not be written: {reason}; what was there before is kept") from error


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


def _replaced(folder: Path, *, model: bool) -> set[str]:
    """Names of ours in a folder."""
    model = model or _marked(folder)
    return {path.name for path in folder.iterdir() if _is_ours(path, model=model)}


def _is_ours(path: Path, *, model: bool) -> bool:
    if path.name == _CARD:
        return _is_card(path)
    return path.name in ADAPTER_SET or (model and (path.name in MODEL_SET or bool(_WEIGHTS.fullmatch(path.name))))


def _is_card(path: Path) -> bool:
    """Whether a file is a model card of an adapter, which tells of the adapter that it lies beside."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return text.startswith("---\n") and _CARD_LIBRARY in text.partition("\n---")[0]


def _foreign_model(folder: Path) -> bool:
    names = [path.name for path in folder.iterdir()]
    return "config.json" in names and any(map(_ANY_WEIGHTS.fullmatch, names)) and not _marked(folder)


def _marked(folder: Path) -> bool:
    try:
        found: object = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and MERGED_MARK in found


def _make(folder: Path) -> list[Path]:
    """Make a folder with those above it; returns the ones that were not there, the outermost first."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


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


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

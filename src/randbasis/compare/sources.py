"""DATA → DIGEST: what the files of a study hold, so that a run on other rows or another base is not taken for one."""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from randbasis.compare.study import Data
from randbasis.train.sources import files_of, is_on_hub

PROSE = (".md", ".png", ".jpg", ".gitattributes")
"""Endings of files beside a model that no run depends on."""


def digest_of(data: Data) -> str:
    """Twelve hex digits that change with what the files of a data set hold, but not with where they lie.

    What is on a hub counts by its name.

    Args:
        data: one whose files are there.

    Raises:
        DataMissingError: a pattern names no file.
    """
    rows = data.base.data
    named = (
        rows.train_sources,
        rows.eval_sources,
        *(() if one is None else (one,) for one in (data.dev, data.forgetting)),
    )
    parts = [[_source(str(file)) for source in group for file in files_of(source)] for group in named]
    return hashlib.sha256(repr((*parts, _model(data.base.model))).encode()).hexdigest()[:12]


def _source(name: str) -> str:
    path = Path(name)
    if is_on_hub(name) or not path.exists():
        return name
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    return _digest(path, tuple(files))


def _model(name: str) -> str:
    path = Path(name)
    return _digest(path, tuple(_of_model(path))) if path.is_dir() else name


def _of_model(folder: Path) -> Iterator[Path]:
    for one in sorted(folder.iterdir()):
        if one.is_file() and one.suffix.lower() not in PROSE and not one.name.startswith("."):
            yield one


@lru_cache(maxsize=64)
def _digest(root: Path, files: tuple[Path, ...]) -> str:
    """Of names below the root and contents; of a single file its contents alone."""
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.relative_to(root).as_posix() if file != root else ''}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as opened:
            found.update(hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()

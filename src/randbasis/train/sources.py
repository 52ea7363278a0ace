"""Where rows come from: files, patterns of files, and data sets of a hub, one behind the other."""

from collections.abc import Sequence
from dataclasses import replace
from glob import glob, has_magic
from pathlib import Path

from randbasis.errors import DataFormatError, DataMissingError
from randbasis.train.hub_rows import HUB, read_hub_rows
from randbasis.train.tabular import Table, read_table


def read_sources(sources: Sequence[str | Path], *, kind: str | None = None, wanted: Sequence[str] = ()) -> Table:
    """All rows, in the order in which their sources are named; those of a pattern in the order of their names.

    Args:
        sources: files as for :func:`randbasis.train.tabular.read_table`, patterns (``part-*.parquet``, ``**/*.jsonl``),
            and what :func:`randbasis.train.hub_rows.read_hub_rows` takes.
        kind: of the files.
        wanted: the columns that will be asked for.

    Raises:
        DataMissingError: there is no such file, or a pattern matches none.
        DataFormatError: a file has other columns than the first.
        RandbasisError: as these two functions.
    """
    tables = [
        read_hub_rows(str(one)) if is_on_hub(one) else read_table(one, kind=kind, wanted=wanted)
        for source in sources
        for one in files_of(source)
    ]
    first, *others = tables
    for other in others:
        if {*other.columns} != {*first.columns}:
            raise DataFormatError(
                f"{other.source} has other columns than {first.source}: {', '.join(other.columns)} instead of "
                f"{', '.join(first.columns)}; give files with the same columns"
            )
    if not others:
        return first
    rows = [row for table in tables for row in table.rows]
    return replace(first, rows=rows, source=f"{first.source} and {len(others)} more")


def files_of(source: str | Path) -> list[str | Path]:
    """The files that a pattern names; anything else is itself.

    Raises:
        DataMissingError: it names none.
    """
    if is_on_hub(source) or not has_magic(str(source)) or Path(source).exists():
        return [source]
    found: list[str | Path] = [one for one in sorted(glob(str(source), recursive=True)) if Path(one).is_file()]
    if not found:
        raise DataMissingError(f"data {str(source)!r} matches no file; mend the pattern")
    return found


def is_on_hub(source: str | Path) -> bool:
    """Whether a source is a data set of the library datasets."""
    return isinstance(source, str) and source.startswith(HUB)

"""Answers in a file: JSON lines, JSON, csv or tsv, as its name says."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any, cast

from randbasis.errors import SettingError
from randbasis.files.locations import Location
from randbasis.files.whole_file import whole_file
from randbasis.train.tabular import Row


def write_rows(rows: Sequence[Row], path: Location, *, overwrite: bool = False) -> None:
    """Write rows as the name of the file says, complete or not at all; JSON lines where it has no ending.

    In a csv or tsv probabilities have a column a class, ``probability_NAME``, and lists and objects are JSON.

    Raises:
        SettingError: the name ends in something else.
        OutputExistsError: the file exists and ``overwrite`` was not given.
        SaveError: the operating system refused.
    """
    text = form_of(path)(rows)
    with whole_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_lines(rows: Sequence[Row], path: Location, *, overwrite: bool = False) -> None:
    """As :func:`write_rows`, JSON lines whatever the name says."""
    with whole_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(_lines(rows), encoding="utf-8")


def json_line(row: Row) -> str:
    """A row as one line of JSON; what JSON has no form for, such as an image, is written as text."""
    return json.dumps(row, ensure_ascii=False, default=str)


def form_of(path: Location) -> Callable[[Sequence[Row]], str]:
    """What makes the text of a file of this name.

    Raises:
        SettingError: its ending says no form of rows.
    """
    suffix = PurePath(path).suffix.lower()
    if suffix not in _FORMS:
        raise SettingError(
            f"output must end in {', '.join(filter(None, _FORMS))}, or have no ending for JSON lines, got {str(path)!r}"
        )
    return _FORMS[suffix]


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json_line(row) + "\n" for row in rows)


def _json(rows: Sequence[Row]) -> str:
    return json.dumps(rows, ensure_ascii=False, default=str, indent=1) + "\n"


def _separated(rows: Sequence[Row], delimiter: str = ",") -> str:
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, columns, delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return stream.getvalue()


def _tabbed(rows: Sequence[Row]) -> str:
    return _separated(rows, "\t")


def _flat(row: Row) -> Row:
    """Cells of one row."""
    cells: Row = {}
    for name, value in row.items():
        if name == "probabilities" and isinstance(value, dict):
            cells |= {f"probability_{label}": chance for label, chance in cast("dict[str, Any]", value).items()}
        else:
            cells[name] = json_line(cast(Any, value)) if isinstance(value, list | dict) else value
    return cells


_FORMS: dict[str, Callable[[Sequence[Row]], str]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".csv": _separated,
    ".tsv": _tabbed,
    "": _lines,
}

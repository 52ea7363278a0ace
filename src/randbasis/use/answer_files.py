"""Answers as lines of a file."""

import json
from collections.abc import Sequence

from randbasis.files.locations import Location
from randbasis.files.whole_file import whole_file
from randbasis.train.tabular import Row


def write_lines(rows: Sequence[Row], path: Location, *, overwrite: bool = False) -> None:
    """Write rows as JSON lines, complete or not at all.

    Raises:
        OutputExistsError: the file exists and ``overwrite`` was not given.
        SaveError: the operating system refused.
    """
    with whole_file(path, overwrite=overwrite) as temporary:
        temporary.write_text("".join(json_line(row) + "\n" for row in rows), encoding="utf-8")


def json_line(row: Row) -> str:
    """A row as one line of JSON; what JSON has no form for, such as an image, is written as text."""
    return json.dumps(row, ensure_ascii=False, default=str)

"""Tables in a window: no word is cut; what does not fit is broken at spaces, and names behind dots and slashes."""

import re
import sys
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

_AT_SPACES = re.compile(r"(?<=\s)")
_IN_NAMES = re.compile(r"(?<=\s)|(?<=[./])(?!(?<=\d\.)\d)(?=\S)")  # not in 0.5

_BETWEEN = re.compile(r"(?<=, )")


def unbounded_width(console: Console, table: Table) -> int:
    """Letters of the longest line where nothing is broken."""
    return Measurement.get(console, console.options.update(max_width=sys.maxsize), table).maximum


def fitted(console: Console, table: Table) -> Table | str:
    """A table that fits the console's width.

    Headers of numbers give way first, then names, the longest first, then numbers. Where not even the longest words fit
    beside each other, it is a text: each name on a line of its own, and its values below.

    Args:
        console: where it is to be shown.
        table: whose cells are texts.
    """
    total = unbounded_width(console, table)
    if total <= console.width:
        return table
    columns = [_texts(column) for column in table.columns]
    breaks = [_IN_NAMES if column.justify == "left" else _AT_SPACES for column in table.columns]
    widths = [max(map(cell_len, texts)) for texts in columns]
    least = [
        max(cell_len(piece.rstrip()) for text in texts for piece in at.split(text))
        for texts, at in zip(columns, breaks, strict=True)
    ]
    room = console.width - (total - sum(widths))
    names = sorted((i for i, at in enumerate(breaks) if at is _IN_NAMES), key=lambda i: -widths[i])
    numbers = [i for i in range(len(columns)) if i not in names]
    whole = [max(least[i], *map(cell_len, columns[i][1:])) for i in numbers]
    floors = [*zip(numbers, whole, strict=True), *((i, least[i]) for i in (*names, *numbers))]
    for i, floor in floors:
        widths[i] = max(floor, widths[i] - max(sum(widths) - room, 0))
    if sum(widths) > room:
        return _stacked(table, console.width)
    return _with_widths(table, widths, breaks)


def _with_widths(table: Table, widths: Sequence[int], breaks: Sequence[re.Pattern[str]]) -> Table:
    made = Table(
        title=table.title,
        caption=table.caption,
        box=table.box,
        show_header=table.show_header,
        min_width=table.min_width,
    )
    for column, width, at in zip(table.columns, widths, breaks, strict=True):
        made.add_column(_broken(str(column.header), width, at), justify=column.justify, width=width, overflow="fold")
    rows = zip(*(column.cells for column in table.columns), strict=True)
    for row, cells in zip(table.rows, rows, strict=True):
        shown = [_broken(str(cell), width, at) for cell, width, at in zip(cells, widths, breaks, strict=True)]
        made.add_row(*shown, style=row.style, end_section=row.end_section)
    return made


def _stacked(table: Table, width: int) -> str:
    headers = [str(column.header) for column in table.columns]
    lines = [str(table.title)] if table.title else []
    for name, *values in zip(*(map(str, column.cells) for column in table.columns), strict=True):
        told = [f"{header} {value}".strip() for header, value in zip(headers[1:], values, strict=True) if value]
        lines.append(_broken(name, width, _IN_NAMES))
        kept = _broken(", ".join(told), width - 2, _BETWEEN).splitlines()
        lines += [f"  {part}" for line in kept for part in _broken(line, width - 2, _IN_NAMES).splitlines()]
    return "\n".join([*lines, *([str(table.caption)] if table.caption else [])])


def _broken(text: str, width: int, at: re.Pattern[str]) -> str:
    """The text in lines of that width, or of one piece where that is longer."""
    lines = [""]
    for piece in at.split(text):
        if lines[-1] and cell_len(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _texts(column: Column) -> list[str]:
    return [str(column.header), *map(str, column.cells)]

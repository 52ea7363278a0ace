"""Rows from a file: csv, tsv, JSON lines, JSON or plain text, each also gzipped, or parquet.

A table without a header names its columns ``0``, ``1``, ... so that an index is a name like any other.
"""

import csv
import gzip
import io
import json
import re
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from randbasis.errors import ColumnError, DataFormatError, DataMissingError, EmptyDataError, near, nearest
from randbasis.files.text_files import not_text, open_text
from randbasis.optional import needing

Row = dict[str, Any]

MISSING_TEXTS = ("nan", "NaN", "<NA>")
"""How pandas writes a text that is not there."""

_OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
_CHAT_TEXT = re.compile(r"""\s*\[?\s*\{\s*['"](role|from)['"]\s*:""")
STORY_END = "<|endoftext|>"


@dataclass(frozen=True)
class Table:
    """Rows of one source.

    Args:
        columns: the names of the columns, in order.
        rows: one dictionary a row.
        source: what to call the data in a message.
    """

    columns: tuple[str, ...]
    rows: list[Row]
    source: str

    def column(self, name: str) -> list[Any]:
        """All values of one column.

        Raises:
            ColumnError: the column does not exist, or a row has nothing in it.
        """
        if name not in self.columns:
            hint = _other_separator(self.columns, self.rows) or nearest(name, self.columns)
            raise ColumnError(
                f"column {name!r} is not in {self.source}; its columns are {', '.join(map(repr, self.columns))}"
                + (f"; {hint}" if hint else "")
            )
        for number, row in enumerate(self.rows, 1):
            value = row.get(name)
            if value is None or value != value:
                raise ColumnError(f"row {number} of {self.source} has no value in column {name!r}; fill or remove it")
        return [row[name] for row in self.rows]

    def texts(self, name: str) -> list[str]:
        """All values of one column as texts, see :func:`text_of`; cells that hold no text are counted in a warning.

        Raises:
            ColumnError: the column does not exist, a row has nothing in it, or it holds chat messages.
        """
        return self._as_texts(name, [[value] for value in self.column(name)], text_of)

    def references(self, name: str | None) -> list[list[str]]:
        """As :meth:`texts`, where a list in a cell is several texts."""
        cells = self.column(name or "")
        each = [cast(list[Any], value) if isinstance(value, list) else [value] for value in cells]
        texts = iter(self._as_texts(name or "", each, text_of))
        return [[next(texts) for _ in some] for some in each]

    def _as_texts(self, name: str, cells: list[list[Any]], convert: Callable[[Any], str]) -> list[str]:
        texts: list[str] = []
        for number, cell in enumerate(cells, 1):
            try:
                texts += map(convert, cell)
            except DataFormatError as error:
                raise ColumnError(f"row {number} of {self.source}, column {name!r}: {error}") from error
        empty = sum(text.strip() in ("", *MISSING_TEXTS) for text in texts)
        if empty:
            warnings.warn(
                f"{empty} of {len(texts)} texts in column {name!r} of {self.source} are empty, or NaN as pandas writes "
                "a missing value; they are taken as they are",
                stacklevel=3,
            )
        return texts

    def subset(self, indices: Sequence[int]) -> "Table":
        """The rows at ``indices``, in that order."""
        return Table(self.columns, [self.rows[i] for i in indices], self.source)


def read_table(
    path: str | Path, *, kind: str | None = None, header: bool | None = None, wanted: Sequence[str] = ()
) -> Table:
    """Read a file of rows.

    Args:
        path: a ``.csv``, ``.tsv``, ``.jsonl``, ``.json`` or ``.txt`` file, any of these with ``.gz`` behind it, or a
            ``.parquet`` file.
        kind: ``"csv" | "tsv" | "jsonl" | "json" | "txt" | "parquet"``, when the name does not tell. A tsv has no
            quoting, but for one that is to the last character what a csv writer (that of pandas, too) makes of its
            cells.
        header: whether the first line of a csv or tsv names the columns. ``None``: it does, unless a wanted column is
            given by its index.
        wanted: the columns that will be asked for.

    Returns:
        The table; ``txt`` has one column ``text``, a row for each non-empty line, or for each story where the file
        separates its texts by ``<|endoftext|>``.

    Raises:
        DataMissingError: there is no such file.
        DataFormatError: the kind is unknown or the content is not of that kind.
        EmptyDataError: the file has no rows.
    """
    path = Path(path)
    if not path.is_file():
        raise DataMissingError(
            f"data {str(path)!r} is not a file; give the path of a csv, tsv, jsonl, json, txt or parquet file"
        )
    kind = kind or _kind_of(path)
    if kind not in KINDS:
        raise DataFormatError(f"kind of data {kind!r} is unknown; {near(kind, KINDS)}")
    if header is None:
        header = not any(name.isdecimal() for name in wanted)
    try:
        columns, rows = _read_parquet(path) if kind == PARQUET else _READERS[kind](open_text(path), path.name, header)
    except UnicodeDecodeError as error:
        raise not_text(path, error) from error
    except (csv.Error, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataFormatError(
            f"{path.name} cannot be read as {kind}: {error}; name the right kind with --format"
        ) from error
    if not rows:
        raise EmptyDataError(f"{path.name} has no rows")
    return Table(columns, rows, path.name)


def text_of(value: Any) -> str:
    """A cell as text: lists of lists, such as the triples of WebNLG, become ``a b c | d e f``.

    Raises:
        DataFormatError: it holds chat messages, which are a text only by the template of a tokenizer.
    """
    if _is_chat(value):
        raise DataFormatError(
            f"it holds chat messages or objects, {str(value)[:60]!r}; make texts of them first, for example with "
            "apply_chat_template of the tokenizer"
        )
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return " | ".join(
            " ".join(map(str, cast(list[Any], part))) if isinstance(part, list) else str(part)
            for part in cast(list[Any], value)
        )
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _is_chat(value: Any) -> bool:
    """Whether a cell is a message, a list of messages or of other objects, or such a list as a text."""
    if isinstance(value, str):
        return _CHAT_TEXT.match(value) is not None
    if isinstance(value, dict):
        keys = cast(Row, value).keys()
        return {"role", "content"} <= keys or {"from", "value"} <= keys or any(map(_is_chat, cast(Row, value).values()))
    return isinstance(value, list) and any(isinstance(v, dict) or _is_chat(v) for v in cast(list[Any], value))


def _kind_of(path: Path) -> str:
    suffixes = [suffix.lower().lstrip(".") for suffix in path.suffixes]
    if suffixes and suffixes[-1] == "gz":
        suffixes.pop()
    known = {"ndjson": "jsonl", "jsonlines": "jsonl", "tab": "tsv", "text": "txt"}
    kind = known.get(suffixes[-1], suffixes[-1]) if suffixes else ""
    if kind not in KINDS:
        raise DataFormatError(
            f"the name {path.name!r} does not tell what kind of data it is; it should end in one of "
            f"{', '.join('.' + name for name in KINDS)} (text also as .gz), or name the kind with --format"
        )
    return kind


def _read_separated(
    stream: io.TextIOWrapper, name: str, header: bool, *, tab: bool
) -> tuple[tuple[str, ...], list[Row]]:
    with stream:
        lines = _tab_separated(stream.read()) if tab else csv.reader(stream, strict=True)
        cells = [line for line in lines if line]
    if not cells:
        return (), []
    if not header and cells[0] != [str(i) for i in range(len(cells[0]))]:  # which is how pandas writes an index
        columns = tuple(str(i) for i in range(max(map(len, cells))))
        return columns, [dict(zip(columns, line, strict=False)) for line in cells]
    columns = tuple(cells[0])
    if len(set(columns)) != len(columns):
        raise DataFormatError(
            f"the header of {name} names a column twice: {', '.join(columns)}; without a header, give "
            "columns by index (0, 1, ...)"
        )
    for number, line in enumerate(cells[1:], 2):
        if len(line) != len(columns):
            hint = _other_separator(columns, ()) or (
                "is it of another kind (--format), or without a header (columns by index)?"
            )
            raise DataFormatError(
                f"line {number} of {name} has {len(line)} cells, its header has {len(columns)}; {hint}"
            )
    return columns, [dict(zip(columns, line, strict=True)) for line in cells[1:]]


def _other_separator(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """What to say where a table has one column, whose name or first cell holds what others separate cells with."""
    if len(columns) != 1:
        return ""
    held = columns[0] if not (columns[0].isdecimal() and rows) else str(rows[0].get(columns[0], ""))
    found = next((words for mark, words in _OTHER_SEPARATORS.items() if mark in held), None)
    if found is None:
        return ""
    way_out = "name its kind with --format tsv" if found == "tabs" else "save it with commas"
    return f"its cells seem to be separated by {found}: {way_out}"


def _tab_separated(text: str) -> list[list[str]]:
    """Cells as they stand, quotes included, unless the text is just what a csv writer makes of its cells."""
    plain = [line for line in csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE) if line]
    if '"' not in text:
        return plain
    try:
        quoted = [line for line in csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True) if line]
    except csv.Error:
        return plain
    written = text.replace("\r\n", "\n").rstrip("\n")
    styles = (_minimal, _quoted, _quoted_text)
    made = ("\n".join("\t".join(map(style, line)) for line in quoted) for style in styles)
    return quoted if any(one.replace("\r\n", "\n").rstrip("\n") == written for one in made) else plain


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"'


def _quoted_text(cell: str) -> str:
    return cell if _is_number(cell) else _quoted(cell)


def _minimal(cell: str) -> str:
    return _quoted(cell) if any(mark in cell for mark in '"\t\n\r') else cell


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"|[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", cell, re.IGNORECASE) is not None


def _read_csv(stream: io.TextIOWrapper, name: str, header: bool) -> tuple[tuple[str, ...], list[Row]]:
    return _read_separated(stream, name, header, tab=False)


def _read_tsv(stream: io.TextIOWrapper, name: str, header: bool) -> tuple[tuple[str, ...], list[Row]]:
    return _read_separated(stream, name, header, tab=True)


def _read_jsonl(stream: io.TextIOWrapper, name: str, header: bool) -> tuple[tuple[str, ...], list[Row]]:
    records: list[Any] = []
    with stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                records.append(json.loads(line, object_pairs_hook=_unrepeated))
            except json.JSONDecodeError as error:
                raise DataFormatError(f"line {number} of {name} is not JSON: {error}") from error
    return _from_records(records, name)


def _read_json(stream: io.TextIOWrapper, name: str, header: bool) -> tuple[tuple[str, ...], list[Row]]:
    with stream:
        try:
            content = json.load(stream, object_pairs_hook=_unrepeated)
        except json.JSONDecodeError as error:
            raise DataFormatError(f"{name} is not JSON: {error}; one record a line is of kind jsonl") from error
    if not isinstance(content, list):
        raise DataFormatError(f"{name} holds a {type(content).__name__}; a list of objects is needed")
    return _from_records(cast(list[Any], content), name)


def _unrepeated(pairs: list[tuple[str, Any]]) -> Row:
    """An object whose keys are all different, where Python would keep the last of equal ones."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise DataFormatError(f"an object names a key twice: {', '.join(key for key, _ in pairs)}; keep one")
    return row


def _from_records(records: list[Any], name: str) -> tuple[tuple[str, ...], list[Row]]:
    columns: dict[str, None] = {}
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise DataFormatError(f"record {number} of {name} is a {type(record).__name__}; each must be an object")
        columns.update(dict.fromkeys(cast(Row, record)))
    return tuple(columns), cast(list[Row], records)


def _read_txt(stream: io.TextIOWrapper, name: str, header: bool) -> tuple[tuple[str, ...], list[Row]]:
    with stream:
        content = stream.read()
    parts = content.split(STORY_END) if STORY_END in content else content.splitlines()
    return ("text",), [{"text": part.strip()} for part in parts if part.strip()]


def _read_parquet(path: Path) -> tuple[tuple[str, ...], list[Row]]:
    with needing("a parquet file", "pyarrow", "data"):
        import pyarrow
        from pyarrow import parquet
    try:
        table = cast(Any, parquet).read_table(path)
    except (cast(Any, pyarrow).ArrowException, OSError) as error:
        raise DataFormatError(f"{path.name} cannot be read as parquet: {error}") from error
    return tuple(table.column_names), table.to_pylist()


PARQUET = "parquet"
_READERS: dict[str, Callable[[io.TextIOWrapper, str, bool], tuple[tuple[str, ...], list[Row]]]] = {
    "csv": _read_csv,
    "tsv": _read_tsv,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "txt": _read_txt,
}
KINDS = (*_READERS, PARQUET)

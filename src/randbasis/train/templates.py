"""Texts of several columns: ``"Title: {title}\\n{body} =>"`` filled with the cells of a row."""

import json
from collections.abc import Mapping
from string import Formatter
from typing import Any, cast

from randbasis.errors import SettingError
from randbasis.train.tabular import Table, text_of


class Template:
    """A text with the names of columns in braces; ``{{`` and ``}}`` are braces, ``\\n`` and ``\\t`` are line and tab.

    Args:
        text: as it was given.
        name: of the setting, for messages.

    Raises:
        SettingError: a brace is not closed, or holds something else than a name.
    """

    def __init__(self, text: str, name: str):
        self.name = name
        written = text.replace("\\n", "\n").replace("\\t", "\t")
        try:
            self._parts = [part[:2] for part in Formatter().parse(written)]
            bare = all(not spec and not conversion for _, _, spec, conversion in Formatter().parse(written))
        except ValueError as error:
            raise SettingError(f"{name} {text!r} cannot be read: {error}; a brace of the text is doubled") from error
        self.fields = tuple(dict.fromkeys(field for _, field in self._parts if field is not None))
        if not bare or "" in self.fields:
            raise SettingError(
                f"{name} {text!r} must have nothing but the names of columns in its braces, such as {{title}}; a brace "
                "of the text is doubled"
            )
        if not self.fields:
            raise SettingError(f"{name} {text!r} must name a column in braces, such as {{title}}; it names none")

    def fill(self, cells: Mapping[str, str]) -> str:
        """The text of one row."""
        return "".join(text + ("" if field is None else cells[field]) for text, field in self._parts)

    def texts(self, table: Table) -> list[str]:
        """The text of every row.

        Raises:
            ColumnError: a column does not exist, a row has nothing in it, or it holds chat messages.
        """
        columns = zip(*(table.texts(field) for field in self.fields), strict=True)
        return [self.fill(dict(zip(self.fields, cells, strict=True))) for cells in columns]

    def of_one(self, text: str) -> str:
        """The text of one value, or of an object of JSON where there are several columns.

        Raises:
            SettingError: there are several, and it is no object with just these.
        """
        if len(self.fields) == 1:
            return self.fill({self.fields[0]: text})
        try:
            cells = json.loads(text)
        except json.JSONDecodeError:
            cells = None
        if not isinstance(cells, dict) or cells.keys() != set(self.fields):
            shape = json.dumps(dict.fromkeys(self.fields, "..."), ensure_ascii=False)
            raise SettingError(
                f"a prompt for the template of this adapter has several parts, give it as {shape}, or rows with these "
                f"columns; got {text!r}"
            )
        return self.fill({name: text_of(value) for name, value in cast(dict[str, Any], cells).items()})

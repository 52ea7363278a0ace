"""What every command has in common: one document on the output stream, messages on the other, exit codes.

With ``--json`` the output stream carries one JSON document and nothing else; progress and messages go to the error
stream. :data:`EXIT_CODES` says how a command ends.
"""

import json
import math
import os
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import typer
from rich.console import Console
from rich.table import Table

from randbasis.cli.command import BROKEN_PIPE, in_command_words
from randbasis.cli.noise import readable_messages
from randbasis.cli.tables import fitted, unbounded_width
from randbasis.errors import RandbasisError

TRACEBACK_VARIABLE = "RANDBASIS_TRACEBACK"
USAGE = (ValueError, TypeError, FileNotFoundError, FileExistsError)
EXIT_CODES = (
    "Exit codes: 0 done; 1 the work failed, or `store verify` found damage; 2 what was asked for cannot be done; "
    f"130 stopped by Ctrl-C, 143 by SIGTERM; {BROKEN_PIPE} whoever read the output left, as behind `| head`."
)


@contextmanager
def reported(as_json: bool) -> Generator[None]:
    """Errors of this package as one message and an exit code; everything else as Python shows it.

    A bad value, a missing file or an existing output is bad usage and exits with 2; a failure of the work with 1.
    ``RANDBASIS_TRACEBACK=1`` in the environment shows where an error came from.
    """
    try:
        with readable_messages(in_command_words):
            yield
    except BrokenPipeError:
        raise
    except (RandbasisError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            traceback.print_exc()
        usage = isinstance(error, RandbasisError) and isinstance(error, USAGE)
        if isinstance(error, RandbasisError) and error.told_elsewhere:
            raise typer.Exit(2 if usage else 1) from error
        message = in_command_words(str(error) if isinstance(error, RandbasisError) else _of_system(error))
        complain(type(error).__name__, f"error: {message}", message if as_json else None)
        raise typer.Exit(2 if usage else 1) from error


def _of_system(error: OSError) -> str:
    """What the operating system refused, without its number; of a file or folder that it names, with the way out."""
    if error.strerror is None:
        return str(error)
    said = f"{error.strerror[:1].lower()}{error.strerror[1:]}"
    if error.filename is None:
        return said
    way_out = "; give another one, or get the right to it" if isinstance(error, PermissionError) else ""
    return f"{str(error.filename)!r} could not be opened: {said}{way_out}"


def complain(kind: str, text: str, message: str | None) -> None:
    """One line on the error stream and, where a document is expected, one that has the message."""
    if message is not None:
        typer.echo(json.dumps({"error": kind, "message": message}))
    Console(stderr=True, soft_wrap=True).print(text, style="red", markup=False, highlight=False)


def answer(document: dict[str, Any], as_json: bool) -> None:
    """One result, as JSON or as a table of its plain values."""
    if as_json:
        typer.echo(json.dumps(_finite(document), ensure_ascii=False))
        return
    table = Table(show_header=False, box=None)
    for name, value in document.items():
        if name == "settings":
            continue
        table.add_row(name.replace("_", " "), shown(value))
    _print(table)


def answer_table(document: dict[str, Any], table: Table, as_json: bool) -> None:
    """One result, as JSON or as a table of its own."""
    if as_json:
        answer(document, as_json)
    else:
        _print(table)


class _Output(Console):
    """Rich would end the program with 1 where the reader went away; the command class knows what to do."""

    def on_broken_pipe(self) -> None:
        """Leave the error as it is."""
        raise BrokenPipeError


def _print(table: Table) -> None:
    """Nothing is lost and no word cut: a window may break what does not fit, in a pipe or a file nothing is broken."""
    console = _Output(markup=False)  # which would take the brackets of c_attn[q] for a style
    if not console.is_terminal:
        console.width = max(console.width, unbounded_width(console, table))
    made = fitted(console, table)
    console.print(made, soft_wrap=isinstance(made, str), highlight=isinstance(made, Table))


def shown(value: Any) -> str:
    """A plain value as a person reads it, and not as Python writes it."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(item)}" for key, item in cast("dict[str, Any]", value).items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, cast("list[Any]", value))) or "none"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: ``null``."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in cast(dict[str, Any], value).items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

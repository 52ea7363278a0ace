"""``--config``: a file whose keys are the options of the command, each checked as if it stood on the command line."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, cast, get_args, get_type_hints

import typer
from typer import Option

from randbasis.cli.command import Command
from randbasis.cli.console import reported
from randbasis.cli.parameters import AUTO
from randbasis.errors import SettingError, near
from randbasis.train.settings import TrainSettings, settings_from_words

JOINED = ("targets",)
"""Options whose names are one text with commas, which in a file may be a list."""


class CommandWithConfig(Command):
    """A command that tells of a bad file as it tells of a bad option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click."""
        with reported("--json" in args):
            return super().parse_args(ctx, args)


def take_from_file(context: typer.Context, path: Path | None) -> Path | None:
    """Let what a file says stand where the command line says nothing.

    Raises:
        RandbasisError: the file, a key or a value is not what it has to be.
    """
    if path is not None and not context.resilient_parsing:
        from randbasis.train.run_config import read_config

        context.default_map = _values(read_config(path), context.command, path)
    return path


def run_of(context: typer.Context, path: Path, output: Path, model: str | None) -> TrainSettings:
    """The run that a file tells, or the folder of a run in its own file, for another output.

    Args:
        context: of any command.
        path: file as for ``train --config``, or folder.
        output: of the new run.
        model: its base; None takes that of the file.

    Raises:
        RandbasisError: the file, a key or a value is not what it has to be.
    """
    from randbasis.train.run_config import CONFIG_FILE, read_config

    file = path / CONFIG_FILE if path.is_dir() else path
    command = cast(Any, context.find_root().command).get_command(context, "train")
    words = {**read_config(file), "output": str(output), **({} if model is None else {"model": model})}
    missing = [name for name in ("task", "model", "data") if name not in words]
    if missing:
        raise SettingError(f"{file} must say {missing[0]}, as a file for train --config does; put it in")
    return settings_from_words(_values(words, command, file))


Config = Annotated[
    Path | None,
    Option(
        is_eager=True,
        callback=take_from_file,
        help="File of options, YAML or JSON (rank: 4); the command line wins. A run leaves its own as run.yaml.",
    ),
]


def _options(command: Any) -> dict[str, Any]:
    """Name of an option in a file → the parameter."""
    found = {one.opts[0].lstrip("-").replace("-", "_"): one for one in command.params}
    return {name: one for name, one in found.items() if name not in ("config", "help")}


def _values(words: Mapping[str, Any], command: Any, path: Path) -> dict[str, Any]:
    """Parameter → value, as the command line would have it."""
    options, hints = _options(command), get_type_hints(inspect.unwrap(command.callback))
    values: dict[str, Any] = {}
    for name, value in words.items():
        if name not in options:
            raise SettingError(f"{path}: {name!r} is not an option of this command; {near(name, options)}")
        parameter = options[name].name
        values[parameter] = _checked(name, value, hints[parameter], path)
    return values


def _checked(name: str, value: Any, hint: Any, path: Path) -> Any:
    """A value of the type that the parameter has.

    Raises:
        SettingError: it is of another.
    """
    kinds: set[Any] = {*get_args(hint)} if isinstance(hint, UnionType) else {hint}
    if list[str] in kinds:
        items = cast("list[Any]", value) if isinstance(value, list) else [value]
        return [_one(name, item, kinds, path) for item in items]
    if isinstance(value, list) and name in JOINED:
        return ",".join(_one(name, item, kinds, path) for item in cast("list[Any]", value))
    return _one(name, value, kinds, path)


def _one(name: str, value: Any, kinds: set[Any], path: Path) -> Any:
    if value == AUTO and float in kinds:
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if bool in kinds:
        wanted, right = "true or false", isinstance(value, bool)
    elif int in kinds:
        wanted, right = "a whole number", number and isinstance(value, int)
    elif float in kinds:
        wanted, right = "a number", number or (isinstance(value, str) and _is_number(value))
    else:  # a name that looks like a number, such as that of a column
        wanted = "a text (in quotes, where it could be taken for something else)"
        right = number or isinstance(value, str)
    if not right:
        shown = "nothing" if value is None else repr(value)
        raise SettingError(f"{path}: {name} must be {wanted}, got {shown}; mend it, or leave the line out")
    return value if kinds & {bool, int} else float(value) if float in kinds else str(value)


def _is_number(text: str) -> bool:
    """Whether a text is a number: YAML takes 1e-3, without a point, for a text."""
    try:
        float(text)
    except ValueError:
        return False
    return True

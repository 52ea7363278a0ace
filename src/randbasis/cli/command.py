"""One class for every command: what is missing is told at once, in the command's words, and a closed pipe is quiet."""

import os
import re
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import typer
from typer.core import TyperCommand

BROKEN_PIPE = 141
"""As a shell tells of a program that was ended by SIGPIPE."""

_SPELLED: ContextVar[Mapping[str, str]] = ContextVar("spelled")


class Command(TyperCommand):
    """A subcommand."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer does, but all that is missing is named and not the first alone."""
        given = [*args]
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            missing = self._missing(ctx, given) if type(error).__name__ == "MissingParameter" else {}
            if sum(map(len, missing.values())) < 2:
                raise
            told = (f"missing {kind}{'s' * (len(names) > 1)} {', '.join(names)}" for kind, names in missing.items())
            return ctx.fail("; ".join(told).capitalize() + ".")

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a reader that went away (``| head``) ends it without a word."""
        token = _SPELLED.set({one.name: one.opts[0] for one in self.params if one.opts[0].startswith("--")})
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError as error:
            # Python writes out what is left when it ends, and would tell of the broken pipe after all.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from error
        finally:
            _SPELLED.reset(token)
        return result

    def _missing(self, ctx: Any, args: list[str]) -> dict[str, list[str]]:
        """``"option"`` and ``"argument"`` → what is not given of them."""
        values = self.make_parser(ctx).parse_args(args=args)[0]
        missing: dict[str, list[str]] = {}
        for one in self.get_params(ctx):
            if one.required and one.value_is_missing(one.consume_value(ctx, values)[0]):
                missing.setdefault(one.param_type_name, []).append(one.opts[0])
        return missing


def in_command_words(message: str) -> str:
    """A message of the library with the options of the running command where it names parameters.

    A parameter of one word may be a word of the sentence too: it is an option where it begins the message, and behind
    "give".
    """
    spelled = _SPELLED.get({})
    long = {name: option for name, option in spelled.items() if "_" in name}
    message = _replaced(message, spelled, r"(?<![-\w])({})=(['\"]?)(?P<value>[\w.]+)\2(?!\w)", " {value}")
    message = _replaced(message, spelled, r"^({})(?= must | is | and | has |,? ['\d])")
    message = _replaced(message, spelled, r"(?<=\bgive )({})(?=[ ;,]|$)")
    return _replaced(message, long, r"(?<![-\w./'\"])({})(?![\w./'\"])")


def _replaced(message: str, spelled: Mapping[str, str], pattern: str, behind: str = "") -> str:
    if not spelled:
        return message
    names = "|".join(sorted(map(re.escape, spelled), key=len, reverse=True))
    return re.sub(
        pattern.replace("{}", names), lambda found: spelled[found[1]] + behind.format(**found.groupdict()), message
    )

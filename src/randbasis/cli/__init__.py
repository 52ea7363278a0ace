"""The command: one file a group of subcommands, each a few lines over the library.

Exit codes and streams: :mod:`randbasis.cli.console`; messages: :mod:`randbasis.cli.noise`.
"""

from typing import Annotated

import typer

from randbasis import __version__
from randbasis.cli import adapter, arithmetic, compare, serve, store, train, transfer, use
from randbasis.cli.command import Command
from randbasis.cli.console import EXIT_CODES
from randbasis.cli.noise import no_bars_in_a_pipe

app = typer.Typer(
    name="randbasis",
    help="Fine-tunes in kilobytes: an adapter is a seed and a few thousand coefficients.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # rich markup would drop the brackets of c_attn[q,v]
    epilog=EXIT_CODES,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},  # those of the subcommands, too
)
groups = (train, use, adapter, transfer, arithmetic, compare, store, serve)
for commands in (*(group.commands for group in groups), serve.keys):
    for command in commands.registered_commands:
        if not issubclass(command.cls or object, Command):
            command.cls = Command
    app.add_typer(commands)


def show_version(asked: bool) -> None:
    """Print the version and end, before a command is looked for."""
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def randbasis(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tunes in kilobytes: an adapter is a seed and a few thousand coefficients."""


def main() -> None:
    """Entry point of the command."""
    no_bars_in_a_pipe()
    app()

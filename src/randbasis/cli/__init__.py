"""The command: one file a group of subcommands, each a few lines over the library.

Exit codes: :mod:`randbasis.cli.console`.
"""

from typing import Annotated

import typer

from randbasis import __version__
from randbasis.cli import adapter, compare, store, train, transfer, use

app = typer.Typer(
    name="randbasis",
    help="Fine-tunes in kilobytes: an adapter is a seed and a few thousand coefficients.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # rich markup would drop the brackets of c_attn[q,v]
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},  # those of the subcommands, too
)
for group in (train, use, adapter, transfer, compare, store):
    app.add_typer(group.commands)


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
    app()

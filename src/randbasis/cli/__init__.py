"""The command: one file a group of subcommands, each a few lines over the library.

Exit codes: :mod:`randbasis.cli.console`.
"""

import typer

from randbasis.cli import adapter, compare, store, train, transfer, use

app = typer.Typer(
    name="randbasis",
    help="Fine-tunes in kilobytes: an adapter is a seed and a few thousand coefficients.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # rich markup would drop the brackets of c_attn[q,v]
    add_completion=False,
    pretty_exceptions_enable=False,
)
for group in (train, use, adapter, transfer, compare, store):
    app.add_typer(group.commands)


@app.callback()
def randbasis() -> None:
    """Fine-tunes in kilobytes: an adapter is a seed and a few thousand coefficients."""


def main() -> None:
    """Entry point of the command."""
    app()

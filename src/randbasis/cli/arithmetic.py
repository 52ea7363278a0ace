"""``randbasis diff`` and ``randbasis average``: how far apart adapters are, and weighted sums of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer import Argument, Option

from randbasis.cli.console import answer, answer_table, reported
from randbasis.cli.options import AVERAGE, DIFF, check_options
from randbasis.cli.parameters import AsJson, Overwrite
from randbasis.defaults import AVERAGED_HEADS
from randbasis.errors import WeightsError
from randbasis.progress import tracking

if TYPE_CHECKING:
    from randbasis.arithmetic import Difference
    from randbasis.arithmetic.difference import Apart

commands = typer.Typer(rich_markup_mode="markdown")

Base = Annotated[str | None, Option(help="Folder or hub name of the base, for adapters that do not tell their shapes.")]


@commands.command(epilog="Example: randbasis diff runs/a runs/b --json")
def diff(
    context: typer.Context,
    first: Annotated[
        str, Argument(help="Folder, packed file, URL, or store:NAME@VERSION; a LoRA, VeRA or RandLoRA of PEFT too.")
    ],
    second: Annotated[str, Argument(help="Another one for the same base.")],
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Compare two adapters: norm of the difference of ΔW and cosine, by layer and in all.

    Methods and seeds may differ. Coefficients are compared too where both have one basis.
    """
    with reported(as_json):
        from randbasis.arithmetic import difference

        check_options(context, DIFF)
        found = difference(first, second, model=base, track=tracking("layers"))
        answer_table(found.as_json(), _difference_table(found), as_json)


@commands.command(epilog="Example: randbasis average runs/a runs/b --weights 0.5,0.5 --output runs/mean")
def average(
    context: typer.Context,
    adapters: Annotated[
        list[str], Argument(help="Adapters of one basis: folders, packed files, URLs, store:NAME@VERSION.")
    ],
    output: Annotated[Path, Option(help="Folder to write; a packed file if it ends in .safetensors.")],
    weights: Annotated[str | None, Option(help="One for each: 0.5,0.5, or 1,-1; by default the mean.")] = None,
    heads: Annotated[str, Option(help="average or first: what becomes of heads.")] = AVERAGED_HEADS,
    base_name: Annotated[str | None, Option(help="Name of the base, where the adapters name it otherwise.")] = None,
    base: Base = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Add the coefficients of adapters of one method, seed and shape, each times its weight.

    For nola, vera and randlora the ΔW of the sum is not the sum of the ΔW; how far it is from it is told.
    """
    with reported(as_json):
        from randbasis.adapters.saved import open_adapter
        from randbasis.arithmetic import average_adapters
        from randbasis.arithmetic.average import HEADS

        def with_heads() -> bool:  # a word that is none of these is refused elsewhere
            return heads not in HEADS or any(open_adapter(one).head for one in adapters)

        check_options(context, AVERAGE, with_heads=with_heads)
        shares = None if weights is None else _numbers(weights)
        options: dict[str, Any] = {"weights": shares, "heads": heads, "base_name": base_name, "model": base}
        done = average_adapters(adapters, output, **options, overwrite=overwrite, track=tracking("layers"))
        answer(done.as_json(), as_json)


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise WeightsError(
            f"weights must be numbers with commas between them, got {text!r}; write for example 0.5,0.5"
        ) from error


def _difference_table(found: "Difference") -> Table:
    table = Table(title=f"{found.methods[0]} and {found.methods[1]}", caption=_caption(found), min_width=60)
    table.add_column("layer")
    for name in ("‖ΔW₁‖", "‖ΔW₂‖", "‖ΔW₁ − ΔW₂‖", "relative", "cosine"):
        table.add_column(name, justify="right")
    for one in found.layers:
        table.add_row(one.name, *_shown(one.change))
    for name, size in found.only_first.items():
        table.add_row(name, f"{size:.4g}", "not adapted", f"{size:.4g}", "", "")
    for name, size in found.only_second.items():
        table.add_row(name, "not adapted", f"{size:.4g}", f"{size:.4g}", "", "")
    table.add_section()
    table.add_row("all", *_shown(found.total))
    if found.coefficients is not None:
        table.add_row("coefficients", *_shown(found.coefficients))
    return table


def _shown(apart: "Apart") -> list[str]:
    numbers = (apart.first, apart.second, apart.distance, apart.relative, apart.cosine)
    return ["" if number is None else f"{number:.4g}" for number in numbers]


def _caption(found: "Difference") -> str | None:
    return None if found.other_basis is None else f"coefficients are not compared: {found.other_basis}"

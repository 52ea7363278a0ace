"""``randbasis quantize``: a few lines over :mod:`randbasis.adapters.quantization`."""

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from typer import Argument, Option

from randbasis.cli.console import AsJson, Overwrite, answer_table, reported
from randbasis.cli.options import QUANTIZE, check_options

if TYPE_CHECKING:
    from randbasis.adapters.quantization import Quantization


def quantize(
    context: typer.Context,
    adapter: Annotated[str, Argument(help="Folder, packed file, URL, or store:NAME@VERSION.")],
    output: Annotated[
        str | None, Argument(help="NAME.safetensors for a packed file, any other name for an adapter folder.")
    ] = None,
    bits: Annotated[int, Option(help="Of a coefficient: 16, 8, 4, 3, 2.")] = 4,
    group_size: Annotated[int, Option(help="Coefficients that share a scale; 0 for one scale a vector.")] = 0,
    model: Annotated[str | None, Option(help="Folder or hub name of the base; only its config.json is read.")] = None,
    base_name: Annotated[str | None, Option(help="Name of the base to write; by default the adapter's.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Round the coefficients of a trained adapter to few bits, without data; tell what each precision costs and loses.

    Without an output nothing is written.
    """
    with reported(as_json):
        from randbasis.adapters.quantization import quantize_adapter

        check_options(context, QUANTIZE)
        progress = partial(track, description="matrices", console=Console(stderr=True), transient=True)
        done = quantize_adapter(
            adapter,
            output,
            bits=bits,
            group=group_size,
            model=model,
            base_name=base_name,
            overwrite=overwrite,
            track=progress,
        )
        answer_table(done.as_json(), _table(done), as_json)


def _table(done: "Quantization") -> Table:
    table = Table(
        title=f"{done.coefficients:,} coefficients of {done.matrices} matrices, "
        + (f"{done.group} share a scale" if done.group else "one scale a vector"),
        caption=f"wrote {done.output} at {done.bits} bits" if done.output else "nothing written: no output was named",
    )
    for column in ("bits", "file, bytes", "largest error", "relative error", "relative error of ΔW"):
        table.add_column(column, justify="right")
    table.add_row("unquantized", f"{done.exact_bytes:,}", "", "", "")
    for one in done.precisions:
        errors = (one.largest_error, one.relative_error, one.delta_error)
        style = "bold" if one.bits == done.bits and done.output else None
        table.add_row(str(one.bits), f"{one.bytes:,}", *(f"{error:.3g}" for error in errors), style=style)
    return table

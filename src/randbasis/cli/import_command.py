"""``randbasis import``: an adapter of PEFT's own methods as one of ours, as a LoRA, or merged into its base."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from typer import Argument, Option

from randbasis.cli.console import AsJson, Overwrite, answer, answer_table, reported
from randbasis.cli.options import IMPORT, check_options
from randbasis.errors import ImportOptionError, near

if TYPE_CHECKING:
    from randbasis.export import LoraExport
    from randbasis.importing import ImportedAdapter

KINDS = ("nola", "vera", "peft-lora", "merged")
_HYPERPARAMETERS = ("rank", "basis", "basis_b", "alpha", "parametrization", "unique_basis", "seed", "law")


def import_(
    context: typer.Context,
    source: Annotated[Path, Argument(help="Folder of a LoRA, VeRA or RandLoRA of PEFT.")],
    output: Annotated[Path, Argument(help="Folder to write.")],
    to: Annotated[str, Option(help="nola, vera, peft-lora or merged.")],
    base: Annotated[str | None, Option(help="Folder or hub name of the base; by default the one it names.")] = None,
    rank: Annotated[int | None, Option(help="Rank; with peft-lora the largest, which randlora needs.")] = None,
    basis: Annotated[int | None, Option(help="Basis matrices (nola).")] = None,
    basis_b: Annotated[int | None, Option(help="Basis matrices of B, where another number than of A (nola).")] = None,
    alpha: Annotated[float | None, Option(help="Scale (nola).")] = None,
    parametrization: Annotated[str | None, Option(help="offset or plain (nola).")] = None,
    unique_basis: Annotated[bool, Option(help="A basis of its own for each layer (nola).")] = False,
    seed: Annotated[int, Option(help="Seed of the basis (nola, vera).")] = 0,
    law: Annotated[str | None, Option(help="Law of the basis: sign, uniform, normal, sparse(S) (nola, vera).")] = None,
    limit: Annotated[float | None, Option(help="Write nothing above this ‖ΔW − ΔŴ‖ / ‖ΔW‖, such as 0.5.")] = None,
    dtype: Annotated[
        str, Option(help="With merged: auto (as the base is stored), float32, bfloat16, float16.")
    ] = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Bring an adapter of PEFT over: the nearest nola or vera of a seed, a LoRA, or a merged model.

    The nearest nola or vera is found by least squares, and what is left is told: of a LoRA that was trained on its own,
    nearly all. VeRA and RandLoRA must carry their random matrices.
    """
    given: dict[str, Any] = dict(locals())
    with reported(as_json):
        if to not in KINDS:
            raise ImportOptionError(f"to must be one of {', '.join(KINDS)}, got {to!r}; {near(to, KINDS)}")
        check_options(context, IMPORT, kinds=KINDS)
        progress: Any = partial(track, description="layers", console=Console(stderr=True), transient=True)
        common: dict[str, Any] = {"model": base, "overwrite": overwrite, "track": progress}
        if to == "merged":
            from randbasis.importing import import_as_merged

            answer(import_as_merged(source, output, dtype=dtype, **common).as_json(), as_json)
        elif to == "peft-lora":
            from randbasis.importing import import_as_lora

            pairs = import_as_lora(source, output, rank=rank, limit=limit, **common)
            answer_table(pairs.as_json(), _pairs_table(pairs), as_json)
        else:
            from randbasis.importing import import_as_nearest
            from randbasis.train.adapter import peft_config
            from randbasis.train.settings import AdapterSettings

            options = {option: given[option] for option in _HYPERPARAMETERS}
            config: Any = peft_config(AdapterSettings(to, targets=(), **options), task_type=None, head=[])
            found = import_as_nearest(source, output, config, limit=limit, **common)
            answer_table(found.as_json(), _nearest_table(found), as_json)


def _nearest_table(found: "ImportedAdapter") -> Table:
    table = _table(
        f"{found.source} → {found.method}: {found.parameters:,} numbers → {found.coefficients:,}",
        f"‖ΔW − ΔŴ‖ / ‖ΔW‖: all {found.residual:.4g}, mean {found.mean:.4g}, "
        f"worst {found.worst.residual:.4g} ({found.worst.name}){_warning(found.residual)}",
        ("out × in", "‖ΔW‖", "residual"),
    )
    for one in found.matrices:
        table.add_row(one.name, f"{one.out_features} × {one.in_features}", f"{one.norm:.4g}", f"{one.residual:.4g}")
    return table


def _pairs_table(found: "LoraExport") -> Table:
    worst = f"worst {found.worst.error:.4g} ({found.worst.name})"
    table = _table(
        f"{found.method} → LoRA", f"relative error: all {found.error:.4g}, {worst}", ("rank", "‖ΔW‖", "error")
    )
    for pair in found.pairs:
        table.add_row(pair.name, str(pair.rank), f"{pair.norm:.4g}", f"{pair.error:.4g}")
    return table


def _table(title: str, caption: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, caption=caption, min_width=60)
    table.add_column("matrix")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _warning(residual: float) -> str:
    return "\nthis is another adapter than the one that was read: most of its ΔW is gone" if residual > 0.5 else ""

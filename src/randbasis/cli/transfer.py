"""Adapters that leave and come: ``randbasis export``, ``merge``, ``import`` and ``push``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer import Argument, Option

from randbasis.cli.config import run_of
from randbasis.cli.console import answer, answer_table, reported
from randbasis.cli.options import EXPORT, IMPORT, PUSH, check_options
from randbasis.cli.parameters import AsJson, Base, Overwrite, Stored
from randbasis.defaults import MERGED_DTYPE, REFINE_STEPS
from randbasis.errors import ExportOptionError, ImportOptionError, not_one_of
from randbasis.progress import tracking
from randbasis.train.settings import AdapterSettings

if TYPE_CHECKING:
    from randbasis.export import LoraExport
    from randbasis.importing import ImportedAdapter

EXPORTS = ("peft-lora", "merged", "gguf-lora")
IMPORTS = ("nola", "vera", "pranc", "peft-lora", "merged")
_HYPERPARAMETERS = ("rank", "basis", "basis_b", "alpha", "parametrization", "unique_basis", "seed", "law")

commands = typer.Typer(rich_markup_mode="markdown")


@commands.command(epilog="Example: randbasis export runs/e2e lora --to peft-lora")
def export(
    context: typer.Context,
    source: Annotated[str, Argument(help="Adapter: folder, packed file, URL, or store:NAME@VERSION.")],
    output: Annotated[Path, Argument(help="Folder to write; with gguf-lora, file.")],
    to: Annotated[str, Option(help="peft-lora, merged or gguf-lora.")],
    base: Base = None,
    rank: Annotated[int | None, Option(help="Largest rank of a LoRA; randlora and pranc need one.")] = None,
    dtype: Annotated[
        str, Option(help="float32, bfloat16, float16; auto is float32, or as the base is stored with merged.")
    ] = MERGED_DTYPE,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter as a LoRA of plain PEFT, as a merged model, or as a LoRA of llama.cpp.

    A LoRA is exact for nola and vera. For randlora and pranc it is the nearest of a rank, and the relative error of ΔW
    is told.
    """
    with reported(as_json):
        if to not in EXPORTS:
            raise ExportOptionError(not_one_of("to", to, EXPORTS))
        check_options(context, EXPORT, kinds=EXPORTS)
        if to == "merged":
            answer(_merged(source, output, base, dtype, overwrite=overwrite), as_json)
            return
        from randbasis.export import export_gguf_lora, export_peft_lora

        run = export_peft_lora if to == "peft-lora" else export_gguf_lora
        progress = tracking("layers")
        chosen = "float32" if dtype == "auto" else dtype
        done = run(source, output, base=base, rank=rank, dtype=chosen, overwrite=overwrite, track=progress)
        answer(done.as_json() if as_json else _summary(done), as_json)


@commands.command(epilog="Example: randbasis merge --adapter runs/e2e --output merged --dtype bfloat16")
def merge(
    adapter: Annotated[str, Option(help="Folder, packed file, URL, or store:NAME@VERSION.")],
    output: Annotated[Path, Option(help="Folder for the model and its tokenizer.")],
    model: Base = None,
    dtype: Annotated[str, Option(help="auto (as the base is stored), float32, bfloat16, float16.")] = MERGED_DTYPE,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Add an adapter to the weights of its base: `export --to merged`, for short."""
    with reported(as_json):
        answer(_merged(adapter, output, model, dtype, overwrite=overwrite), as_json)


@commands.command("import", epilog="Example: randbasis import LORA runs/nola --to nola --rank 8 --basis 128")
def import_(
    context: typer.Context,
    source: Annotated[Path, Argument(help="Folder of a LoRA, VeRA or RandLoRA of PEFT.")],
    output: Annotated[Path, Argument(help="Folder to write.")],
    to: Annotated[str, Option(help="nola, vera, pranc, peft-lora or merged.")],
    base: Base = None,
    rank: Annotated[int | None, Option(help="Rank; with peft-lora the largest, which randlora needs.")] = None,
    basis: Annotated[int | None, Option(help="Basis matrices (nola, pranc).")] = None,
    basis_b: Annotated[int | None, Option(help="Basis matrices of B, where another number than of A (nola).")] = None,
    alpha: Annotated[float | None, Option(help="Scale (nola).")] = None,
    parametrization: Annotated[str | None, Option(help="offset or plain (nola).")] = None,
    unique_basis: Annotated[bool, Option(help="A basis of its own for each layer (nola, pranc).")] = False,
    seed: Annotated[int, Option(help="Seed of the basis (nola, vera, pranc).")] = AdapterSettings.seed,
    law: Annotated[
        str | None,
        Option(help="Law of the basis: sign, uniform, normal, sparse(S) (nola, vera, pranc), hashed (nola, pranc)."),
    ] = None,
    limit: Annotated[float | None, Option(help="Write nothing above this ‖ΔW − ΔŴ‖ / ‖ΔW‖, such as 0.5.")] = None,
    dtype: Annotated[
        str, Option(help="With merged: auto (as the base is stored), float32, bfloat16, float16.")
    ] = MERGED_DTYPE,
    refine: Annotated[
        Path | None,
        Option(
            help="Train the nearest adapter on: file of a run, as for train --config, or folder of a run, such as the "
            "source's own; its rows and loop."
        ),
    ] = None,
    refine_steps: Annotated[int, Option(help="Steps of that training.")] = REFINE_STEPS,
    overwrite: Overwrite = False,
    quiet: Annotated[bool, Option(help="No progress of --refine.")] = False,
    as_json: AsJson = False,
) -> None:
    """Bring an adapter of PEFT over: the nearest nola, vera or pranc of a seed, a LoRA, or a merged model.

    The nearest nola, vera or pranc is found by least squares, and what is left is told: of a LoRA that was trained on
    its own, nearly all. --refine trains it further, with the head that the source has. VeRA and RandLoRA must carry
    their random matrices.
    """
    given: dict[str, Any] = dict(locals())
    with reported(as_json):
        if to not in IMPORTS:
            raise ImportOptionError(not_one_of("to", to, IMPORTS))
        check_options(context, IMPORT, kinds=IMPORTS)
        if refine is not None:
            adapter = AdapterSettings(to, **{option: given[option] for option in _HYPERPARAMETERS})
            answer(_refined(context, given, adapter), as_json)
            return
        progress = tracking("layers")
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
            from randbasis.train.method_table import peft_config

            options = {option: given[option] for option in _HYPERPARAMETERS}
            config: Any = peft_config(AdapterSettings(to, targets=(), **options), task_type=None, head=[])
            found = import_as_nearest(source, output, config, limit=limit, **common)
            answer_table(found.as_json(), _nearest_table(found), as_json)


@commands.command(epilog="Example: randbasis push runs/e2e me/e2e-nola --license apache-2.0 --dry-run folder")
def push(
    context: typer.Context,
    adapter: Stored,
    repo_id: Annotated[str, typer.Argument(help="Repository on the hub, such as me/e2e-nola.")],
    base_name: Annotated[str | None, Option(help="Hub name of the base; by default the adapter's.")] = None,
    license: Annotated[str | None, Option(help="Of the adapter, as the hub names it, such as apache-2.0.")] = None,
    packed: Annotated[int | None, Option(help="Add a packed file of 32, 16, 8, 4, 3 or 2 bits a coefficient.")] = None,
    private: Annotated[bool | None, Option(help="Of a repository that is made.", show_default=False)] = None,
    revision: Annotated[str | None, Option(help="Branch; by default the main one.")] = None,
    message: Annotated[str | None, Option(help="Of the commit.")] = None,
    dry_run: Annotated[Path | None, Option(help="Folder to write instead of sending it; prints the card.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Send an adapter to the hub, with a model card that is filled in. The token is HF_TOKEN's or `hf auth login`'s."""
    with reported(as_json):
        from randbasis.hub import build_hub_folder, has_own_card, push_to_hub

        check_options(context, PUSH, own_card=lambda: has_own_card(adapter))
        given = {"base_name": base_name, "license": license}
        if dry_run is None:
            sent = push_to_hub(
                adapter, repo_id, **given, packed_bits=packed, private=private, revision=revision, message=message
            )
            answer(sent.as_json(), as_json)
            return
        built = build_hub_folder(adapter, dry_run, repo_id, **given, packed_bits=packed, overwrite=overwrite)
        answer(built.as_json() | ({"card": built.card} if as_json else {}), as_json)
        if not as_json:
            typer.echo(f"\n{built.card}")


def _refined(context: typer.Context, given: dict[str, Any], adapter: AdapterSettings) -> dict[str, Any]:
    """Losses (and other metrics) of the source, of its projection, and after training."""
    from rich.console import Console

    from randbasis.train.projection import refinement
    from randbasis.train.run import train

    run = run_of(context, given["refine"], given["output"], given["base"])
    settings = refinement(
        run, given["source"], adapter, given["output"], steps=given["refine_steps"], overwrite=given["overwrite"]
    )
    told = train(settings, console=None if given["quiet"] else Console(stderr=True)).summary
    return {
        "output": str(given["output"]),
        **{name: told["projection"][name] for name in ("source", "source_parameters", "residual")},
        **{name: told[name] for name in ("method", "coefficients", "steps")},
        "source_scores": told["projection"].get("before", {}),
        "projected_scores": told["before"],
        "refined_scores": told["after"],
        "chosen": told["chosen"],
        "seconds": told["seconds"],
    }


def _merged(source: str, output: Path, base: str | None, dtype: str, *, overwrite: bool) -> dict[str, Any]:
    from randbasis.export import export_merged

    return export_merged(source, output, base=base, dtype=dtype, overwrite=overwrite).as_json()


def _summary(done: "LoraExport") -> dict[str, Any]:
    """Without the rows of the layers."""
    document = done.as_json()
    del document["rows"]
    return document | {
        "ranks": ", ".join(map(str, document["ranks"])),
        "relative_error": f"{done.error:.3e}",
        "worst_relative_error": f"{done.worst.error:.3e}",
    }


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

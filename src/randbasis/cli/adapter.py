"""One adapter at rest: ``randbasis plan``, ``inspect``, ``pack``, ``unpack``, ``verify`` and ``quantize``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.table import Table
from typer import Argument, Option

from randbasis.cli.console import answer, answer_table, reported
from randbasis.cli.options import BUDGET, INSPECT, PACK, PLAN, QUANTIZE, check_options
from randbasis.cli.parameters import (
    TARGETS,
    AsJson,
    Group,
    Matrices,
    MatricesOfB,
    Overwrite,
    Rank,
    Shapes,
    Stored,
    Targets,
    Tie,
    UniqueBasis,
    WrittenName,
)
from randbasis.defaults import ONE_SCALE, PACKED_BITS, QUANTIZED_BITS
from randbasis.errors import OptionError
from randbasis.files.output_checks import check_output_file
from randbasis.progress import tracking
from randbasis.train.settings import AdapterSettings, check_task, named_targets

if TYPE_CHECKING:
    from randbasis.adapters.quantization import Quantization

commands = typer.Typer(rich_markup_mode="markdown")


@commands.command(
    epilog="Example: randbasis plan MODEL --method nola --basis 64 --targets query,value, or: randbasis plan MODEL "
    "--budget 16KB --write adapter.yaml. MODEL may be a folder with nothing but a config.json."
)
def plan(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub name of the base; only its config.json is read.")
    ] = None,
    base: Annotated[str | None, Option("--model", help="The same, as an option.")] = None,
    method: Annotated[str, Option(help="nola, vera, randlora, pranc, loraxs; or lora.")] = AdapterSettings.method,
    rank: Rank = None,
    basis: Matrices = None,
    basis_b: MatricesOfB = None,
    unique_basis: UniqueBasis = False,
    tie: Tie = AdapterSettings.tie,
    targets: Targets = TARGETS,
    task: Annotated[str | None, Option(help="Count the sizes that train takes for this task.")] = None,
    budget: Annotated[
        str | None,
        Option(help="Bytes of a packed file, such as 512, 16KB or 16KiB: list what fits, of each method and law."),
    ] = None,
    write: Annotated[
        Path | None, Option(help="With --budget, file for `train --config`: the one that --pick names.")
    ] = None,
    pick: Annotated[
        int | None, Option(min=1, help="With --write, its number in the list; by default the first.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Count what an adapter would have, and its bytes, from a configuration alone; or list what fits into a budget."""
    with reported(as_json):
        model = _one_model(model, base)
        check_options(context, BUDGET)
        if budget is not None:
            _plan_budget(model, budget, named_targets(targets), (write, pick or 1, overwrite), as_json)
            return
        from randbasis.adapters.plan import plan as run
        from randbasis.cli.report import plan_table
        from randbasis.train.default_choices import choose, filled_adapter
        from randbasis.train.method_table import method_words, peft_config

        check_options(context, PLAN, methods=method_words())
        names = named_targets(targets)
        settings = AdapterSettings(method, rank, basis, basis_b, unique_basis=unique_basis, tie=tie, targets=names)
        if task is not None:
            check_task(task)
            settings, _ = filled_adapter(settings, choose(method, task, None))
        planned = run(model, peft_config(settings, task_type="CAUSAL_LM", head=[]))
        answer_table(planned.as_json(), plan_table(planned), as_json)


def _one_model(argument: str | None, option: str | None) -> str:
    if (argument is None) == (option is None):
        raise OptionError("give the base model once: randbasis plan MODEL, or --model MODEL")
    return cast("str", argument or option)


def _plan_budget(
    model: str, budget: str, targets: tuple[str, ...], written: tuple[Path | None, int, bool], as_json: bool
) -> None:
    from randbasis.adapters.budget import byte_count, config_lines, configurations
    from randbasis.cli.report import budget_table
    from randbasis.files.whole_file import write as write_file
    from randbasis.train.method_table import target_modules

    write, pick, overwrite = written
    if write is not None:
        check_output_file(write, (model,), overwrite=overwrite)
    found = configurations(model, byte_count(budget), target_modules(targets))
    if write is not None:
        if pick > len(found):
            raise OptionError(f"--pick must be one of the {len(found)} configurations that fit, got {pick}")
        write_file(write, config_lines(found[pick - 1], model, targets).encode(), overwrite=overwrite)
    document = {
        "model": model,
        "budget": byte_count(budget),
        "configurations": [one.as_json() for one in found],
        "written": None if write is None else str(write),
    }
    answer_table(document, budget_table(found, byte_count(budget), write), as_json)


@commands.command(epilog="Example: randbasis inspect runs/sst2 --plot spectra.png")
def inspect(
    context: typer.Context,
    adapter: Stored,
    model: Shapes = None,
    plot: Annotated[Path | None, Option(help="PNG of norms and spectra to write.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Tell method, seed and counts of an adapter, and norm and spectrum of each change of a weight."""
    with reported(as_json):
        from randbasis.adapters.inspection import inspect_adapter
        from randbasis.adapters.saved import paths_of
        from randbasis.cli.report import inspection_table, plot_inspection

        check_options(context, INSPECT)
        if plot is not None:
            check_output_file(plot, (*paths_of(adapter), model), overwrite=overwrite)
        progress = tracking("matrices")
        found = inspect_adapter(adapter, model, track=progress)
        if plot is not None:
            plot_inspection(found, plot, overwrite=overwrite)
        answer_table(found.as_json(), inspection_table(found), as_json)


@commands.command(epilog="Example: randbasis pack runs/e2e e2e.safetensors --bits 4")
def pack(
    context: typer.Context,
    adapter: Stored,
    file: Annotated[str, typer.Argument(help="File to write; or a URL: s3://, hf://, ….")],
    bits: Annotated[int, Option(help="Of a coefficient: 32 (as it is), 16, 8, 4, 3, 2.")] = PACKED_BITS,
    group: Group = ONE_SCALE,
    bfloat16: Annotated[bool, Option(help="With 16 bits, bfloat16 instead of float16.")] = False,
    model: Shapes = None,
    base_name: WrittenName = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter as one file: a seed, a spec and the coefficients."""
    given = {"bits": bits, "group": group, "bfloat16": bfloat16, "model": model, "base_name": base_name}
    with reported(as_json):
        from randbasis.adapters.packed import pack_adapter

        check_options(context, PACK)
        answer(pack_adapter(adapter, file, **cast(Any, given), overwrite=overwrite).as_json(), as_json)


@commands.command(epilog="Example: randbasis unpack e2e.safetensors runs/again")
def unpack(
    file: Annotated[str, typer.Argument(help="Packed file, its URL, or store:NAME@VERSION.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    base_name: Annotated[str | None, Option(help="Folder or hub name of the base; by default the file's.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a packed adapter as a folder, which PEFT loads, with its task beside it."""
    with reported(as_json):
        from randbasis.adapters.packed import unpack_adapter

        adapter = unpack_adapter(file, output, base_name=base_name, overwrite=overwrite)
        answer({"output": str(output), "coefficients": adapter.spec.count, "bits": adapter.spec.bits}, as_json)


@commands.command(epilog="Example: randbasis verify e2e.safetensors --json")
def verify(
    file: Annotated[str, typer.Argument(help="Packed file, or its URL.")],
    as_json: AsJson = False,
) -> None:
    """Check every rule and digest of a packed file, and tell what it holds."""
    with reported(as_json):
        from randbasis.adapter_file import verify as run

        answer(run(file).as_json(), as_json)


@commands.command(epilog="Example: randbasis quantize runs/e2e e2e-4.safetensors --bits 4")
def quantize(
    context: typer.Context,
    adapter: Stored,
    output: Annotated[
        str | None, Argument(help="NAME.safetensors for a packed file, any other name for an adapter folder.")
    ] = None,
    bits: Annotated[int, Option(help="Of a coefficient: 16, 8, 4, 3, 2.")] = QUANTIZED_BITS,
    group: Group = ONE_SCALE,
    model: Shapes = None,
    base_name: WrittenName = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Round the coefficients of a trained adapter to few bits, without data; tell what each precision costs and loses.

    Without an output nothing is written.
    """
    with reported(as_json):
        from randbasis.adapters.quantization import quantize_adapter

        check_options(context, QUANTIZE)
        progress = tracking("matrices")
        done = quantize_adapter(
            adapter,
            output,
            bits=bits,
            group=group,
            model=model,
            base_name=base_name,
            overwrite=overwrite,
            track=progress,
        )
        answer_table(done.as_json(), _precisions_table(done), as_json)


def _precisions_table(done: "Quantization") -> Table:
    caption = f"wrote {done.output} at {done.bits} bits" if done.output else "nothing written: no output was named"
    if done.needs_base:
        caption += "\nΔW is made of the base model's weights too: its error shows once the adapter is put on them"
    table = Table(
        title=f"{done.coefficients:,} coefficients of {done.matrices} matrices, "
        + (f"{done.group} share a scale" if done.group else "one scale a vector"),
        caption=caption,
    )
    for column in ("bits", "packed, bytes", "largest error", "relative error", "relative error of ΔW"):
        table.add_column(column, justify="right")
    table.add_row("unquantized", f"{done.exact_bytes:,}", "", "", "")
    for one in done.precisions:
        errors = (one.largest_error, one.relative_error, one.delta_error)
        style = "bold" if one.bits == done.bits and done.output else None
        table.add_row(
            str(one.bits),
            f"{one.bytes:,}",
            *("—" if error is None else f"{error:.3g}" for error in errors),
            style=style,
        )
    return table

"""``randbasis export``: an adapter in a form that runs without this package."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from typer import Argument, Option

from randbasis.cli.console import AsJson, Overwrite, answer, reported
from randbasis.cli.options import EXPORT, check_options
from randbasis.errors import ExportOptionError, near

if TYPE_CHECKING:
    from randbasis.export import LoraExport

KINDS = ("peft-lora", "merged", "gguf-lora")


def export(
    context: typer.Context,
    source: Annotated[str, Argument(help="Adapter: folder, packed file, URL, or store:NAME@VERSION.")],
    output: Annotated[Path, Argument(help="Folder to write; with gguf-lora, file.")],
    to: Annotated[str, Option(help="peft-lora, merged or gguf-lora.")],
    base: Annotated[str | None, Option(help="Folder or hub name of the base; by default the one it names.")] = None,
    rank: Annotated[int | None, Option(help="Largest rank of a LoRA; randlora and pranc need one.")] = None,
    dtype: Annotated[
        str, Option(help="float32, bfloat16, float16; auto is float32, or as the base is stored with merged.")
    ] = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter as a LoRA of plain PEFT, as a merged model, or as a LoRA of llama.cpp.

    A LoRA is exact for nola and vera. For randlora and pranc it is the nearest of a rank, and the relative error of ΔW
    is told.
    """
    with reported(as_json):
        if to not in KINDS:
            raise ExportOptionError(f"to must be one of {', '.join(KINDS)}, got {to!r}; {near(to, KINDS)}")
        check_options(context, EXPORT, kinds=KINDS)
        if to == "merged":
            answer(_merged(source, output, base, dtype, overwrite=overwrite), as_json)
            return
        from randbasis.export import export_gguf_lora, export_peft_lora

        run = export_peft_lora if to == "peft-lora" else export_gguf_lora
        progress: Any = partial(track, description="layers", console=Console(stderr=True), transient=True)
        chosen = "float32" if dtype == "auto" else dtype
        done = run(source, output, base=base, rank=rank, dtype=chosen, overwrite=overwrite, track=progress)
        answer(done.as_json() if as_json else _summary(done), as_json)


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

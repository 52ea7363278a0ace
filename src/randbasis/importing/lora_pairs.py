"""FOREIGN ADAPTER → LoRA: a LoRA directory of plain PEFT from VeRA or RandLoRA, or a LoRA of lower rank."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

from randbasis.errors import ExportRankError
from randbasis.export.pairs import LoraPair, total_error, truncated
from randbasis.export.peft_lora import LoraExport, lora_tensors, rank_pattern
from randbasis.files.output_checks import check_output_folder
from randbasis.files.output_set import replaced_set
from randbasis.importing.nearest_adapter import check_limit, finite_factors, target_words
from randbasis.importing.peft_adapter import PeftAdapter, read_peft_adapter
from randbasis.low_rank import distance, norm
from randbasis.methods import Factors
from randbasis.methods.method import check_positive
from randbasis.progress import Track
from randbasis.tuner.saved_files import WEIGHTS_FILE


def import_as_lora(
    source: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    model: str | None = None,
    limit: float | None = None,
    overwrite: bool = False,
    track: Track = iter,
) -> LoraExport:
    """Write a VeRA, RandLoRA or LoRA of PEFT as a LoRA directory of PEFT, in float32; alpha is the rank.

    VeRA is exact at its own rank. RandLoRA needs a ``rank``: its ΔW has full rank, the nearest pair is the truncated
    singular value decomposition (Eckart and Young, 1936), and the relative error is told.

    Args:
        source: directory of PEFT.
        output: directory to write.
        rank: largest rank of a pair; None keeps the source's, which only low-rank methods have.
        model: folder or hub name of the base; see :func:`randbasis.importing.read_peft_adapter`.
        limit: largest relative error of all matrices together; nothing is written above it.
        overwrite: replace the output.
        track: shows the progress over the matrices.

    Raises:
        ExportRankError: RandLoRA without a rank.
        RankError: the rank is not a positive integer.
        ResidualError: the relative error is above the limit.
        OutputExistsError: the output exists, or is the source.
        SaveError: it could not be written.
        RandbasisError: what :func:`randbasis.importing.read_peft_adapter` refuses.
    """
    folder = check_output_folder(output, (source, model), overwrite=overwrite)
    found = read_peft_adapter(source, model)
    if rank is not None:
        check_positive("rank", rank)
    elif found.full_rank:
        raise ExportRankError(
            f"rank must be given for {found.kind}, whose ΔW has full rank, got none: a LoRA of lower rank is only the "
            "nearest one; say rank=16, for example, and read the relative error"
        )
    with torch.no_grad():
        pairs = tuple(_pair(found, key, rank) for key in track(found.layers))
    check_limit(total_error(pairs), limit, f"the nearest LoRA of rank {rank}")
    config = _config(found, pairs, model)
    tensors = found.load(found.head) | lora_tensors((pair.name, pair) for pair in pairs)
    with replaced_set(folder) as stage:
        save_file(tensors, stage / WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(stage))
        size = sum(file.stat().st_size for file in stage.iterdir())
    head = "saved" if found.head else "none"
    return LoraExport(folder, found.kind, config.base_model_name_or_path, pairs, "float32", head, size)


def _pair(found: PeftAdapter, key: str, rank: int | None) -> LoraPair:
    change = finite_factors(found, key)
    chosen = change if rank is None or rank >= change.down.shape[0] else truncated(change, rank)
    assert chosen.up is not None
    up, down = chosen.up.float().contiguous(), chosen.down.float().contiguous()
    return LoraPair(key, up, down, norm(change), distance(change, Factors(up.double(), down.double())))


def _config(found: PeftAdapter, pairs: tuple[LoraPair, ...], model: str | None) -> LoraConfig:
    ranks = {pair.name: pair.rank for pair in pairs}
    common = Counter(ranks.values()).most_common(1)[0][0]
    patterns = rank_pattern(ranks, common)
    options: dict[str, Any] = {
        **target_words(found),
        "modules_to_save": found.options.get("modules_to_save"),
        "task_type": found.options.get("task_type"),
        "fan_in_fan_out": bool(found.options.get("fan_in_fan_out")),
        "base_model_name_or_path": model or found.options.get("base_model_name_or_path"),
    }
    return LoraConfig(
        r=common, lora_alpha=common, rank_pattern=patterns, alpha_pattern=dict(patterns), inference_mode=True, **options
    )

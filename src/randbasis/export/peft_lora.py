"""PAIRS → PEFT: a LoRA directory that plain PEFT loads, without this package."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists  # pyright: ignore[reportUnknownVariableType]
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from randbasis.adapters.base_fit import BaseFit
from randbasis.adapters.base_model import meta_model
from randbasis.adapters.merging import DTYPES, save_head, with_answers
from randbasis.adapters.saved import AdapterLocation, paths_of, write_task
from randbasis.errors import HyperparameterError, not_one_of
from randbasis.export.pairs import LoraPair, lora_pairs, total_error
from randbasis.export.source import Source, open_source
from randbasis.files.output_checks import check_output_folder
from randbasis.files.output_set import replaced_set
from randbasis.progress import Track
from randbasis.tuner.saved_files import BASE_CONFIG, SAVED_PREFIX, WEIGHTS_FILE, anchored

CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
"""``model_type`` of the bases whose linear layers are ``Conv1D``, with a weight of ``[in, out]``."""
_BIASES = {"none": "none", "all": "all", "randbasis_only": "lora_only"}


@dataclass(frozen=True)
class LoraExport:
    """What was written.

    Attributes:
        output: the folder, or the file.
        method: that the adapter was trained with.
        base_model: folder or hub name that the export names.
        pairs: one for each layer, as they were stored.
        dtype: of the factors.
        head: ``"none"``, ``"saved"`` with the adapter, or ``"apart"`` where it lies in ``head.safetensors``.
        bytes: size of all files.
    """

    output: Path
    method: str
    base_model: str | None
    pairs: tuple[LoraPair, ...]
    dtype: str
    head: str
    bytes: int

    @property
    def error(self) -> float:
        """Relative error of all ΔW together."""
        return total_error(self.pairs)

    @property
    def worst(self) -> LoraPair:
        """The layer with the largest relative error."""
        return max(self.pairs, key=lambda pair: pair.error)

    def as_json(self) -> dict[str, Any]:
        """Plain values, one row a layer."""
        return {
            "output": str(self.output),
            "method": self.method,
            "base_model": self.base_model,
            "layers": len(self.pairs),
            "ranks": sorted({pair.rank for pair in self.pairs}),
            "parameters": sum(pair.up.numel() + pair.down.numel() for pair in self.pairs),
            "relative_error": self.error,
            "worst_layer": self.worst.name,
            "worst_relative_error": self.worst.error,
            "dtype": self.dtype,
            "head": self.head,
            "bytes": self.bytes,
            "rows": [
                {"name": pair.name, "rank": pair.rank, "norm": pair.norm, "relative_error": pair.error}
                for pair in self.pairs
            ],
        }


def export_peft_lora(
    source: AdapterLocation,
    output: str | Path,
    *,
    base: str | None = None,
    rank: int | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    track: Track = iter,
) -> LoraExport:
    """Write an adapter as a LoRA directory of PEFT.

    Exact for NOLA and VeRA up to the rounding to ``dtype``; RandLoRA and PRANC need a ``rank``, and the relative error
    of ΔW is told. Alpha is the rank: the method's scale is in the factors. What was trained whole beside the adapter
    comes along, and so does its task, which the commands of this package read.

    Args:
        source: where the adapter is: see :func:`randbasis.adapters.saved.open_adapter`.
        output: folder to write.
        base: folder or hub name of the base, of which only the configuration is read, and which the export names.
        rank: largest rank of a pair; None takes the method's own factors.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``, to store the factors in.
        overwrite: replace ``output`` when it exists.
        track: shows the progress over the layers.

    Raises:
        AdapterMissingError: there is no adapter.
        ExportRankError: no rank is given and ΔW has full rank.
        RankError: the rank is not a positive integer.
        HyperparameterError: the dtype is unknown.
        PrecisionError: a factor does not fit the dtype.
        BaseMismatchError: the adapter was made for another base than ``base``.
        DataMissingError: the configuration of ``base`` cannot be read.
        OutputExistsError: the output exists, or is the source.
        SaveError: the operating system refused, for example because the disk is full.
    """
    stored = stored_dtype(dtype)
    output = check_output_folder(output, (*paths_of(source), base), overwrite=overwrite)
    adapter = open_source(source, base)
    pairs = lora_pairs(adapter.packed, rank, stored, track)
    extra = adapter.extra
    config = lora_config(adapter, pairs)
    tensors = extra | lora_tensors((adapter.path(pair.name), pair) for pair in pairs)
    with replaced_set(output) as stage:
        save_file(tensors, stage / WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(stage))
        if adapter.head_apart:
            save_head(adapter.found, stage)
        write_task(stage, adapter.base, "lora", adapter.found.task)
        if extra and adapter.fit is not None and adapter.fit.auto.__name__.endswith("Classification"):
            # Not beside the adapter: there, transformers would take it for the configuration of a whole model.
            with_answers(adapter.fit.config, adapter.found.task).save_pretrained(stage / BASE_CONFIG)
        size = sum(file.stat().st_size for file in stage.rglob("*") if file.is_file())
    head = "apart" if adapter.head_apart else "saved" if extra else "none"
    return LoraExport(output, adapter.found.config.method, adapter.base, tuple(pairs), dtype, head, size)


def stored_dtype(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        HyperparameterError: factors are not stored in such a dtype.
    """
    known = {key: value for key, value in DTYPES.items() if isinstance(value, torch.dtype)}
    if name not in known:
        raise HyperparameterError(not_one_of("dtype", name, known))
    return known[name]


def lora_tensors(pairs: Iterable[tuple[str, LoraPair]]) -> dict[str, Tensor]:
    """The factors under the names that PEFT saves them with.

    Args:
        pairs: path of the layer in the base, and its pair.
    """
    tensors: dict[str, Tensor] = {}
    for path, pair in pairs:
        tensors[f"{SAVED_PREFIX}{path}.lora_A.weight"] = pair.down
        tensors[f"{SAVED_PREFIX}{path}.lora_B.weight"] = pair.up
    return tensors


def lora_config(adapter: Source, pairs: Sequence[LoraPair]) -> LoraConfig:
    """PEFT's configuration of LoRA pairs on the layers, and with the head, of an adapter.

    Args:
        adapter: whose layers they are.
        pairs: one for each layer.
    """
    config = adapter.found.config
    ranks = {adapter.path(pair.name): pair.rank for pair in pairs}
    common = Counter(ranks.values()).most_common(1)[0][0]
    patterns = rank_pattern(ranks, common)
    wrapped = adapter.head_apart or (adapter.fit is not None and bool(adapter.fit.prefix))
    return LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        **_targets(adapter, list(ranks)),
        modules_to_save=None if adapter.head_apart else config.modules_to_save,
        bias=_BIASES[config.bias],  # pyright: ignore[reportArgumentType]
        fan_in_fan_out=adapter.architecture in CONV1D_TYPES,
        task_type=None if wrapped else config.task_type,
        base_model_name_or_path=adapter.base,
        inference_mode=True,
    )


def rank_pattern(ranks: Mapping[str, int], common: int) -> dict[str, int]:
    """The ranks that are not the common one: by the last name of a path where all layers of that name agree.

    Args:
        ranks: path of a layer → rank.
        common: rank of the layers that the result leaves out.
    """
    by_name: dict[str, set[int]] = {}
    for path, rank in ranks.items():
        by_name.setdefault(path.rpartition(".")[2], set()).add(rank)
    return {
        (path.rpartition(".")[2] if len(by_name[path.rpartition(".")[2]]) == 1 else path): rank
        for path, rank in ranks.items()
        if rank != common
    }


def _targets(adapter: Source, paths: list[str]) -> dict[str, Any]:
    """What picks the layers: the adapter's own words where they pick these and no others, else the paths."""
    # Where the head is apart, a reader that builds a class with a head, such as a pipeline for texts, would answer with
    # one that was drawn: paths from the root of the model make PEFT say that such a class has none of them.
    config = adapter.found.config
    words = {
        name: getattr(config, name)
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    }
    known = paths if adapter.fit is None else _modules(adapter.fit)
    if adapter.head_apart:
        return {"target_modules": anchored(paths, known)}
    if config.target_modules and {path for path in known if check_target_module_exists(config, path)} == set(paths):
        return words
    return {"target_modules": paths}


def _modules(fit: BaseFit) -> list[str]:
    modules = cast("Iterator[tuple[str, nn.Module]]", meta_model(fit.config, fit.auto).named_modules())
    return [path for path, _ in modules]

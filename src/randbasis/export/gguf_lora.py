"""PAIRS → GGUF: a LoRA adapter that llama.cpp loads beside a base model in its own format.

llama.cpp's converter stores the q and k projections of the llama family with the rows of each head in another order:
the pairs of a rotation side by side instead of half a head apart. B has to follow; A, and all other layers of the
architectures listed here, stay as they are.
"""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from randbasis.adapters.saved import AdapterLocation, paths_of
from randbasis.errors import (
    ExportArchitectureError,
    ExportBaseError,
    ExportHeadError,
)
from randbasis.export.pairs import LoraPair, lora_pairs
from randbasis.export.peft_lora import LoraExport, stored_dtype
from randbasis.export.source import Source, open_source
from randbasis.files.locations import local_output
from randbasis.files.output_checks import check_output_file
from randbasis.files.whole_file import whole_file
from randbasis.optional import needing
from randbasis.progress import Track


@dataclass(frozen=True, slots=True)
class Family:
    """What llama.cpp makes of a base model.

    Attributes:
        name: of the architecture in GGUF.
        rotated: last names of the layers whose rows it reorders.
    """

    name: str
    rotated: frozenset[str] = frozenset()


_ROTATED = frozenset({"q_proj", "k_proj"})
FAMILIES = {
    "llama": Family("llama", _ROTATED),
    "mistral": Family("llama", _ROTATED),
    "granite": Family("granite", _ROTATED),
    "olmo": Family("olmo", _ROTATED),
    "olmo2": Family("olmo2"),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma"),
    "gemma2": Family("gemma2"),
    "gemma3_text": Family("gemma3"),
    "phi3": Family("phi3"),
    "stablelm": Family("stablelm"),
    "starcoder2": Family("starcoder2"),
    "gpt2": Family("gpt2"),
}
"""``model_type`` of the bases whose layers are known to lie in GGUF as :func:`gguf_rows` says."""


def export_gguf_lora(
    source: AdapterLocation,
    output: str | Path,
    *,
    base: str | None = None,
    rank: int | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    track: Track = iter,
) -> LoraExport:
    """Write an adapter as a LoRA adapter of llama.cpp (``llama-cli --lora``).

    The factors are those of :func:`randbasis.export.export_peft_lora`; the base has to be one of :data:`FAMILIES`.

    Args:
        source: where the adapter is: see :func:`randbasis.adapters.saved.open_adapter`.
        output: file to write.
        base: folder or hub name of the base, whose configuration tells heads and layers; None takes the one that the
            adapter names, where it is on this machine.
        rank: largest rank of a pair; None takes the method's own factors.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``, to store the factors in.
        overwrite: replace ``output`` when it exists.
        track: shows the progress over the layers.

    Raises:
        ExportBaseError: the configuration of the base is not to be had.
        ExportArchitectureError: the base is of another family, or a layer has no place in GGUF.
        ExportHeadError: something was trained whole beside the adapter, which GGUF has no place for.
        MissingPackageError: the package ``gguf`` is not installed.
        RandbasisError: as :func:`randbasis.export.export_peft_lora`.
    """
    output, stored = local_output(output), stored_dtype(dtype)
    check_output_file(output, (*paths_of(source), base), overwrite=overwrite)
    _gguf()
    adapter = open_source(source, base)
    config, family = _family(adapter)
    names = gguf_names(config, family, [adapter.path(name) for name in adapter.found.modules])
    _check_extra(adapter)
    pairs = lora_pairs(adapter.packed, rank, stored, track)
    tensors: dict[str, Tensor] = {}
    for pair in pairs:
        path = adapter.path(pair.name)
        tensors[f"{names[path]}.lora_a"] = pair.down
        tensors[f"{names[path]}.lora_b"] = gguf_rows(pair.up, path, config, family)
    with whole_file(output, overwrite=overwrite) as temporary:
        _write(temporary, family, _alpha(pairs), tensors, adapter.base)
    size = output.stat().st_size
    return LoraExport(output, adapter.found.config.method, adapter.base, tuple(pairs), dtype, "none", size)


def gguf_names(config: PreTrainedConfig, family: Family, paths: list[str]) -> dict[str, str]:
    """The tensors that llama.cpp keeps the weights of layers in.

    Args:
        config: of the base.
        family: what llama.cpp makes of it.
        paths: of the layers in the base.

    Returns:
        Path → name, such as ``blk.0.attn_q.weight``.

    Raises:
        ExportArchitectureError: a layer has no tensor of its own there.
    """
    gguf = _gguf()
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == family.name)
    known = gguf.get_tensor_name_map(kind, cast("int", config.num_hidden_layers))
    names: dict[str, str] = {}
    for path in paths:
        name = known.get_name(f"{path}.weight", try_suffixes=(".weight",))
        if name == "output.weight" and config.tie_word_embeddings:
            name = None
        if name is None:
            raise ExportArchitectureError(
                f"{path!r} must have a tensor of its own in GGUF's {family.name!r}, it has none; adapt linear layers "
                "of the decoder's blocks alone, or export with merged and convert the merged model"
            )
        names[path] = name
    return names


def gguf_rows(up: Tensor, path: str, config: PreTrainedConfig, family: Family) -> Tensor:
    """B with its rows where llama.cpp has those of the weight: row ``(head, half, i)`` goes to ``(head, i, half)``.

    Args:
        up: B, ``[out, rank]``.
        path: of the layer.
        config: of the base, which tells the heads.
        family: which layers are reordered.
    """
    kind = path.rpartition(".")[2]
    if kind not in family.rotated:
        return up
    heads = cast("int", config.num_attention_heads)
    if kind == "k_proj":
        heads = cast("int", getattr(config, "num_key_value_heads", None) or heads)
    rows, rank = up.shape
    return up.reshape(heads, 2, rows // heads // 2, rank).transpose(1, 2).reshape(rows, rank).contiguous()


def _family(adapter: Source) -> tuple[PreTrainedConfig, Family]:
    if adapter.fit is None:
        raise ExportBaseError(
            f"the base {adapter.base!r} must be on this machine, because its configuration tells heads and layers; "
            "name its folder, in which a config.json is enough"
        )
    family = FAMILIES.get(str(adapter.architecture))
    if family is None:
        raise ExportArchitectureError(
            f"the base must be one of {', '.join(FAMILIES)} for a LoRA in GGUF, got {adapter.architecture!r}: how "
            "llama.cpp lays out the layers of others is not known here; export with merged and convert the merged "
            "model with llama.cpp's own converter"
        )
    return adapter.fit.config, family


def _check_extra(adapter: Source) -> None:
    # PEFT saves the frozen weight of an adapted output layer too; it is the base's own.
    trained = [name for name in adapter.packed.extra if not name.endswith(".base_layer.weight")]
    if trained:
        raise ExportHeadError(
            f"a LoRA in GGUF has no place for what was trained whole beside the adapter, got {trained[0]!r}; export "
            "with merged and convert the merged model, or train without modules_to_save and bias"
        )


def _alpha(pairs: list[LoraPair]) -> float:
    """What llama.cpp divides by each rank; 0, its word for no scale at all, where the ranks differ."""
    ranks = {pair.rank for pair in pairs}
    return float(ranks.pop()) if len(ranks) == 1 else 0.0


def _gguf() -> Any:
    with needing("a LoRA in GGUF", "gguf", "gguf"):
        import gguf
    return gguf


def _write(path: Path, family: Family, alpha: float, tensors: dict[str, Tensor], base: str | None) -> None:
    gguf = _gguf()
    with closing(gguf.GGUFWriter(path, family.name)) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        if base is not None:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, Path(base).name)
        kinds = gguf.GGMLQuantizationType
        kind = {torch.float32: kinds.F32, torch.bfloat16: kinds.BF16, torch.float16: kinds.F16}
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=kind[tensor.dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.flush()

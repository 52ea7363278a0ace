"""FOREIGN ADAPTER + BASE → MODEL: a VeRA, RandLoRA or LoRA of PEFT added to the weights of its base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from randbasis.errors import BaseMismatchError, DataMissingError, HyperparameterError, MergeError, near
from randbasis.importing.nearest_adapter import finite_factors
from randbasis.importing.peft_adapter import PeftAdapter, read_peft_adapter
from randbasis.low_rank import sides
from randbasis.tuner.adapter_dir import SAVED_PREFIX
from randbasis.tuner.base_fit import BaseFit, auto_classes, has_head, prefix_of, under_prefix, with_classes
from randbasis.tuner.base_model import linear_shapes, meta_model, read_config
from randbasis.tuner.inspection import Track
from randbasis.tuner.merging import DTYPES, HEAD_FILE, Merged, check_output, copy_companions, load_base, replaced_folder

_T = TypeVar("_T")


def import_as_merged(
    source: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    track: Track = iter,
) -> Merged:
    """Add each ΔW of an adapter of PEFT to its weight and save a model that plain transformers loads.

    Args:
        source: directory of PEFT's VeRA or RandLoRA with its random matrices, or of LoRA.
        output: folder to write.
        model: folder or hub name of the base; None takes the one that the adapter names.
        dtype: ``"auto"`` (as the base is stored), ``"float32"``, ``"bfloat16"`` or ``"float16"``; sums are in float64.
        overwrite: replace the output.
        track: shows the progress over the matrices.

    Raises:
        DataMissingError: the base is not named, or cannot be read.
        BaseMismatchError: no class of transformers has the adapter's layers and head.
        HyperparameterError: the dtype is unknown.
        MergeError: a merged weight is not finite.
        OutputExistsError: the output exists, or is the folder of the base or the adapter.
        SaveError: it could not be written.
        RandbasisError: what :func:`randbasis.importing.read_peft_adapter` refuses.
    """
    if dtype not in DTYPES:
        raise HyperparameterError(f"dtype must be one of {list(DTYPES)}, got {dtype!r}; {near(dtype, DTYPES)}")
    found = read_peft_adapter(source, model)
    name = model or found.options.get("base_model_name_or_path")
    if not name:
        raise DataMissingError(f"{found.path} does not name its base model, into which it is merged; name it")
    check_output(Path(output), (source, name), overwrite=overwrite)
    fit = _fit(found, read_config(name))
    base = load_base(name, fit, dtype)
    wrapped = under_prefix(base, fit.prefix)
    with torch.no_grad():
        for key in track(found.layers):
            _add(found, key, wrapped.get_submodule(key))
    head = _head(found.load(found.head))
    if fit.head:
        base.load_state_dict(head, strict=False)
    with replaced_folder(Path(output)) as stage:
        base.save_pretrained(stage)
        copy_companions(name, stage)
        if head and not fit.head:
            save_file(head, stage / HEAD_FILE, metadata={"format": "pt"})
        files = tuple(sorted(file.name for file in stage.iterdir()))
        size = sum((stage / file).stat().st_size for file in files)
    parameters, stored = sum(p.numel() for p in base.parameters()), str(base.dtype).removeprefix("torch.")
    place = "merged" if fit.head else "apart" if head else "none"
    return Merged(Path(output), type(base).__name__, len(found.layers), parameters, stored, place, files, size)


def _fit(found: PeftAdapter, config: PreTrainedConfig) -> BaseFit:
    """The first class of transformers that has the adapter's layers and head; else ``AutoModel`` under a prefix."""
    head = _head({name: found.stored[name] for name in found.head})
    missing = ""
    for auto in auto_classes(config, found.options.get("task_type")):
        own = with_classes(config, head) if auto.__name__.endswith("Classification") else config
        try:
            model = meta_model(own, auto)
        except DataMissingError:
            continue
        there = linear_shapes(model)
        absent = next((key for key in found.layers if key not in there), None)
        if absent is None and has_head(model, head):
            return BaseFit(auto, own, "", bool(head))
        missing = missing or (f"the layer {absent!r}" if absent else f"a head of {sorted(head)}")
    bare = linear_shapes(meta_model(config, AutoModel))
    prefix = prefix_of(found.layers[0], bare)
    if prefix is not None and all(key.removeprefix(f"{prefix}.") in bare for key in found.layers):
        return BaseFit(AutoModel, config, prefix, head=False)
    raise BaseMismatchError(
        f"{found.path} was made for another base model: no class of transformers for {config.model_type!r} has "
        f"{missing}; name the base model that it was made for, or merge it with PEFT where it was trained"
    )


def _head(named: Mapping[str, _T]) -> dict[str, _T]:
    return {name.removeprefix(SAVED_PREFIX): value for name, value in named.items()}


def _add(found: PeftAdapter, key: str, layer: nn.Module) -> None:
    weight, change = cast("Tensor", layer.weight), finite_factors(found, key)
    own = tuple(reversed(weight.shape)) if isinstance(layer, Conv1D) else tuple(weight.shape)
    if own != sides(change):
        raise BaseMismatchError(
            f"{found.path}: {key!r} is {sides(change)} (out, in) in the adapter, but {own} in the base model; name the "
            "base model that it was made for"
        )
    delta = change.delta()
    total = (weight.double() + (delta.T if isinstance(layer, Conv1D) else delta)).to(weight.dtype)
    if not bool(torch.isfinite(total).all()):
        raise MergeError(f"{key!r} would not be finite in {weight.dtype} after merging; use dtype float32")
    weight.copy_(cast("Any", total))

"""FOREIGN ADAPTER + BASE → MODEL: a VeRA, RandLoRA or LoRA of PEFT added to the weights of its base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from randbasis.adapters.base_fit import BaseFit, choose, placements, under_prefix
from randbasis.adapters.base_model import linear_shapes, read_config
from randbasis.adapters.merging import DTYPES, Merged, load_base, write_model
from randbasis.defaults import MERGED_DTYPE
from randbasis.errors import BaseMismatchError, DataMissingError, HyperparameterError, MergeError, not_one_of
from randbasis.files.output_checks import check_output_folder
from randbasis.importing.nearest_adapter import finite_factors
from randbasis.importing.peft_adapter import PeftAdapter, read_peft_adapter
from randbasis.low_rank import sides
from randbasis.progress import Track
from randbasis.tuner.saved_files import SAVED_PREFIX

_T = TypeVar("_T")


def import_as_merged(
    source: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    dtype: str = MERGED_DTYPE,
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
        raise HyperparameterError(not_one_of("dtype", dtype, DTYPES))
    found = read_peft_adapter(source, model)
    name = model or found.options.get("base_model_name_or_path")
    if not name:
        raise DataMissingError(f"{found.path} does not name its base model, into which it is merged; name it")
    folder = check_output_folder(output, (source, name), overwrite=overwrite, model=True)
    fit = _fit(found, read_config(name))
    head = {fit.head_path(key) if fit.head else key: tensor for key, tensor in _head(found.load(found.head)).items()}
    base = load_base(name, fit, dtype, head if fit.head else ())
    wrapped = under_prefix(fit.trunk(base), fit.prefix)
    with torch.no_grad():
        for key in track(found.layers):
            _add(found, key, wrapped.get_submodule(key))
    if fit.head:
        base.load_state_dict(head, strict=False)
    files, size = write_model(base, folder, name, {} if fit.head else head, tokenizer=found.path)
    parameters, stored = sum(p.numel() for p in base.parameters()), str(base.dtype).removeprefix("torch.")
    place = "merged" if fit.head else "apart" if head else "none"
    return Merged(folder, type(base).__name__, len(found.layers), parameters, stored, place, files, size)


def _fit(found: PeftAdapter, config: PreTrainedConfig) -> BaseFit:
    """The class of transformers that has the adapter's layers; see :func:`randbasis.adapters.base_fit.choose`."""
    head = _head({name: found.stored[name] for name in found.head})
    missing = ""
    fitting: list[tuple[BaseFit, PreTrainedModel]] = []
    for fit, model in placements(config, found.options.get("task_type"), found.layers[0], head):
        there = {f"{fit.prefix}.{key}" if fit.prefix else key for key in linear_shapes(model)}
        absent = next((key for key in found.layers if key not in there), None)
        if absent is None:
            fitting.append((fit, model))
        missing = missing or f"the layer {absent!r}"
    if not fitting:
        raise BaseMismatchError(
            f"{found.path} was made for another base model: no class of transformers for {config.model_type!r} has "
            f"{missing}; name the base model that it was made for, or merge it with PEFT where it was trained"
        )
    return choose(fitting, found.layers, head, str(found.path))


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
    delta = change.matrix()
    total = (weight.double() + (delta.T if isinstance(layer, Conv1D) else delta)).to(weight.dtype)
    if not bool(torch.isfinite(total).all()):
        raise MergeError(f"{key!r} would not be finite in {weight.dtype} after merging; use dtype float32")
    weight.copy_(cast("Any", total))

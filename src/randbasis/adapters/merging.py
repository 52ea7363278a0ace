"""Base model + adapter → a model folder that plain transformers loads, without this package."""

import json
import shutil
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict  # pyright: ignore[reportUnknownVariableType]
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file  # pyright: ignore[reportUnknownVariableType]

from randbasis.adapters.base_fit import BaseFit, find_fit, under_prefix
from randbasis.adapters.base_model import model_readable, quiet_transformers, read_config
from randbasis.adapters.hub_reach import within_reach
from randbasis.adapters.saved import AdapterLocation, SavedAdapter, open_adapter, paths_of
from randbasis.adapters.whole_model import load_whole
from randbasis.defaults import MERGED_DTYPE
from randbasis.errors import (
    BaseMismatchError,
    HyperparameterError,
    MergeError,
    MissingPackageError,
    not_one_of,
)
from randbasis.files.our_files import COMPANIONS, MERGED_MARK
from randbasis.files.output_checks import check_output_folder
from randbasis.files.output_set import replaced_set
from randbasis.tuner.layer import RandbasisLinear
from randbasis.tuner.registration import PREFIX
from randbasis.tuner.saved_files import HEAD_FILE, SAVED_PREFIX

PROCESSORS = frozenset({"preprocessor_config.json", "processor_config.json"})
"""Companions of a model that are no part of a tokenizer."""

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Merged:
    """What was written.

    Attributes:
        output: the folder.
        architecture: class that loads it.
        matrices: how many matrices were changed.
        parameters: of the whole model.
        dtype: of the weights.
        head: ``"none"``, ``"merged"``, or ``"apart"`` where it lies in :data:`HEAD_FILE`, because no class of
            transformers has such a head.
        files: all files of the folder.
        bytes: size of all of them.
    """

    output: Path
    architecture: str
    matrices: int
    parameters: int
    dtype: str
    head: str
    files: tuple[str, ...]
    bytes: int

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**self.__dict__, "output": str(self.output), "files": list(self.files)}


def merge_adapter(
    model: str,
    adapter: AdapterLocation,
    output: str | Path,
    *,
    dtype: str = MERGED_DTYPE,
    overwrite: bool = False,
    labels: Sequence[str] | None = None,
) -> Merged:
    """Add each ΔW of an adapter to its weight and save the model with its tokenizer or image processor.

    A quantized base is dequantized first: what is saved is a plain model, not a quantized one.

    Everything that can be refused is refused before the output is touched, and what is there is replaced only by a
    complete folder.

    Args:
        model: folder or hub name of the base.
        adapter: where it is: see :func:`randbasis.adapters.saved.open_adapter`.
        output: folder to write.
        dtype: ``"auto"`` (as the base is stored), ``"float32"``, ``"bfloat16"`` or ``"float16"``; the sum is taken in
            float32 and then rounded.
        overwrite: replace ``output`` when it exists.
        labels: names of the classes, when a classifier head was trained; None takes those of the adapter's task.

    Raises:
        AdapterFilesError: a file of the adapter is missing, damaged or foreign.
        RandbasisError: as :func:`randbasis.adapters.saved.open_adapter`.
        BaseMismatchError: the adapter was made for another base model.
        DataMissingError: the base model cannot be read.
        HyperparameterError: the dtype is unknown.
        MergeError: the merged weights are not finite, or the base is quantized so that it cannot be read as numbers.
        MissingPackageError: the base is quantized by a package that is not installed.
        OutputExistsError: the output exists, or is the folder of the base or the adapter.
        SaveError: the operating system refused, for example because the disk is full.
    """
    if dtype not in DTYPES:
        raise HyperparameterError(not_one_of("dtype", dtype, DTYPES))
    output = check_output_folder(output, (model, *paths_of(adapter)), overwrite=overwrite, model=True)
    found = open_adapter(adapter).ours()
    if found.base_bits is not None:
        warnings.warn(
            f"{found.where} was trained on a base with weights of {found.base_bits} bits and is merged into those of "
            f"{model}, which differ by the rounding; evaluate what is written",
            stacklevel=2,
        )
    needs_base = found.config.method_cls.needs_base
    with found.on(model):
        fit = find_fit(found, read_config(model))
        base = load_base(model, fit, "auto" if needs_base else dtype, head_paths(fit, found.head))
    if fit.head:
        base.config = with_answers(base.config, found.task, labels)
    matrices = _merge_and_round(base, found, fit, dtype) if needs_base else _merge(base, found, fit)
    apart = _head_of(found) if found.head and not fit.head else {}
    files, size = write_model(base, output, model, apart, tokenizer=found.folder)
    head = "merged" if fit.head else "apart" if apart else "none"
    parameters = sum(parameter.numel() for parameter in base.parameters())
    stored = str(base.dtype).removeprefix("torch.")
    return Merged(output, type(base).__name__, matrices, parameters, stored, head, files, size)


def with_answers(
    config: PreTrainedConfig, task: Mapping[str, Any], labels: Sequence[str] | None = None
) -> PreTrainedConfig:
    """A configuration that names the classes of a head, or says that it gives a number, which a pipeline would squash.

    Args:
        config: of a model with as many classes as the head has.
        task: description of the adapter's task; empty where nobody wrote one.
        labels: names of the classes; None takes those of the task.
    """
    own = deepcopy(config)
    labels = labels or task.get("labels")
    if labels:
        own.id2label = dict(enumerate(labels))
        own.label2id = {label: index for index, label in enumerate(labels)}
    elif task.get("task") == "sequence-classification":
        own.problem_type = "regression"
    return own


def write_model(
    base: PreTrainedModel, output: Path, name: str, head: Mapping[str, Tensor], *, tokenizer: Path | None
) -> tuple[tuple[str, ...], int]:
    """Save a merged model with its tokenizer or image processor.

    Args:
        base: the model.
        output: folder to write.
        name: folder or hub name of the base, whose files are copied.
        head: what its class has no place for.
        tokenizer: folder of the adapter, if it is in one, whose tokenizer comes before that of the base.

    Returns:
        The names of all files, and the size of all of them.

    Raises:
        SaveError: the operating system refused.
    """
    with replaced_set(output, model=True) as stage:
        base.save_pretrained(stage)
        config = json.loads((stage / "config.json").read_text(encoding="utf-8"))
        text = json.dumps(config | {MERGED_MARK: "randbasis"}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (stage / "config.json").write_text(text, encoding="utf-8")
        copy_companions(name, stage, tokenizer)
        if head:
            save_file(dict(head), stage / HEAD_FILE, metadata={"format": "pt"})
        files = tuple(sorted(file.name for file in stage.iterdir()))
        return files, sum((stage / file).stat().st_size for file in files)


def head_paths(fit: BaseFit, head: Iterable[str]) -> set[str]:
    """The parameters of a model that an adapter brings along."""
    return {fit.head_path(name) for name in head} if fit.head else set()


def load_base(model: str, fit: BaseFit, dtype: str, given: Collection[str]) -> PreTrainedModel:
    """The base model with its weights, those of a quantized one in floating point.

    Args:
        model: folder or hub name.
        fit: the class to build.
        dtype: one of :data:`DTYPES`.
        given: parameters that the adapter brings along, which need not be in the checkpoint.

    Raises:
        DataMissingError: the weights cannot be read.
        PartialModelError: the checkpoint is not a whole one of its class.
        MergeError: they are quantized so that they cannot be read as numbers.
        MissingPackageError: they are quantized by a package that is not installed.
    """
    # A head that the adapter brings along is drawn first, and no draw may move the caller's generator.
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=()):
            base, lacking = load_whole(
                fit.whole or fit.auto,
                model,
                given=given,
                other_head=fit.head or bool(fit.prefix),
                fresh_head=bool(fit.prefix) and fit.auto is AutoModel and fit.whole is None,
                config=fit.config,
                dtype=DTYPES[dtype],
            )
            if lacking and not given:
                cast(
                    "Any", base
                ).pooler = None  # nobody trained it or used it: what was drawn for it is not saved as if it were
            with model_readable(model, "weights"):
                return _dequantized(base) if getattr(base, "hf_quantizer", None) else base
    except ImportError as error:
        raise MissingPackageError(
            f"model {model!r} needs a package that cannot be imported here ({type(error).__name__}: {error}); "
            "install or mend it"
        ) from error


def _dequantized(base: PreTrainedModel) -> PreTrainedModel:
    """The same model with plain linear layers, whose weights are what the quantized ones stand for."""
    kind = str(cast("Any", base).quantization_method)
    try:
        plain = cast("PreTrainedModel", cast("Any", base).dequantize())
    except NotImplementedError as error:
        raise MergeError(
            f"the base model must be one that transformers can dequantize to be merged into, got weights quantized by "
            f"{kind} ({error}); give the model that it was quantized from"
        ) from error
    vars(plain).pop("_weight_conversions", None)  # how its file is read: it would be written as quantized weights are
    return cast("Any", plain).to(plain.config.dtype)  # what was not quantized has the dtype of its file


def _merge_and_round(base: PreTrainedModel, found: SavedAdapter, fit: BaseFit, dtype: str) -> int:
    """As :func:`_merge`, of an adapter that is made of weights as they are stored, or else of rounded ones."""
    rounded = DTYPES[dtype]
    if not isinstance(rounded, torch.dtype) or rounded == base.dtype:
        return _merge(base, found, fit)
    try:
        count = _merge(base, found, fit)
    except BaseMismatchError:  # it may have been trained in that dtype
        return _merge(cast("Any", base).to(rounded), found, fit)
    cast("Any", base).to(rounded)
    return count


def _merge(base: PreTrainedModel, found: SavedAdapter, fit: BaseFit) -> int:
    """Merge in place; returns the number of changed matrices."""
    trunk = under_prefix(fit.trunk(base), fit.prefix)
    config = found.bare_config(trunk, head=fit.head)
    if fit.prefix:  # its words would pick the encoder's pooler too, which a head on the hidden states leaves out
        config.target_modules, config.exclude_modules, config.layers_to_transform = set(found.modules), None, None
    adapted = cast("PeftModel", get_peft_model(cast("Any", trunk), config))
    tensors = {name: tensor for name, tensor in found.load().items() if fit.head or f".{PREFIX}" in name}
    set_peft_model_state_dict(adapted, tensors)
    count = sum(len(module.matrices("default")) for module in adapted.modules() if isinstance(module, RandbasisLinear))
    cast("Any", adapted).merge_and_unload(progressbar=False, safe_merge=True)
    return count


def copy_companions(model: str, stage: Path, first: Path | None) -> None:
    """Copy what stands beside the weights of a model: :data:`randbasis.files.our_files.COMPANIONS`.

    Args:
        model: folder or hub name of the model.
        stage: where to.
        first: folder whose tokenizer is taken instead of the model's, where it holds a whole one; None for none.
    """
    trained = {} if first is None else {name: first / name for name in COMPANIONS if (first / name).is_file()}
    has_own = "tokenizer_config.json" in trained
    for name in COMPANIONS:
        own = has_own and name not in PROCESSORS
        path = trained.get(name) if own else _cached(model, name)
        if path is not None:
            shutil.copyfile(path, stage / name)


def _cached(model: str, name: str) -> Path | None:
    with within_reach(model):
        found = cast("Any", cached_file)(
            model, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
    return None if found is None else Path(found)


def save_head(found: SavedAdapter, folder: Path) -> None:
    """Write what was trained whole beside an adapter to :data:`HEAD_FILE`, under its paths in the model."""
    save_file(_head_of(found), folder / HEAD_FILE, metadata={"format": "pt"})


def _head_of(found: SavedAdapter) -> dict[str, Tensor]:
    return {
        name.removeprefix(SAVED_PREFIX): tensor for name, tensor in found.load().items() if f".{PREFIX}" not in name
    }

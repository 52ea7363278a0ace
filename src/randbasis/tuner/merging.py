"""Base model + adapter → a model folder that plain transformers loads, without this package."""

import os
import shutil
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict  # pyright: ignore[reportUnknownVariableType]
from safetensors import SafetensorError
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file  # pyright: ignore[reportUnknownVariableType]

from randbasis.errors import (
    HyperparameterError,
    MergeError,
    MissingPackageError,
    OutputExistsError,
    SaveError,
    near,
)
from randbasis.tuner.adapter_dir import SAVED_PREFIX, AdapterDir, read_adapter_dir
from randbasis.tuner.base_fit import BaseFit, find_fit, under_prefix
from randbasis.tuner.base_model import model_readable, quiet_transformers, read_config
from randbasis.tuner.layer import RandbasisLinear
from randbasis.tuner.registration import PREFIX

HEAD_FILE = "head.safetensors"
"""Where a head goes that the class of the merged model has no place for."""

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Files of a tokenizer or image processor, copied as they are."""


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
    adapter: str | Path,
    output: str | Path,
    *,
    dtype: str = "auto",
    overwrite: bool = False,
    labels: Sequence[str] | None = None,
) -> Merged:
    """Add each ΔW of an adapter to its weight and save the model with its tokenizer or image processor.

    A quantized base is dequantized first: what is saved is a plain model, not a quantized one.

    Everything that can be refused is refused before the output is touched, and what is there is replaced only by a
    complete folder.

    Args:
        model: folder or hub name of the base.
        adapter: directory of the adapter.
        output: folder to write.
        dtype: ``"auto"`` (as the base is stored), ``"float32"``, ``"bfloat16"`` or ``"float16"``; the sum is taken in
            float32 and then rounded.
        overwrite: replace ``output`` when it exists.
        labels: names of the classes, when a classifier head was trained.

    Raises:
        AdapterFilesError: a file of the adapter is missing, damaged or foreign.
        BaseMismatchError: the adapter was made for another base model.
        DataMissingError: the base model cannot be read.
        HyperparameterError: the dtype is unknown.
        MergeError: the merged weights are not finite, or the base is quantized so that it cannot be read as numbers.
        MissingPackageError: the base is quantized by a package that is not installed.
        OutputExistsError: the output exists, or is the folder of the base or the adapter.
        SaveError: the operating system refused, for example because the disk is full.
    """
    if dtype not in DTYPES:
        raise HyperparameterError(f"dtype must be one of {list(DTYPES)}, got {dtype!r}; {near(dtype, DTYPES)}")
    output = Path(output)
    check_output(output, (model, adapter), overwrite=overwrite)
    found = read_adapter_dir(adapter)
    fit = find_fit(found, read_config(model))
    base = load_base(model, fit, dtype)
    if labels and fit.head:
        base.config.id2label = dict(enumerate(labels))
        base.config.label2id = {label: index for index, label in enumerate(labels)}
    matrices = _merge(base, found, fit)
    with replaced_folder(output) as stage:
        base.save_pretrained(stage)
        copy_companions(model, stage)
        if found.head and not fit.head:
            save_head(found, stage)
        files = tuple(sorted(file.name for file in stage.iterdir()))
        size = sum((stage / name).stat().st_size for name in files)
    head = "merged" if fit.head else "apart" if found.head else "none"
    parameters = sum(parameter.numel() for parameter in base.parameters())
    stored = str(base.dtype).removeprefix("torch.")
    return Merged(output, type(base).__name__, matrices, parameters, stored, head, files, size)


@contextmanager
def replaced_folder(output: Path) -> Generator[Path]:
    """A folder to write into that takes the place of ``output`` only when the block has succeeded.

    Raises:
        SaveError: the operating system refused; ``output`` is as it was.
    """
    stage: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        yield stage
        stage.chmod(0o777 & ~_umask())
        _swap(stage, output)
    except (OSError, SafetensorError) as error:
        raise SaveError(
            f"output {str(output)!r} could not be written: {error}; free some space or choose another folder; "
            "what was there before is kept"
        ) from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def check_output(output: Path, inputs: Sequence[str | Path], *, overwrite: bool) -> None:
    """Raise unless a folder can be written at ``output``.

    Args:
        output: the folder.
        inputs: what is read, and never replaced.
        overwrite: whether what is there may be replaced.

    Raises:
        OutputExistsError: it is a file, one of the inputs, or holds something that may not be replaced.
    """
    for source in inputs:
        if Path(source).exists() and output.resolve() == Path(source).resolve():
            raise OutputExistsError(f"output must not be the folder that is read from, got {str(output)!r} for both")
    if output.exists() and not output.is_dir():
        raise OutputExistsError(f"output {str(output)!r} is a file; give a folder")
    if output.exists() and not overwrite and any(output.iterdir()):
        raise OutputExistsError(f"output {str(output)!r} exists; give overwrite to replace it, or another folder")


def load_base(model: str, fit: BaseFit, dtype: str) -> PreTrainedModel:
    """The base model with its weights, those of a quantized one in floating point.

    Args:
        model: folder or hub name.
        fit: the class to build, and whether a head of another size is about to come.
        dtype: one of :data:`DTYPES`.

    Raises:
        DataMissingError: the weights cannot be read.
        MergeError: they are quantized so that they cannot be read as numbers.
        MissingPackageError: they are quantized by a package that is not installed.
    """
    # A head that the adapter brings along is drawn first, and no draw may move the caller's generator.
    try:
        with model_readable(model, "weights"), quiet_transformers(), torch.random.fork_rng(devices=()):
            base = fit.auto.from_pretrained(
                model, config=fit.config, dtype=DTYPES[dtype], ignore_mismatched_sizes=fit.head
            )
            return _dequantized(base) if getattr(base, "hf_quantizer", None) else base
    except ImportError as error:
        raise MissingPackageError(f"model {model!r} needs a package that is not installed: {error}") from error


def _dequantized(base: PreTrainedModel) -> PreTrainedModel:
    """The same model with plain linear layers, whose weights are what the quantized ones stand for."""
    kind = str(cast("Any", base).quantization_method)
    try:
        plain = cast("PreTrainedModel", cast("Any", base).dequantize())
    except NotImplementedError as error:
        raise MergeError(
            f"the base model must be one that transformers can dequantize to be merged into, got weights quantized by "
            f"{kind}; give the model that it was quantized from"
        ) from error
    vars(plain).pop("_weight_conversions", None)  # how its file is read: it would be written as quantized weights are
    return cast("Any", plain).to(plain.config.dtype)  # what was not quantized has the dtype of its file


def _merge(base: PreTrainedModel, found: AdapterDir, fit: BaseFit) -> int:
    """Merge in place; returns the number of changed matrices."""
    config = found.bare_config(head=fit.head)
    if fit.prefix:  # its words would pick the encoder's pooler too, which a head on the hidden states leaves out
        config.target_modules, config.exclude_modules, config.layers_to_transform = set(found.modules), None, None
    adapted = cast("PeftModel", get_peft_model(cast("Any", under_prefix(base, fit.prefix)), config))
    tensors = {name: tensor for name, tensor in found.load().items() if fit.head or f".{PREFIX}" in name}
    set_peft_model_state_dict(adapted, tensors)
    count = sum(len(module.matrices("default")) for module in adapted.modules() if isinstance(module, RandbasisLinear))
    cast("Any", adapted).merge_and_unload(progressbar=False, safe_merge=True)
    return count


def copy_companions(model: str, stage: Path) -> None:
    """Copy what stands beside the weights of a model: :data:`COMPANIONS`."""
    for name in COMPANIONS:
        path = cast("Any", cached_file)(
            model, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        if path is not None:
            shutil.copyfile(path, stage / name)


def save_head(found: AdapterDir, folder: Path) -> None:
    """Write what was trained whole beside an adapter to :data:`HEAD_FILE`, under its paths in the model."""
    tensors = {
        name.removeprefix(SAVED_PREFIX): tensor for name, tensor in found.load().items() if f".{PREFIX}" not in name
    }
    save_file(tensors, folder / HEAD_FILE, metadata={"format": "pt"})


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _swap(stage: Path, output: Path) -> None:
    """Put ``stage`` in the place of ``output``; if that fails, ``output`` is put back."""
    if not output.exists():
        os.replace(stage, output)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    os.replace(output, aside / "old")
    try:
        os.replace(stage, output)
    except OSError:
        os.replace(aside / "old", output)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)

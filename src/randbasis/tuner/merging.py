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

from randbasis.errors import HyperparameterError, OutputExistsError, SaveError, near
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
        MergeError: the merged weights are not finite, or the base is quantized so that it cannot be written.
        OutputExistsError: the output exists, or is the folder of the base or the adapter.
        SaveError: the operating system refused, for example because the disk is full.
    """
    if dtype not in DTYPES:
        raise HyperparameterError(f"dtype must be one of {list(DTYPES)}, got {dtype!r}; {near(dtype, DTYPES)}")
    output = Path(output)
    _check_output(output, (model, adapter), overwrite=overwrite)
    found = read_adapter_dir(adapter)
    fit = find_fit(found, read_config(model))
    base = _load(model, fit, dtype)
    if labels and fit.head:
        base.config.id2label = dict(enumerate(labels))
        base.config.label2id = {label: index for index, label in enumerate(labels)}
    matrices = _merge(base, found, fit)
    with replaced_folder(output) as stage:
        base.save_pretrained(stage)
        _copy_companions(model, stage)
        if found.head and not fit.head:
            _save_head(found, stage / HEAD_FILE)
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


def _check_output(output: Path, inputs: Sequence[str | Path], *, overwrite: bool) -> None:
    for source in inputs:
        if Path(source).exists() and output.resolve() == Path(source).resolve():
            raise OutputExistsError(f"output must not be the folder that is read from, got {str(output)!r} for both")
    if output.exists() and not output.is_dir():
        raise OutputExistsError(f"output {str(output)!r} is a file; give a folder")
    if output.exists() and not overwrite and any(output.iterdir()):
        raise OutputExistsError(f"output {str(output)!r} exists; give overwrite to replace it, or another folder")


def _load(model: str, fit: BaseFit, dtype: str) -> PreTrainedModel:
    # A head that the adapter brings along is drawn first, and no draw may move the caller's generator.
    with model_readable(model, "weights"), quiet_transformers(), torch.random.fork_rng(devices=()):
        return fit.auto.from_pretrained(model, config=fit.config, dtype=DTYPES[dtype], ignore_mismatched_sizes=fit.head)


def _merge(base: PreTrainedModel, found: AdapterDir, fit: BaseFit) -> int:
    """Merge in place; returns the number of changed matrices."""
    config = found.bare_config(head=fit.head)
    adapted = cast("PeftModel", get_peft_model(cast("Any", under_prefix(base, fit.prefix)), config))
    tensors = {name: tensor for name, tensor in found.load().items() if fit.head or f".{PREFIX}" in name}
    set_peft_model_state_dict(adapted, tensors)
    count = sum(len(module.matrices("default")) for module in adapted.modules() if isinstance(module, RandbasisLinear))
    cast("Any", adapted).merge_and_unload(progressbar=False, safe_merge=True)
    return count


def _copy_companions(model: str, stage: Path) -> None:
    for name in COMPANIONS:
        path = cast("Any", cached_file)(
            model, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        if path is not None:
            shutil.copyfile(path, stage / name)


def _save_head(found: AdapterDir, path: Path) -> None:
    tensors = {
        name.removeprefix(SAVED_PREFIX): tensor for name, tensor in found.load().items() if f".{PREFIX}" not in name
    }
    save_file(tensors, path, metadata={"format": "pt"})


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

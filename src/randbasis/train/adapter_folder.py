"""An adapter with its head and its task on disk.

A folder holds what ``save_pretrained`` of PEFT writes, or ``head.safetensors`` where only a head was trained, and
``task.json``: the labels, columns and lengths that are needed to use it again.
"""

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import peft
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from randbasis.errors import AdapterFilesError, BaseMismatchError, RandbasisError
from randbasis.files.output_set import check_finished
from randbasis.train.adapter import is_of_targets
from randbasis.train.pooled import PooledClassifier
from randbasis.train.randomness import confined_randomness
from randbasis.train.task import TASK_FILE
from randbasis.tuner.saved_files import anchored

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
HEAD_WEIGHTS = "head.safetensors"


@dataclass(frozen=True)
class AdapterFolder:
    """What a folder says about itself.

    Args:
        path: the folder.
        base_model: folder or hub name of the base it was made for.
        method: as the command names it.
        task: the description of its task, empty for an adapter of another tool.
    """

    path: Path
    base_model: str
    method: str
    task: dict[str, Any]


def read_folder(path: str | Path) -> AdapterFolder:
    """Look at an adapter folder without reading any weights.

    Raises:
        AdapterFilesError: the folder or one of its files is missing, or a file is not what it should be.
    """
    path = Path(path)
    if not path.is_dir():
        raise AdapterFilesError(f"adapter {str(path)!r} is not a folder; give the output folder of a training run")
    check_finished(path)
    weights = ADAPTER_WEIGHTS if (path / ADAPTER_CONFIG).is_file() else HEAD_WEIGHTS
    if not (path / weights).is_file():
        there = ", ".join(sorted(file.name for file in path.iterdir())) or "nothing"
        raise AdapterFilesError(
            f"adapter {str(path)!r} has no {ADAPTER_CONFIG} with {ADAPTER_WEIGHTS} (weights in any other form, such as "
            f"pickles, are not read), and no {HEAD_WEIGHTS}; it holds {there}"
        )
    config = _read_json(path / ADAPTER_CONFIG) if weights == ADAPTER_WEIGHTS else {}
    own = _read_json(path / TASK_FILE) if (path / TASK_FILE).is_file() else {}
    base = own.get("base_model") or config.get("base_model_name_or_path") or ""
    return AdapterFolder(path, str(base), str(own.get("method", config.get("peft_type", "none"))), own.get("task", {}))


def load_adapter(model: nn.Module, path: str | Path, *, trainable: bool = False) -> nn.Module:
    """Put the adapter and head of a folder on a base model.

    Args:
        model: the base, with a head of the right size.
        path: the folder.
        trainable: whether its parameters are to be trained further.

    Returns:
        A ``PeftModel``, or ``model`` itself where the folder holds only a head.

    Raises:
        AdapterFilesError: files are missing, unreadable, or of an adapter type that is not installed.
        BaseMismatchError: the adapter was made for a base of another shape.
    """
    folder = read_folder(path)
    if not (folder.path / ADAPTER_CONFIG).is_file():
        _set_parameters(model, _read_weights(folder.path / HEAD_WEIGHTS), folder.path)
        return model
    _read_weights(folder.path / ADAPTER_WEIGHTS)
    try:
        config = cast(PeftConfig, PeftConfig.from_pretrained(str(folder.path)))
    except RandbasisError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterFilesError(
            f"{folder.path / ADAPTER_CONFIG} is not an adapter configuration that is known here: "
            f"{type(error).__name__}: {error}"
        ) from error
    try:
        with confined_randomness(0):  # PEFT's own methods draw a start before they read the file
            return PeftModel.from_pretrained(cast(Any, model), str(folder.path), config=config, is_trainable=trainable)
    except RandbasisError:
        raise
    except (RuntimeError, ValueError) as error:
        if not _is_misfit(error):
            raise
        raise BaseMismatchError(f"the adapter in {folder.path} does not fit {type(model).__name__}: {error}") from error


def _is_misfit(error: Exception) -> bool:
    """Whether an error tells that weights and modules differ, and not that memory, a device or a setting failed."""
    if isinstance(error, ValueError):
        return is_of_targets(error)
    return "loading state_dict" in str(error) or "size mismatch" in str(error)


def restore_parameters(model: nn.Module, path: Path) -> None:
    """Set the trained parameters of a model to those of a folder that was written from it."""
    if isinstance(model, PeftModel):
        weights = _read_weights(path / ADAPTER_WEIGHTS)
        try:
            peft.set_peft_model_state_dict(model, weights, adapter_name=model.active_adapters[0])
        except RuntimeError as error:
            if not _is_misfit(error):
                raise
            raise BaseMismatchError(f"the adapter in {path} is not of this model and configuration: {error}") from error
    else:
        _set_parameters(model, _read_weights(path / HEAD_WEIGHTS), path)


def save_parameters(model: nn.Module, path: Path) -> None:
    """Write adapter and head of a model into a folder; see :func:`randbasis.files.output_set.replaced_set`."""
    path.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        with _own_targets(model):
            model.save_pretrained(str(path), save_embedding_layers=cast(Any, False))
        (path / "README.md").unlink(missing_ok=True)  # an empty form that PEFT writes
    else:
        safetensors.save_file(trained_parameters(model), path / HEAD_WEIGHTS, metadata={"format": "pt"})


@contextmanager
def _own_targets(model: PeftModel) -> Generator[None]:
    """While an adapter under a head of ours is saved, name its layers by paths that no class of transformers has.

    PEFT and transformers then say so, instead of answering with a head that they have drawn.
    """
    if not isinstance(model.get_base_model(), PooledClassifier):
        yield
        return
    config = cast(Any, model.peft_config[model.active_adapters[0]])
    words = {name: getattr(config, name) for name in ("target_modules", "exclude_modules")}
    modules = cast("Iterator[tuple[str, nn.Module]]", model.get_base_model().named_modules())
    adapted = cast("list[str]", model.base_model.targeted_module_names)
    config.target_modules = anchored(adapted, [name for name, _ in modules])
    config.exclude_modules = None
    try:
        yield
    finally:
        for name, value in words.items():
            setattr(config, name, value)


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, detached and contiguous on the CPU."""
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def task_of(sources: Sequence[str | Path], method: str) -> dict[str, str]:
    """What to write beside an adapter that is made of others, where all of them have one and the same task.

    Args:
        sources: the adapters that it is made of; packed files have no task.
        method: what it is then, as the command names it; empty for that of the first.

    Returns:
        The name and text of the description, or nothing.

    Raises:
        AdapterFilesError: a source is not an adapter folder.
    """
    if not all(Path(source).is_dir() for source in sources):
        return {}
    folders = [read_folder(source) for source in sources]
    first = folders[0]
    if not first.task or any(folder.task != first.task for folder in folders[1:]):
        return {}
    about = {"base_model": first.base_model, "method": method or first.method, "task": first.task}
    return {TASK_FILE: json.dumps(about, indent=2, ensure_ascii=False) + "\n"}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterFilesError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise AdapterFilesError(f"{path} holds a {type(content).__name__}; an object is needed")
    return cast(dict[str, Any], content)


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterFilesError(f"{path} cannot be read as safetensors: {error}") from error


def _set_parameters(model: nn.Module, values: dict[str, Tensor], source: Path) -> None:
    own = dict(model.named_parameters())
    for name, value in values.items():
        if name not in own or own[name].shape != value.shape:
            found = f"shape {tuple(own[name].shape)}" if name in own else "no such parameter"
            raise BaseMismatchError(f"{source} has {name} of shape {tuple(value.shape)}; the model has {found}")
    for name, value in values.items():
        own[name].data.copy_(value)

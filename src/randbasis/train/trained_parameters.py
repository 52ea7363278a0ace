"""What was trained of a model, saved and put back: an adapter with its head, or a head alone."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import peft
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from randbasis.adapters.putting import put
from randbasis.adapters.saved import AdapterLocation, open_adapter
from randbasis.errors import AdapterFilesError, BaseMismatchError, RandbasisError
from randbasis.train.method_table import is_of_targets
from randbasis.train.pooled import PooledClassifier
from randbasis.train.randomness import confined_randomness
from randbasis.tuner.saved_files import CONFIG_FILE, HEAD_FILE, WEIGHTS_FILE, anchored

_TOLD = 300
"""Letters of a message of PEFT that are passed on: some list every module that there is."""


def load_adapter(model: nn.Module, adapter: AdapterLocation, *, trainable: bool = False) -> nn.Module:
    """Put an adapter and its head on a base model.

    Args:
        model: the base, with a head of the right size.
        adapter: where it is: see :func:`randbasis.adapters.saved.open_adapter`.
        trainable: whether its parameters are to be trained further.

    Returns:
        A ``PeftModel``; or ``model`` itself, where there is only a head, or one apart from the adapter.

    Raises:
        AdapterFilesError: files are missing, unreadable, or of an adapter type that is not installed.
        BaseMismatchError: the adapter was made for a base of another shape.
        RandbasisError: as :func:`randbasis.adapters.saved.open_adapter`.
    """
    found = open_adapter(adapter)
    if found.is_head:
        _set_parameters(model, found.load(), found.where)
        return model
    if found.whole is not None:
        return put(model, found.whole, is_trainable=trainable, where=found.where)
    if isinstance(model, PooledClassifier) and (found.weights.parent / HEAD_FILE).is_file():
        # An export: the LoRA of the bare encoder, and the head, which plain PEFT has no class for, apart.
        _set_parameters(model, _read_weights(found.weights.parent / HEAD_FILE), found.where)
        model.encoder = cast(Any, _with_peft(model.encoder, found.where, trainable=trainable))
        return model
    return _with_peft(model, found.where, trainable=trainable)


def _with_peft(model: nn.Module, where: str, *, trainable: bool) -> nn.Module:
    """An adapter in a folder on a model, as PEFT puts it there."""
    try:
        config = cast(PeftConfig, PeftConfig.from_pretrained(where))
    except RandbasisError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterFilesError(
            f"{where}: {CONFIG_FILE} is not an adapter configuration that is known here: "
            f"{type(error).__name__}: {error}"
        ) from error
    try:
        with confined_randomness(0):  # PEFT's own methods draw a start before they read the file
            return PeftModel.from_pretrained(cast(Any, model), where, config=config, is_trainable=trainable)
    except RandbasisError:
        raise
    except (RuntimeError, ValueError) as error:
        if not _is_misfit(error):
            raise
        raise BaseMismatchError(
            f"the adapter in {where} does not fit {type(model).__name__}: {_first(error)}"
        ) from error


def _first(error: Exception) -> str:
    """What an error says, of what differs the first and how many more."""
    head, *lines = (" ".join(line.split()) for line in str(error).splitlines())
    if not lines:
        return head[:_TOLD]
    return lines[0] + (f" And {len(lines) - 1} more" if len(lines) > 1 else "")


def _is_misfit(error: Exception) -> bool:
    """Whether an error tells that weights and modules differ, and not that memory, a device or a setting failed."""
    if isinstance(error, ValueError):
        return is_of_targets(error)
    return "loading state_dict" in str(error) or "size mismatch" in str(error)


def restore_parameters(model: nn.Module, path: Path) -> None:
    """Set the trained parameters of a model to those of a folder that was written from it."""
    if isinstance(model, PeftModel):
        weights = _read_weights(path / WEIGHTS_FILE)
        try:
            peft.set_peft_model_state_dict(model, weights, adapter_name=model.active_adapters[0])
        except RuntimeError as error:
            if not _is_misfit(error):
                raise
            raise BaseMismatchError(f"the adapter in {path} is not of this model and configuration: {error}") from error
    else:
        _set_parameters(model, _read_weights(path / HEAD_FILE), str(path))


def save_parameters(model: nn.Module, path: Path) -> None:
    """Write adapter and head of a model into a folder; see :func:`randbasis.files.output_set.replaced_set`."""
    path.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        with _own_targets(model):
            model.save_pretrained(str(path), save_embedding_layers=cast(Any, False))
        (path / "README.md").unlink(missing_ok=True)  # an empty form that PEFT writes
    else:
        safetensors.save_file(trained_parameters(model), path / HEAD_FILE, metadata={"format": "pt"})


@contextmanager
def _own_targets(model: PeftModel) -> Generator[None]:
    """While an adapter under a head of ours is saved, name its layers by paths that no class of transformers has.

    PEFT and transformers then say so, instead of answering with a head that they have drawn.
    """
    if not isinstance(model.get_base_model(), PooledClassifier):
        yield
        return
    config = cast(Any, model.peft_config[model.active_adapters[0]])
    # Some of PEFT's methods (Uni-LoRA, VeRA, RandLoRA, TinyLoRA) leave nothing out.
    words = {name: getattr(config, name) for name in ("target_modules", "exclude_modules") if hasattr(config, name)}
    modules = cast("Iterator[tuple[str, nn.Module]]", model.get_base_model().named_modules())
    adapted = cast("list[str]", model.base_model.targeted_module_names)
    config.target_modules = anchored(adapted, [name for name, _ in modules])
    if "exclude_modules" in words:
        config.exclude_modules = None
    try:
        yield
    finally:
        for name, value in words.items():
            setattr(config, name, value)


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, detached and contiguous on the CPU."""
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterFilesError(f"{path} cannot be read as safetensors: {error}") from error


def _set_parameters(model: nn.Module, values: dict[str, Tensor], source: str) -> None:
    own = dict(model.named_parameters())
    for name, value in values.items():
        if name not in own or own[name].shape != value.shape:
            found = f"shape {tuple(own[name].shape)}" if name in own else "no such parameter"
            raise BaseMismatchError(f"{source} has {name} of shape {tuple(value.shape)}; the model has {found}")
    for name, value in values.items():
        own[name].data.copy_(value)

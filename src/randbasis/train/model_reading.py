"""Reading a frozen base model with transformers, quietly and without touching the caller's random state."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import logging

from randbasis.adapters.base_model import model_readable, quiet_transformers
from randbasis.adapters.hub_reach import within_reach
from randbasis.adapters.whole_model import load_whole
from randbasis.errors import SettingError
from randbasis.train.machine import Quantized


@contextmanager
def quiet_loading() -> Generator[None]:
    """Neither progress bars nor the report that a fresh head is fresh; both settings are put back."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with quiet_transformers():
            yield
    finally:
        if bars:
            logging.enable_progress_bar()


@contextmanager
def explained(name: str, part: str) -> Generator[None]:
    """What transformers raises when a model cannot be read, as one message that says what was asked for.

    Raises:
        DataMissingError: the model, or this part of it, is not there.
        RemoteError: it is on a hub that cannot be reached.
    """
    with model_readable(name, part), within_reach(name), quiet_loading():
        yield


def read_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or hub name."""
    with explained(name, "tokenizer"):
        return cast(Any, AutoTokenizer).from_pretrained(name)


def read_model(
    auto: Any, name: str, dtype: str, *, complete: bool = False, quantized: Quantized | None = None, **options: Any
) -> tuple[Any, list[str]]:
    """A model of one of transformers' auto classes, from safetensors only.

    Args:
        auto: the class, for example ``AutoModelForCausalLM``.
        name: folder or hub name.
        dtype: of its weights.
        complete: whether every weight must be in the checkpoint; else a head is drawn from torch's generator where the
            checkpoint has none, or one of another size.
        quantized: how to read it at few bits, ``None`` for full precision.
        options: for ``from_pretrained``.

    Returns:
        The model, and the names of the modules that were drawn.

    Raises:
        DataMissingError: the model cannot be read.
        PartialModelError: its checkpoint is not whole.
    """
    with quiet_loading():
        if quantized is not None:
            options |= quantized.options(auto, name, torch_dtype(dtype))
        model, drawn = load_whole(
            auto, name, fresh_head=not complete, dtype=torch_dtype(dtype), use_safetensors=True, **options
        )
    if quantized is not None:
        quantized.keep_layout(cast(nn.Module, model))
    return model, sorted({key.rpartition(".")[0] for key in drawn})


def width_of(config: object) -> int | None:
    """The width of the hidden states, as a configuration of transformers tells it; of text, where there are several."""
    text = getattr(config, "get_text_config", lambda: config)()
    width = getattr(text, "hidden_size", None)
    return width if isinstance(width, int) else None


def torch_dtype(name: str) -> torch.dtype:
    """``"float32" | "bfloat16" | "float16"`` as torch's."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def heads_of(model: nn.Module, drawn: Sequence[str] = ()) -> list[str]:
    """Names of the modules to train whole: those behind the backbone (``classifier``, ``score``), and other drawn ones.

    Raises:
        SettingError: the model does not say which module is its backbone.
    """
    backbone = getattr(model, "base_model_prefix", "")
    if not backbone or not hasattr(model, backbone):
        raise SettingError(
            f"{type(model).__name__} does not name its backbone, so its head cannot be told from the rest"
        )
    top = [
        name for name, module in model.named_children() if name != backbone and any(True for _ in module.parameters())
    ]
    return top + [name for name in drawn if name.partition(".")[0] not in top]

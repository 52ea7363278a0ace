"""A base model as its ``config.json`` describes it: modules and shapes on the meta device, no weights read."""

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.utils import logging

from randbasis.adapters.hub_reach import within_reach
from randbasis.errors import BaseMismatchError, DataMissingError, RandbasisError
from randbasis.tuner.base_weight import layer_shape

_TOLD = 500
"""Letters of a message of transformers that are passed on: some list every class that there is."""


@contextmanager
def model_readable(name: str, part: str) -> Generator[None]:
    """What transformers raises when a model cannot be read, as one message that says what was asked for.

    Args:
        name: folder or hub name.
        part: what is read, for the message.

    Raises:
        DataMissingError: the model, or this part of it, is not there or not as transformers takes it.
        OSError: the operating system refused.
    """
    try:
        yield
    except RandbasisError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
            raise  # no rights, no space, no connection: what the operating system says is the cause
        told = " ".join(str(error).split())
        way_out = (
            "give a folder with config.json and safetensors weights, or a name on the hub"
            if isinstance(error, OSError)
            else f"it is not as transformers {version('transformers')} takes it: mend it, or take the version of "
            "transformers that it was written for"
        )
        raise DataMissingError(
            f"model {name!r}: its {part} cannot be read ({type(error).__name__}: {told[:_TOLD]}); {way_out}"
        ) from error


@contextmanager
def quiet_transformers() -> Generator[None]:
    """No advice of transformers on heads that are about to be replaced; its progress bars stay."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def read_config(name: str, *, local: bool = False) -> PreTrainedConfig:
    """The configuration of a folder or hub name; code that a repository brings along is never run.

    Args:
        name: folder or hub name.
        local: look on this machine alone.

    Raises:
        DataMissingError: there is none, or transformers does not know its ``model_type``.
        RemoteError: it is on a hub that cannot be reached.
    """
    with model_readable(name, "configuration"), nullcontext() if local else within_reach(name):
        return cast("PreTrainedConfig", AutoConfig.from_pretrained(name, local_files_only=local))


def auto_class(config: PreTrainedConfig) -> Any:
    """``AutoModelForCausalLM`` for a decoder that writes text, ``AutoModel`` for everything else.

    Encoders such as RoBERTa can be dressed up as decoders too; a masked language model gives them away.
    """
    decoder = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    return AutoModelForCausalLM if decoder else AutoModel


def meta_model(config: PreTrainedConfig, auto: Any = None) -> PreTrainedModel:
    """The modules of a model on the meta device, which takes no memory however large the model is.

    Args:
        config: from :func:`read_config`.
        auto: an auto class of transformers; None for the one of :func:`auto_class`.

    Raises:
        DataMissingError: the architecture cannot be built from its configuration.
    """
    name = config.name_or_path or str(config.model_type)
    with model_readable(name, "architecture"), quiet_transformers(), torch.device("meta"):
        return cast("PreTrainedModel", (auto or auto_class(config)).from_config(config))


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Module path → ``(out, in)`` of every linear layer."""
    modules = cast("Iterator[tuple[str, nn.Module]]", model.named_modules())
    return {key: shape for key, module in modules if (shape := layer_shape(module)) is not None}


def shape_of(key: str, shapes: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """The shape of the layer ``key``, by its whole path or, where a wrapper differs, by the end of it.

    Raises:
        BaseMismatchError: no layer, or more than one, has such a path.
    """
    if key in shapes:
        return shapes[key]
    alike = [name for name in shapes if name.endswith(f".{key}") or key.endswith(f".{name}")]
    if len(alike) != 1:
        raise BaseMismatchError(
            f"the adapter has coefficients for {key!r}, but the base model has no such linear layer; "
            "give the model that the adapter was made for"
        )
    return shapes[alike[0]]


def hollow_model(shapes: Mapping[str, tuple[int, int]], config: Mapping[str, Any]) -> nn.Module:
    """Linear layers at the given paths and nothing else, each weight one number seen ``out · in`` times.

    An adapter can be put on it and read back as on the whole model, at the cost of the adapter alone.

    Args:
        shapes: module path → ``(out, in)``.
        config: the configuration of the base model, which tells the parts of fused projections.
    """
    root = nn.Module()
    for key, (rows, cols) in shapes.items():
        parent = root
        *above, last = key.split(".")
        for name in above:
            if not hasattr(parent, name):
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        layer = nn.Linear(cols, rows, bias=False, device="meta")
        layer.weight = nn.Parameter(torch.zeros(()).expand(rows, cols), requires_grad=False)
        parent.add_module(last, layer)
    root.config = dict(config)  # pyright: ignore[reportArgumentType] # where PEFT looks for it
    return root

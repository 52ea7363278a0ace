"""Which class of transformers has the layers, under the paths, that an adapter was trained on."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from randbasis.errors import BaseMismatchError, DataMissingError
from randbasis.tuner.adapter_dir import AdapterDir
from randbasis.tuner.base_model import auto_class, linear_shapes, meta_model
from randbasis.tuner.base_shapes import expected_shape
from randbasis.tuner.layer import RandbasisLinear

_TASKS = (
    ("CAUSAL_LM", "AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    ("SEQ_CLS", "AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    ("", "AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    ("TOKEN_CLS", "AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    ("QUESTION_ANS", "AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"),
    ("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    ("", "AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    ("FEATURE_EXTRACTION", "AutoModel", "MODEL_MAPPING_NAMES"),
)
"""PEFT's name of a task, the auto class for it, and where transformers keeps that class's architectures."""


@dataclass(frozen=True)
class BaseFit:
    """A way to build the base model so that an adapter finds its layers.

    Attributes:
        auto: auto class of transformers.
        config: of the base model, with as many classes as the head has.
        prefix: path that the model had inside of what was trained; empty when it was the model itself.
        head: whether the model has a place for what was trained whole beside the adapter.
    """

    auto: Any
    config: PreTrainedConfig
    prefix: str
    head: bool


def find_fit(found: AdapterDir, config: PreTrainedConfig) -> BaseFit:
    """The first class that has exactly the adapter's layers and head; else ``AutoModel`` under a prefix, without head.

    The adapter's task comes first, then the class that the base was saved from. No weights are read.

    Args:
        found: the adapter.
        config: of the base model.

    Raises:
        BaseMismatchError: the adapter was made for another base model; names the first matrix that differs.
    """
    refusal: BaseMismatchError | None = None
    for auto in auto_classes(config, found.config.task_type):
        own = with_classes(config, found.head) if auto.__name__.endswith("Classification") else config
        try:
            model = meta_model(own, auto)
            _check_layers(found, model, "")
            if has_head(model, found.head):
                return BaseFit(auto, own, "", bool(found.head))
        except DataMissingError:
            continue
        except BaseMismatchError as error:
            refusal = refusal or error
    bare = meta_model(config, transformers.AutoModel)
    prefix = prefix_of(found.modules[0], linear_shapes(bare))
    if prefix is None:
        raise refusal or BaseMismatchError(f"the adapter's head has no place in a {type(bare).__name__}")
    _check_layers(found, bare, prefix)
    return BaseFit(transformers.AutoModel, config, prefix, head=False)


def under_prefix(model: PreTrainedModel, prefix: str) -> nn.Module:
    """The model as it was inside of what was trained, so that the paths of its modules are those of the adapter."""
    if not prefix:
        return model
    root = nn.Module()
    root.config = model.config.to_dict()  # pyright: ignore[reportArgumentType] # where PEFT looks for it
    parent = root
    *above, last = prefix.split(".")
    for name in above:
        parent.add_module(name, nn.Module())
        parent = parent.get_submodule(name)
    parent.add_module(last, model)
    return root


def auto_classes(config: PreTrainedConfig, task_type: Any) -> list[Any]:
    """The auto classes that know an architecture: that of the task first, then that which the base was saved from."""
    saved_from = (getattr(config, "architectures", None) or [""])[0]
    usual = auto_class(config).__name__
    task = str(getattr(task_type, "value", task_type) or "")
    ranked: list[tuple[bool, bool, bool, int, str]] = []
    for order, (name, auto, mapping) in enumerate(_TASKS):
        known = cast("Mapping[str, Any]", getattr(modeling_auto, mapping)).get(str(config.model_type))
        if known is not None:
            architectures: tuple[str, ...] = (known,) if isinstance(known, str) else tuple(known)
            ranked.append((name != task or not task, saved_from not in architectures, auto != usual, order, auto))
    return [getattr(transformers, auto) for *_, auto in sorted(ranked)]


def _check_layers(found: AdapterDir, model: PreTrainedModel, prefix: str) -> None:
    """Raise unless the adapter's layers are those that its configuration picks from this model, shape by shape."""
    there = {f"{prefix}.{key}" if prefix else key: shape for key, shape in linear_shapes(model).items()}
    name = model.name_or_path or type(model).__name__
    for key in found.modules:
        wanted = expected_shape(found.config.base_shapes, key)
        if key not in there or (wanted is not None and wanted != there[key]):
            ours = "no such layer" if key not in there else f"{there[key][0]}×{there[key][1]}"
            theirs = "a layer" if wanted is None else f"{wanted[0]}×{wanted[1]}"
            raise _mismatch(found, f"{key!r}, {theirs} there and {ours} in {name} (out×in)")
    with torch.device("meta"):
        adapted = get_peft_model(cast("Any", under_prefix(model, prefix)), found.bare_config()).get_base_model()
    own = set(found.modules)
    unused = f"{prefix}.pooler."  # a head on the hidden states leaves the encoder's pooler out
    for key, layer in cast("Iterator[tuple[str, nn.Module]]", adapted.named_modules()):
        if isinstance(layer, RandbasisLinear) and key not in own and not (prefix and key.startswith(unused)):
            raise _mismatch(found, f"{key!r}, which the adapter has no coefficients for and {name} has")


def _mismatch(found: AdapterDir, what: str) -> BaseMismatchError:
    return BaseMismatchError(
        f"the adapter in {found.path} was made for another base model: the first matrix that differs is {what}; "
        f"use {found.config.base_model_name_or_path or 'the base model that it was made for'}"
    )


def has_head(model: PreTrainedModel, head: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a model has parameters of these names and shapes."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    copies = (".modules_to_save.", ".original_module.")  # PEFT saves the biases of a head under these names too
    return all(own.get(name) == shape for name, shape in head.items() if not any(copy in name for copy in copies))


def with_classes(config: PreTrainedConfig, head: Mapping[str, tuple[int, ...]]) -> PreTrainedConfig:
    """The configuration with as many classes as the head has; the hidden layers of a head are wider than its output."""
    rows = [shape[0] for shape in head.values() if len(shape) == 2]
    if not rows or min(rows) == config.num_labels:
        return config
    own = deepcopy(config)
    own.num_labels = min(rows)
    return own


def prefix_of(key: str, shapes: Mapping[str, tuple[int, int]]) -> str | None:
    """What stands before the path of one of these layers in ``key``; None where none of them ends it."""
    return next((key.removesuffix(f".{name}") for name in shapes if key.endswith(f".{name}")), None)

"""Which class of transformers has the layers, under the paths, that an adapter was trained on."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from randbasis.adapters.base_model import auto_class, linear_shapes, meta_model
from randbasis.adapters.saved import SavedAdapter
from randbasis.errors import BaseMismatchError, DataMissingError
from randbasis.tuner.base_shapes import expected_shape
from randbasis.tuner.layer import RandbasisLinear
from randbasis.tuner.saved_files import plain_path

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
        whole: auto class that the base was saved from, where its backbone alone is a model of ``auto``; merging keeps
            the rest of it.
    """

    auto: Any
    config: PreTrainedConfig
    prefix: str
    head: bool
    whole: Any = None

    def trunk(self, base: PreTrainedModel) -> PreTrainedModel:
        """The part of a loaded base that the adapter was put on."""
        return base if self.whole is None else cast("PreTrainedModel", base.base_model)

    def head_path(self, name: str) -> str:
        """The path in the model of a parameter that was saved whole; unchanged where the prefix has no such one."""
        return _inside(plain_path(name), self.prefix)


def find_fit(found: SavedAdapter, config: PreTrainedConfig) -> BaseFit:
    """The first class that has exactly the adapter's layers and head; else one of its layers, without its head.

    The adapter's task comes first, then the class that the base was saved from. No weights are read.

    Args:
        found: the adapter.
        config: of the base model.

    Raises:
        BaseMismatchError: the adapter was made for another base model; names the first matrix that differs.
    """
    refusal: BaseMismatchError | None = None
    fitting: list[tuple[BaseFit, PreTrainedModel]] = []
    for fit, model in placements(config, found.config.task_type, found.modules[0], found.head):
        try:
            _check_layers(found, model, fit.prefix)
        except BaseMismatchError as error:
            refusal = refusal or error
        else:
            fitting.append((fit, model))
    if not fitting:
        raise refusal or BaseMismatchError(f"no class of transformers for {config.model_type!r} can be built")
    return choose(fitting, found.modules, found.head, found.where)


def placements(
    config: PreTrainedConfig, task_type: Any, first: str, head: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[BaseFit, PreTrainedModel]]:
    """The classes that know an architecture, each with the path under which it would hold the layers of an adapter.

    Args:
        config: of the base model.
        task_type: PEFT's name of the task.
        first: path of one adapted layer.
        head: name → shape of what was trained whole, which tells how many classes and tokens there are.
    """
    for auto in auto_classes(config, task_type):
        own = with_classes(config, head) if auto.__name__.endswith("Classification") else config
        try:
            model = meta_model(own, auto)
        except DataMissingError:
            continue
        fit = BaseFit(auto, own, prefix_of(first, linear_shapes(model)) or "", head=False)
        rows = {shape[0] for name, shape in head.items() if fit.head_path(name) in _embeddings(model)}
        if len(rows) == 1 and rows != {getattr(own.get_text_config(), "vocab_size", None)}:
            own = deepcopy(own)
            own.get_text_config().vocab_size = rows.pop()
            model = meta_model(own, auto)
        yield replace(fit, config=own), model


def choose(
    fitting: Sequence[tuple[BaseFit, PreTrainedModel]],
    layers: Sequence[str],
    head: Mapping[str, tuple[int, ...]],
    where: str,
) -> BaseFit:
    """Of the classes that have the layers of an adapter, the one to use.

    The first that has its head too; else, with the head apart, the one that the base was saved from or the bare model.

    Args:
        fitting: of :func:`placements`, in that order; at least one.
        layers: paths of the adapted layers.
        head: name → shape of what was trained whole.
        where: the adapter, for the message.

    Raises:
        BaseMismatchError: the base has the head in another shape.
    """
    for fit, model in fitting:
        if has_head(model, {fit.head_path(name): shape for name, shape in head.items()}) and _wraps(fit.prefix):
            return replace(_with_whole(fit, layers), head=bool(head))
    for fit, model in fitting:
        shapes = _shapes(model)
        for name, shape in head.items():
            there = shapes.get(fit.head_path(name), shape)
            if _wraps(fit.prefix) and there != shape:
                raise BaseMismatchError(
                    f"the adapter in {where} has {fit.head_path(name)!r} of shape {list(shape)}, which was trained or "
                    f"resized beside it, and {type(model).__name__} has it in {list(there)}; name the base model that "
                    "it was made for, resized as it was"
                )
    saved_from = _saved_from(fitting[0][0].config)
    by_class = {type(model).__name__: fit for fit, model in fitting}
    usual = transformers.AutoModel if saved_from else auto_class(fitting[0][0].config)
    other = next((fit for fit, _ in fitting if fit.auto is usual), fitting[0][0])
    return _with_whole(by_class.get(saved_from, other), layers)


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
    saved_from = _saved_from(config)
    usual = auto_class(config).__name__
    task = str(getattr(task_type, "value", task_type) or "")
    ranked: list[tuple[bool, bool, bool, int, str]] = []
    for order, (name, auto, mapping) in enumerate(_TASKS):
        known = cast("Mapping[str, Any]", getattr(modeling_auto, mapping)).get(str(config.model_type))
        if known is not None:
            architectures: tuple[str, ...] = (known,) if isinstance(known, str) else tuple(known)
            ranked.append((name != task or not task, saved_from not in architectures, auto != usual, order, auto))
    return [getattr(transformers, auto) for *_, auto in sorted(ranked)]


def _check_layers(found: SavedAdapter, model: PreTrainedModel, prefix: str) -> None:
    """Raise unless the adapter's layers are those that its configuration picks from this model, shape by shape."""
    there = {f"{prefix}.{key}" if prefix else key: shape for key, shape in linear_shapes(model).items()}
    name = model.name_or_path or type(model).__name__
    for key in found.modules:
        wanted = expected_shape(found.config.base_shapes, key)
        if key not in there or (wanted is not None and wanted != there[key]):
            ours = "no such layer" if key not in there else f"{there[key][0]}×{there[key][1]}"
            theirs = "a layer" if wanted is None else f"{wanted[0]}×{wanted[1]}"
            raise _mismatch(found, f"{key!r}, {theirs} there and {ours} in {name} (out×in)")
    inner = under_prefix(model, prefix)
    with torch.device("meta"):
        adapted = get_peft_model(cast("Any", inner), found.bare_config(inner)).get_base_model()
    own = set(found.modules)
    unused = f"{prefix}.pooler."  # a head on the hidden states leaves the encoder's pooler out
    for key, layer in cast("Iterator[tuple[str, nn.Module]]", adapted.named_modules()):
        if isinstance(layer, RandbasisLinear) and key not in own and not (prefix and key.startswith(unused)):
            raise _mismatch(found, f"{key!r}, which the adapter has no coefficients for and {name} has")


def _mismatch(found: SavedAdapter, what: str) -> BaseMismatchError:
    return BaseMismatchError(
        f"the adapter in {found.where} was made for another base model: the first matrix that differs is {what}; "
        f"use {found.config.base_model_name_or_path or 'the base model that it was made for'}"
    )


def has_head(model: PreTrainedModel, head: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a model has parameters of these paths and shapes."""
    own = _shapes(model)
    return all(own.get(name) == shape for name, shape in head.items())


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Of the parameters by their paths, whether or not an adapter was put on the model to see which layers it has."""
    return {plain_path(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


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
    if key in shapes:
        return ""
    return min((key.removesuffix(f".{name}") for name in shapes if key.endswith(f".{name}")), key=len, default=None)


def _inside(path: str, prefix: str) -> str:
    return path.removeprefix(f"{prefix}.") if prefix else path


def _wraps(prefix: str) -> bool:
    """Whether a prefix is none, or that of wrappers that hold a whole model as it is, such as torch.compile's."""
    return not prefix or set(prefix.split(".")) <= {"_orig_mod", "module"}


def _saved_from(config: PreTrainedConfig) -> str:
    return (getattr(config, "architectures", None) or [""])[0]


def _embeddings(model: PreTrainedModel) -> set[str]:
    """Names of the weights that have a row for each token."""
    found: list[object] = []
    with suppress(NotImplementedError):
        found = [model.get_input_embeddings(), model.get_output_embeddings()]
    modules = cast("Iterator[tuple[str, nn.Module]]", model.named_modules())
    return {
        f"{name}.weight"
        for name, module in modules
        if isinstance(module, nn.Embedding | nn.Linear) and any(module is one for one in found)
    }


def _with_whole(fit: BaseFit, layers: Sequence[str]) -> BaseFit:
    """The same, with the class that the base was saved from where the class found is only the backbone of that."""
    saved_from = _saved_from(fit.config)
    for auto in auto_classes(fit.config, None):
        if fit.auto is not transformers.AutoModel or auto is transformers.AutoModel:
            continue
        with suppress(DataMissingError):
            own, bare = meta_model(fit.config, auto), meta_model(fit.config, fit.auto)
            backbone = cast("PreTrainedModel", own.base_model)
            has_all = {_inside(key, fit.prefix) for key in layers} <= linear_shapes(backbone).keys()
            if type(own).__name__ == saved_from and type(backbone) is type(bare) and has_all:
                return replace(fit, whole=auto)
    return fit

"""PACKED ADAPTER + MODEL → ADAPTED MODEL, without a file: configuration, coefficients, streams and heads set directly.

The model is the one that PEFT makes of a directory with the same adapter, bit for bit.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

from peft import PeftModel
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from randbasis.adapter_file import PackedAdapter
from randbasis.adapters.base_model import linear_shapes
from randbasis.adapters.saved import AdapterLocation, open_packed
from randbasis.adapters.spec_options import config_of
from randbasis.errors import AdapterTypeError
from randbasis.tuner.base_weight import layer_shape
from randbasis.tuner.checked_loading import adapted_layers, check_unmerged, held_meaning
from randbasis.tuner.config import RandbasisConfig
from randbasis.tuner.filling import fill
from randbasis.tuner.meaning import meaning_of
from randbasis.tuner.model import take_off
from randbasis.tuner.places import check_places
from randbasis.tuner.run_state import StoredLayers
from randbasis.tuner.saved_files import plain_path


def put(
    model: nn.Module,
    adapter: PackedAdapter,
    name: str = "default",
    *,
    is_trainable: bool = False,
    autocast_adapter_dtype: bool = True,
    where: str = "the packed adapter",
) -> PeftModel:
    """Put a packed adapter on a model.

    Args:
        model: a base model, or a ``PeftModel`` that gets one adapter more; where it has one of this name, its values
            are replaced, if they mean the same.
        adapter: of any precision; the model computes with its values in float32.
        name: the adapter's in the model.
        is_trainable: whether its parameters are to be trained further; else the model is set to evaluation mode.
        autocast_adapter_dtype: False gives coefficients the dtype of their base layer.
        where: what the adapter was read from, for messages.

    Raises:
        AdapterTypeError: the adapter is not a packed one that is read.
        BaseMismatchError: the model is not the one that the adapter was made for.
        MeaningError: the adapter of this name has coefficients of another meaning.
        MergeError: the adapter of this name is merged into the weights.
        AdapterNameError: an adapter cannot have this name.
        RandbasisError: the spec cannot be met on this model; each rule has its class. The model is as it was.
    """
    if not isinstance(adapter, PackedAdapter):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AdapterTypeError(
            f"adapter must be a PackedAdapter, got {type(adapter).__name__}; use load_packed(model, file) for a path, "
            "a URL, bytes, or what open_adapter found"
        )
    config = config_of(adapter.spec, where)
    config.inference_mode = not is_trainable
    stored = StoredLayers(frozenset(adapter.spec.shapes), where)
    config.run = replace(config.run, stored=stored)
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    _check_model(whole, adapter, where)
    if isinstance(model, PeftModel) and name in model.peft_config:
        _check_same(model, name, adapter, stored)
        fill(model, name, adapter, where)
        cast("Any", model.base_model)._cast_adapter_dtype(name, autocast_adapter_dtype)
        if is_trainable:
            model.peft_config[name].inference_mode = False
            model.set_requires_grad(name)
        adapted = model
    else:
        adapted = _added(model, config, name, autocast_adapter_dtype)
        try:
            fill(adapted, name, adapter, where)
        except BaseException:
            take_off(adapted, name)
            raise
    config.run = replace(config.run, restored=True, stored=None)
    return adapted if is_trainable else adapted.eval()


def load_packed(model: nn.Module, file: AdapterLocation, adapter_name: str = "default", **options: Any) -> PeftModel:
    """Put the adapter of a packed file on a model: :func:`put`, for one that is not read yet.

    Args:
        model: as for :func:`put`.
        file: path, URL or bytes of a packed file, ``store:NAME@VERSION``, or an adapter at hand: packed, or of a store.
        adapter_name: its name in the model.
        options: as for :func:`put`.

    Raises:
        PackedFileMissingError: there is none, or it is a folder.
        RandbasisError: the file breaks a rule; see :func:`randbasis.adapter_file.read`.
        BaseMismatchError: the model is not the one that the adapter was made for; the model is as it was.
    """
    found = open_packed(file)
    assert found.whole is not None
    return put(model, found.whole, adapter_name, where=found.where, **options)


def _check_model(model: nn.Module, adapter: PackedAdapter, where: str) -> None:
    """Everything that could be refused later is refused before the first layer is touched."""
    adapter.check(where)
    architecture = cast("Any", BaseTuner).get_model_config(model).get("model_type")
    modules = dict(cast("Iterator[tuple[str, nn.Module]]", model.named_modules()))
    wanted = adapter.spec.shapes
    # The layers of the adapter alone, which are few; all of them where the message has to name what differs.
    shapes = {name: shape for name in wanted if name in modules and (shape := layer_shape(modules[name])) is not None}
    if shapes != wanted:
        shapes = {plain_path(name): shape for name, shape in linear_shapes(model).items()}
    adapter.spec.check_base(shapes, architecture, where)
    if adapter.extra:
        check_places(model, {name: tuple(tensor.shape) for name, tensor in adapter.extra.items()}, where)


def _added(model: nn.Module, config: RandbasisConfig, name: str, autocast: bool) -> PeftModel:
    """The model with one adapter more, its coefficients at their starts."""
    if isinstance(model, PeftModel):
        model.add_adapter(name, config, autocast_adapter_dtype=autocast)
        if not config.inference_mode:
            model.set_requires_grad(name)
        return model
    kinds = cast("dict[Any, type[PeftModel]]", MODEL_TYPE_TO_PEFT_MODEL_MAPPING)
    kind = kinds.get(config.task_type, PeftModel)
    return kind(cast("Any", model), config, name, autocast_adapter_dtype=autocast)


def _check_same(model: PeftModel, name: str, adapter: PackedAdapter, stored: StoredLayers) -> None:
    """As every loader of coefficients for an adapter that is there."""
    check_unmerged(model, name)
    spec = adapter.spec
    meaning = meaning_of(spec.method, None, spec.matrices, spec.base.weights, tie=spec.tie)
    held_meaning(model, name).check(meaning.tensor())
    layers = adapted_layers(model.get_base_model())
    stored.check([key for key, layer in layers if name in layer.adapted])

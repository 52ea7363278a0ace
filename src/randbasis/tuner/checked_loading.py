"""What is compared before coefficients are loaded, by whom ever: PEFT, ``load_state_dict`` of torch, transformers.

PEFT asks the tuner class, torch a hook on the model. transformers sets tensors one by one and asks nobody, so that its
``load_adapter`` is followed by the same comparisons.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, cast

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.integrations.peft import PeftAdapterMixin

from randbasis.basis import check_streams
from randbasis.errors import (
    AdapterFilesError,
    BaseMismatchError,
    CoefficientCountError,
    CoefficientValueError,
    MergeError,
)
from randbasis.tuner.adapter_names import adapter_of, belongs_to
from randbasis.tuner.config import RandbasisConfig
from randbasis.tuner.layer import RandbasisLinear
from randbasis.tuner.meaning import MEANING, HeldMeaning, holder_of, meaning_of, warn_of_no_meaning
from randbasis.tuner.registration import PREFIX, TYPE_NAME
from randbasis.tuner.saved_files import CONFIG_FILE, check_adapter_files, read_config_file
from randbasis.tuner.seen_adapters import seeing_only
from randbasis.tuner.tied import matrices_of

_STREAMS = f".{PREFIX}streams."


def adapted_layers(model: nn.Module) -> list[tuple[str, RandbasisLinear]]:
    """Module path and layer of all adapted layers of a model."""
    with seeing_only():
        modules = cast("Iterator[tuple[str, nn.Module]]", model.named_modules())
        return [(key, module) for key, module in modules if isinstance(module, RandbasisLinear)]


# --- what the coefficients of a model mean ---


def place_meaning(model: nn.Module, adapter: str, config: RandbasisConfig) -> None:
    """Let one layer of an adapter hold what its coefficients mean, and have it compared whenever a state is loaded."""
    layers = {key: layer for key, layer in adapted_layers(model) if adapter in layer.adapted}
    if not layers:
        return
    matrices = [matrix for key, layer in layers.items() for _, matrix in matrices_of(adapter, key, layer)]
    weights = config.run.made_for.get("base_weights")
    meaning = meaning_of(config.method_for(""), config.quantize_coefficients, matrices, weights, tie=config.tie)
    holder = holder_of(layers)
    for key, layer in layers.items():
        layer.hold_meaning(adapter, meaning if key == holder else None)
    if not _our_hooks(model):
        model.register_load_state_dict_pre_hook(_compare_before_load)


def forget_hooks(model: nn.Module) -> None:
    """Take off what :func:`place_meaning` hooked on a model that has no adapted layer any more."""
    for number in _our_hooks(model):
        del model._load_state_dict_pre_hooks[number]  # pyright: ignore[reportPrivateUsage]


def _our_hooks(model: nn.Module) -> list[int]:
    hooks = cast("Mapping[int, Any]", model._load_state_dict_pre_hooks)  # pyright: ignore[reportPrivateUsage]
    return [number for number, one in hooks.items() if getattr(one, "hook", one) is _compare_before_load]


def _compare_before_load(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Before the first tensor of a model is written, so that a refusal leaves all of them."""
    with_coefficients: set[str] = set()
    meanings: dict[str, list[str]] = {}
    for name, tensor in state_dict.items():
        adapter = adapter_of(name) if name.startswith(prefix) else None
        if adapter is None:
            continue
        if _STREAMS in name:
            check_streams(name, tensor)
        elif name.endswith(f".{MEANING}.{adapter}.weight"):
            # Wrappers of checkpointing, sharding and compilation change the middle of a key, never its end.
            meanings.setdefault(adapter, []).append(name)
        else:
            with_coefficients.add(adapter)
    for key, layer in adapted_layers(model):
        for adapter, held in cast("Iterator[tuple[str, HeldMeaning]]", layer.randbasis_meaning.items()):
            own = f"{prefix}{key}.{MEANING}.{adapter}.weight"
            there = [own] if own in state_dict else meanings.get(adapter, [])
            for name in there:
                held.check(state_dict[name])
            if not there and adapter in with_coefficients:
                warn_of_no_meaning(held.meaning, held.adapter)


# --- a state dict through PEFT ---


def check_loaded(model: nn.Module, adapter: str, state_dict: dict[str, Tensor]) -> None:
    """Raise unless a state dict has exactly this adapter's tensors, of the right shapes, finite and of its meaning.

    Args:
        model: the model.
        adapter: name of the adapter.
        state_dict: keys as in the model; a meaning that it lacks is added, after a warning.
    """
    check_unmerged(model, adapter)
    with seeing_only(adapter):
        own = {key: tensor for key, tensor in model.state_dict().items() if belongs_to(key, adapter)}
    wanted = {key: tensor for key, tensor in own.items() if f".{MEANING}." not in key}
    missing = sorted(wanted.keys() - state_dict.keys())
    if missing:
        foreign = sorted(key for key in state_dict if f".{PREFIX}" not in key)
        also = f"; it has tensors that no method of randbasis writes, such as {foreign[0]!r}" if foreign else ""
        raise AdapterFilesError(
            f"the adapter's tensors must be complete, {len(missing)} are missing, the first is {missing[0]!r}{also}; "
            "load a directory written by save_pretrained for this base model and these targets"
        )
    extra = sorted(key for key in state_dict.keys() - own.keys() if f".{PREFIX}" in key)
    if extra:
        raise BaseMismatchError(
            f"the adapter has {len(extra)} tensors for layers that this model does not have, or that are no targets of "
            f"its adapter_config.json, the first is {extra[0]!r}; load it on the base model it was made for"
        )
    for key, tensor in wanted.items():
        found = state_dict[key]
        if tuple(found.shape) != tuple(tensor.shape):
            raise CoefficientCountError(
                f"{key} must have shape {list(tensor.shape)} by the adapter's rank and basis, got {list(found.shape)}; "
                "the coefficients and adapter_config.json do not belong together"
            )
        _check_values(key, found)
    for key in own.keys() - wanted.keys():
        held = held_meaning(model, adapter)
        if key in state_dict:
            held.check(state_dict[key])
        else:
            warn_of_no_meaning(held.meaning, held.adapter)
            state_dict[key] = own[key]


def _check_values(key: str, found: Tensor) -> None:
    if _STREAMS in key:
        check_streams(key, found)
    _check_finite(key, found)


def _check_finite(key: str, found: Tensor) -> None:
    if found.is_floating_point() and not bool(torch.isfinite(found).all()):
        raise CoefficientValueError(
            f"{key} has values that are not finite; the training diverged or the file is damaged: "
            "use an earlier checkpoint"
        )


def held_meaning(model: nn.Module, adapter: str) -> HeldMeaning:
    """What the coefficients of an adapter of a model mean."""
    found = (layer.randbasis_meaning for _, layer in adapted_layers(model))
    return cast("HeldMeaning", next(one[adapter] for one in found if adapter in one))


def check_unmerged(model: nn.Module, adapter: str) -> None:
    """Raise where other coefficients of an adapter would change nothing, since ΔW of those it has is in the weights.

    Raises:
        MergeError: it is merged.
    """
    for key, layer in adapted_layers(model):
        if adapter in layer.merged_adapters:
            raise MergeError(
                f"an adapter must not be merged when its coefficients are replaced, {adapter!r} is, into {key!r}: the "
                "model would go on with the old ones; call unmerge_adapter first, or load under another name"
            )


# --- transformers' own loader ---


def check_native_loading() -> None:
    """Have ``load_adapter`` of transformers compare what it loaded of our adapters, and undo what is refused.

    It reads a file past PEFT and every hook, and a tensor that is missing is a line in its log. Repeated calls change
    nothing; adapters of others are loaded as ever.
    """
    load = cast("Callable[..., Any]", PeftAdapterMixin.load_adapter)
    if not hasattr(load, "checked_by_randbasis"):
        PeftAdapterMixin.load_adapter = _checked(load)


def _checked(load: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(load)
    def load_adapter(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        adapter = kwargs.get("adapter_name", args[1] if len(args) > 1 else None) or "default"
        if adapter in getattr(self, "peft_config", {}):
            return load(self, *args, **kwargs)
        _check_folder(args[0] if args else kwargs.get("peft_model_id"), kwargs)
        before = {key: parameter.requires_grad for key, parameter in _parameters(self)}, self.training
        done = False
        try:
            info = load(self, *args, **kwargs)
            _compare_after_load(self, adapter, info)
            done = True
        finally:
            if not done:
                _take_off(self, adapter, *before)
        return info

    cast("Any", load_adapter).checked_by_randbasis = True
    return load_adapter


def _check_folder(source: Any, options: Mapping[str, Any]) -> None:
    """A folder of ours without coefficients, or with a pickle alone, is refused before the model is changed."""
    told: dict[str, Any] = getattr(options.get("load_config"), "download_kwargs", None) or {}
    merged: dict[str, Any] = {**told, **options, **(options.get("adapter_kwargs") or {})}
    inner: str = merged.get("subfolder") or ""
    if source is None or not Path(source, inner, CONFIG_FILE).is_file():
        return
    if options.get("adapter_state_dict") is None and options.get("peft_config") is None:
        folder = Path(source, inner)
        if read_config_file(folder).get("peft_type") == TYPE_NAME:
            check_adapter_files(folder)


def _compare_after_load(model: nn.Module, adapter: str, info: Any) -> None:
    layers = [(key, layer) for key, layer in adapted_layers(model) if adapter in layer.adapted]
    if not layers:
        return
    missing = sorted(key for key in getattr(info, "missing_keys", ()) if belongs_to(key, adapter))
    if coefficients := [key for key in missing if f".{MEANING}." not in key]:
        raise AdapterFilesError(
            f"the adapter's tensors must be complete, {len(coefficients)} are missing, the first is "
            f"{coefficients[0]!r}; load a directory written by save_pretrained for this base model and these targets, "
            "or with PeftModel.from_pretrained where a version of transformers loads no adapter on this model"
        )
    extra = sorted(key for key in getattr(info, "unexpected_keys", ()) if f".{PREFIX}" in key)
    if extra:
        raise BaseMismatchError(
            f"the adapter has {len(extra)} tensors for layers that this model does not have, or that are no targets of "
            f"its adapter_config.json, the first is {extra[0]!r}; load it on the base model it was made for"
        )
    for key, layer in layers:
        for one in layer.matrices(adapter):  # reads the streams, and refuses what a cast has made of them
            for name, values in layer.trained_coefficients(adapter, one).items():
                _check_finite(f"{key}.{PREFIX}{name}", values)
    held = held_meaning(model, adapter)
    if missing:
        warn_of_no_meaning(held.meaning, held.adapter)
    held.check()


def _take_off(model: Any, adapter: str, trained: Mapping[str, bool], training: bool) -> None:
    """A model that transformers had begun to put an adapter of ours on, as it was before."""
    layers = adapted_layers(model)
    if not any(adapter in layer.adapted for _, layer in layers):
        return
    others = {name for _, layer in layers for name in layer.adapted} - {adapter}
    model._hf_peft_config_loaded = True
    model.delete_adapter(adapter)
    if not others:
        for key, module in list(cast("Iterator[tuple[str, Any]]", model.named_modules())):
            parent, _, child = key.rpartition(".")
            if isinstance(module, RandbasisLinear):
                setattr(model.get_submodule(parent), child, module.base_layer)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                setattr(model.get_submodule(parent), child, module.original_module)
        forget_hooks(model)
    for key, parameter in _parameters(model):
        parameter.requires_grad_(trained.get(key, parameter.requires_grad))
    model.train(training)


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return model.named_parameters()

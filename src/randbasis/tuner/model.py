"""Adapters in a model, through PEFT: injection, mixed batches, weighted combinations, checked loading."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,  # pyright: ignore[reportPrivateUsage]
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    peft_types,
)
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import _set_adapter  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from randbasis.contraction import check_order
from randbasis.errors import (
    AdapterFilesError,
    AdapterNameError,
    BaseMismatchError,
    CoefficientCountError,
    CoefficientValueError,
    CombinationError,
    LayerTypeError,
    TargetError,
    near,
)
from randbasis.tuner.adapted_matrix import BASE, AdapterOptions
from randbasis.tuner.adapter_dir import PICKLE_FILE, WEIGHTS_FILE, check_adapter_files, tensor_shapes
from randbasis.tuner.base_shapes import compress_shapes, expected_shape
from randbasis.tuner.base_weight import layer_shape
from randbasis.tuner.config import RandbasisConfig
from randbasis.tuner.layer import RandbasisLinear
from randbasis.tuner.places import check_places
from randbasis.tuner.registration import PREFIX, TYPE_NAME
from randbasis.tuner.switching import activate
from randbasis.tuner.targets import parts_of, resolve_parts

_MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba")
_MAMBA_UNUSED_FORWARD = ("out_proj", "conv1d")


class RandbasisModel(BaseTuner):
    """A model whose linear layers carry adapters of the methods of this package; made by ``get_peft_model``.

    Several adapters may differ in method, seed, rank, law and targets.
    """

    prefix: str = PREFIX
    tuner_layer_cls = RandbasisLinear
    target_module_mapping = cast("dict[str, list[str]]", TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)
    model: nn.Module
    trained_before: frozenset[str] | None = None
    """Names of the parameters that trained before the first adapter froze them."""
    _known_layers: list[RandbasisLinear] | None = None
    """The adapted layers, once they were looked for; a new adapter may add some."""

    # --- injection ---

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        config = cast("RandbasisConfig", peft_config)
        if config.target_modules is None and model_config.get("model_type") not in self.target_module_mapping:
            raise TargetError(
                "Please specify `target_modules` in `peft_config`: there is no usual choice for model type "
                f"{model_config.get('model_type')!r}; name modules, or use target_modules='all-linear'"
            )
        return super()._prepare_adapter_config(config, model_config)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Check every target before the first is replaced, so that a refusal leaves the model as it was."""
        if self.trained_before is None:
            self.trained_before = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
        config = cast("RandbasisConfig", peft_config)
        if config.target_modules == DUMMY_TARGET_MODULES:
            return
        if config.folder is not None and config.base_shapes is not None and not (config.folder / PICKLE_FILE).is_file():
            # Saved with coefficients beside it, which PEFT looks for only after it has changed the model.
            check_adapter_files(config.folder)
            shapes = tensor_shapes(config.folder / WEIGHTS_FILE)
            check_places(model, shapes, str(config.folder), config.modules_to_save or ())
        _maybe_include_all_linear_layers(config, model)
        modules = dict(_named_modules(model))
        inside = tuple(f"{key}." for key, module in modules.items() if isinstance(module, BaseTunerLayer))
        matched = [
            key
            for key in modules
            if key and not key.startswith(inside) and self._check_target_module_exists(config, key)
        ]
        if not matched:
            raise _nothing_matched(config, list(modules))
        for key in matched:
            self._check_target(config, key, modules[key])

    def _check_target(self, config: RandbasisConfig, key: str, module: nn.Module) -> None:
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        shape = layer_shape(base)
        if shape is None:
            raise LayerTypeError(
                f"target_modules matches {key!r}, a {type(base).__name__}, but only linear layers can be adapted "
                "(nn.Linear, Conv1D, quantized linear); leave it out, or train it whole with modules_to_save"
            )
        expected = expected_shape(config.base_shapes, key)
        if expected is not None and expected != shape:
            raise BaseMismatchError(
                f"this adapter was made for another base model: the first matrix that differs is {key!r}, "
                f"{expected[0]}×{expected[1]} there and {shape[0]}×{shape[1]} here (out×in); "
                f"load it on {config.base_model_name_or_path or 'the base model it was made for'}"
            )
        config.method_for(key)
        resolve_parts(key, parts_of(key, config.target_slices), shape[0], self._model_config())

    def _model_config(self) -> Mapping[str, Any]:
        config = cast("dict[str, Any]", self.get_model_config(self.model))
        text = cast("dict[str, Any]", config.get("text_config") or {})
        return {**config, **text}

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        model_type = self._model_config().get("model_type")
        if model_type in _MAMBA_TYPES and target_name in _MAMBA_UNUSED_FORWARD:
            raise TargetError(
                f"target {target_name!r} of model type {model_type!r} cannot be adapted: its weight is used without "
                "calling the layer, so an adapter would have no effect; leave it out of target_modules"
            )

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast("RandbasisConfig", peft_config)
        self._check_target(config, current_key, target)
        options = AdapterOptions(
            config.dropout, check_order(config.contraction), config.init_weights, config.quantize_coefficients
        )
        adds_to_ours = isinstance(target, RandbasisLinear)
        layer = target if adds_to_ours else RandbasisLinear(target, get_quantization_kwargs(cast("Any", self)))
        parts = resolve_parts(
            current_key, parts_of(current_key, config.target_slices), layer.out_features, self._model_config()
        )
        if not adds_to_ours:
            layer.set_adapter(adapter_name)
        layer.update_layer(adapter_name, config.method_for(current_key), parts, current_key, options)
        if not adds_to_ours:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, and note which layers of which shapes the adapter is made for."""
        self._known_layers = None
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        shapes: dict[str, tuple[int, int]] = {}
        rows: dict[str, tuple[int, int]] = {}
        for key, layer in _named_modules(model):
            if isinstance(layer, RandbasisLinear) and adapter_name in layer.adapted:
                shapes[key] = layer.out_features, layer.in_features
                parts = [one.part for one in layer.adapted[adapter_name] if one.part.name]
                rows |= {f"{key}[{part.name}]": (part.start, part.stop) for part in parts}
        config = cast("RandbasisConfig", self.peft_config[adapter_name])
        config.made_for = compress_shapes(shapes)
        config.made_for_rows = compress_shapes(rows) or None
        config.made_for_type = cast("dict[str, Any]", self.get_model_config(self.model)).get("model_type")

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's, several times quicker.

        Args:
            adapter_name: one name, or several that are active together.
            inference_mode: leave them frozen.
        """
        if self._known_layers is None:
            self._known_layers = list(self._layers())
        configs = cast("dict[str, RandbasisConfig]", self.peft_config).values()
        if any(config.modules_to_save for config in configs):
            _set_adapter(self.model, adapter_name, inference_mode=inference_mode)
        activate(self._known_layers, adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Coefficients are float32; without ``autocast_adapter_dtype`` they take the dtype of their base layer."""
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=True)
            return
        for layer in self._layers():
            layer.cast_to_base(adapter_name)

    # --- mixed batches ---

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Generator[None]:
        """Give every adapted layer the ``adapter_names`` of a batch for the length of one call."""
        adapter_names: list[str] | None = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        self._check_adapter_names(adapter_names)
        beams = kwargs.get("num_beams")
        repeats = beams if isinstance(beams, int) else 1
        repeated = [name for name in adapter_names for _ in range(repeats)]
        in_encoder = self._encoder_modules() if repeats > 1 else set[nn.Module]()
        handles: list[Any] = []
        try:
            for module in self.modules():
                if isinstance(module, (RandbasisLinear, AuxiliaryTrainingWrapper)):
                    # Beam search repeats the rows of the decoder, never those of an encoder.
                    names = list(adapter_names) if module in in_encoder else repeated
                    hook = partial(_pass_adapter_names, adapter_names=names)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _encoder_modules(self) -> set[nn.Module]:
        """Modules of the encoder of an encoder-decoder model."""
        if not hasattr(self.model, "get_encoder"):
            return set()
        encoder = cast("Any", self.model).get_encoder()
        return set(encoder.modules()) if isinstance(encoder, nn.Module) and encoder is not self.model else set()

    def _check_adapter_names(self, adapter_names: Sequence[str]) -> None:
        if self.training:
            raise AdapterNameError(
                "Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first."
            )
        if isinstance(adapter_names, str):
            raise AdapterNameError(
                f"adapter_names must be a list with one name for each row, got the string {adapter_names!r}; "
                f"write [{adapter_names!r}] * batch_size"
            )
        known = {name for layer in self._layers() for name in layer.adapted}
        unknown = sorted(set(adapter_names) - known - {BASE})
        if unknown:
            raise AdapterNameError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; "
                f"{near(unknown[0], known | {BASE})}"
            )

    def _layers(self) -> Iterator[RandbasisLinear]:
        return (module for module in self.model.modules() if isinstance(module, RandbasisLinear))

    # --- merging ---

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's, but all layers or none: every layer is checked before the first is written.

        Raises:
            MergeError: a layer cannot be merged, or safe_merge found a value that is not finite.
        """
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        for layer in self._layers():
            layer.check_merge(adapter_names, safe_merge=safe_merge)

    # --- combinations ---

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        **_: Any,
    ) -> None:
        """Add an adapter whose coefficients are a weighted sum of those of others with the same basis.

        Coefficients of one seed, law and shape are a vector space, so their means and differences are adapters. For
        PRANC, ΔW is linear in them and the result is exactly the weighted sum of the ΔW; for the other methods it is a
        point between the adapters, as LoRA's ``"linear"`` is.

        Args:
            adapters: names of the adapters.
            weights: one factor for each.
            adapter_name: name of the new adapter; nothing happens when it exists.
            combination_type: only ``"linear"``.

        Raises:
            AdapterNameError: an adapter does not exist.
            CombinationError: the adapters differ in more than their coefficients, or the type has no meaning here.
        """
        if adapter_name in self.peft_config:
            return
        self._check_combination(adapters, weights, combination_type)
        config = cast("RandbasisConfig", self.peft_config[adapters[0]])
        self.peft_config[adapter_name] = type(config)(**config.to_dict())
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            for layer in self._layers():
                layer.copy_streams(adapters[0], adapter_name)
                for index, one in enumerate(layer.matrices(adapter_name)):
                    for name, target in layer.trained_coefficients(adapter_name, one).items():
                        target.zero_()
                        for source, weight in zip(adapters, weights, strict=True):
                            their = layer.matrices(source)[index]
                            target.add_(layer.trained_coefficients(source, their)[name], alpha=weight)

    def _check_combination(self, adapters: list[str], weights: list[float], combination_type: str) -> None:
        for name in adapters:
            if name not in self.peft_config:
                raise AdapterNameError(f"Adapter {name} does not exist; {near(name, self.peft_config)}")
        if not adapters or len(adapters) != len(weights):
            raise CombinationError(
                f"weights must have one entry for each adapter, got {len(adapters)} adapters and {len(weights)} weights"
            )
        if combination_type != "linear":
            raise CombinationError(
                f"combination_type must be 'linear', got {combination_type!r}: other combinations of adapters have no "
                "coefficients on this basis; convert them with peft.convert_to_lora and combine the LoRA adapters"
            )
        for layer in self._layers():
            first = [(one.method, one.matrix, one.part) for one in layer.matrices(adapters[0])]
            for name in adapters[1:]:
                if [(one.method, one.matrix, one.part) for one in layer.matrices(name)] != first:
                    raise CombinationError(
                        "adapters must share method, seed, law, rank and targets to be combined, "
                        f"{name!r} differs from {adapters[0]!r}: coefficients on different bases cannot be added; "
                        "convert both with peft.convert_to_lora and combine the LoRA adapters"
                    )

    # --- loading ---

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As PEFT's, after a check of names, counts and values.

        A refused adapter is taken off the model again if it was put there to be loaded; one that was there before
        stays with the coefficients that it had.
        """
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        ours = cast("RandbasisConfig", config)
        try:
            _check_loaded(model, adapter_name, remapped)
        except (AdapterFilesError, BaseMismatchError, CoefficientCountError, CoefficientValueError):
            if not ours.restored and (ours.inference_mode or ours.base_shapes is not None):
                _take_off(model, adapter_name)
            raise
        ours.restored, ours.folder = True, None
        return remapped


def _named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(cast("Iterator[tuple[str, nn.Module]]", model.named_modules()))


def _pass_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kwargs["adapter_names"] = adapter_names
    return args, kwargs


def _nothing_matched(config: RandbasisConfig, keys: list[str]) -> TargetError:
    names = {key.rpartition(".")[2] for key in keys if key and not key.rpartition(".")[2].isdigit()}
    if isinstance(config.target_modules, str):
        hint = "a string is one regular expression for whole module names; or pass a list of names"
        wanted = repr(config.target_modules)
    else:
        listed = sorted(config.target_modules or [])
        hint = near(listed[0].rpartition(".")[2], names) if listed else "name at least one module"
        wanted = str(listed)
    return TargetError(f"Target modules {wanted} not found in the base model: {hint}")


def _check_loaded(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Raise unless a state dict has exactly this adapter's tensors, of the right shapes and finite."""
    wanted = {
        key: tensor
        for key, tensor in model.state_dict().items()
        if f".{PREFIX}" in f".{key}" and f".{adapter_name}." in key
    }
    missing = sorted(wanted.keys() - state_dict.keys())
    if missing:
        foreign = sorted(key for key in state_dict if f".{PREFIX}" not in key)
        also = f"; it has tensors that no method of randbasis writes, such as {foreign[0]!r}" if foreign else ""
        raise AdapterFilesError(
            f"the adapter's tensors must be complete, {len(missing)} are missing, the first is {missing[0]!r}{also}; "
            "load a directory written by save_pretrained for this base model and these targets"
        )
    extra = sorted(key for key in state_dict.keys() - wanted.keys() if f".{PREFIX}" in key)
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
        if found.is_floating_point() and not bool(torch.isfinite(found).all()):
            raise CoefficientValueError(
                f"{key} has values that are not finite; the training diverged or the file is damaged: "
                "use an earlier checkpoint"
            )


def _take_off(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter that could not be loaded; the last one takes our layers with it."""
    tuner = next((module for module in model.modules() if isinstance(module, RandbasisModel)), None)
    if tuner is None or adapter_name not in tuner.peft_config:
        return
    if len(tuner.peft_config) == 1:
        base = tuner.unload()
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name in (tuner.trained_before or ()))
    else:
        tuner.delete_adapter(adapter_name)


def register() -> None:
    """Make PEFT know the methods of this package; repeated calls change nothing.

    Raises:
        RegistrationError: PEFT's list of methods does not take another.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if TYPE_NAME not in PEFT_TYPE_TO_CONFIG_MAPPING:
        cast("Any", peft_types).register_peft_method(
            name=TYPE_NAME.lower(), config_cls=RandbasisConfig, model_cls=RandbasisModel, prefix=PREFIX
        )

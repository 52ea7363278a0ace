"""Adapters in a model, through PEFT: injection, mixed batches, weighted combinations, checked loading."""

import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from peft.utils.constants import DUMMY_TARGET_MODULES, INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import _set_adapter  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from randbasis.batch_rows import BASE, given_rows, rows_of_a_prompt
from randbasis.contraction import check_order
from randbasis.errors import AdapterNameError, RandbasisError, TargetError, near
from randbasis.rounding import check_rounding
from randbasis.tuner.adapted_part import AdapterOptions
from randbasis.tuner.adapter_names import adapter_of, belongs_to, check_name, path_words, without_adapter
from randbasis.tuner.base_weight import check_weights
from randbasis.tuner.bypasses import check_reached, leave_out_bypassed
from randbasis.tuner.checked_loading import (
    adapted_layers,
    check_loaded,
    check_native_loading,
    forget_hooks,
    place_meaning,
)
from randbasis.tuner.chosen_targets import Target, check_target, nothing_matched
from randbasis.tuner.combining import check_combination, combine_coefficients
from randbasis.tuner.config import RandbasisConfig
from randbasis.tuner.coverage import names_any, warn_of_gaps
from randbasis.tuner.fast_paths import Switched, call_every_layer
from randbasis.tuner.gradient_watch import GradientWatch
from randbasis.tuner.heads import check_heads, combine_heads, put_back_heads
from randbasis.tuner.joint_factors import JointFactors, take_hooks_off
from randbasis.tuner.layer import RandbasisLinear
from randbasis.tuner.layer_adapters import frozen_weight
from randbasis.tuner.made_for import made_for
from randbasis.tuner.mixed_batch import MixedBatch, layout_of, pass_names, sending
from randbasis.tuner.pickles import refuse_pickles
from randbasis.tuner.places import check_places
from randbasis.tuner.registration import PREFIX, TYPE_NAME
from randbasis.tuner.saved_files import PICKLE_FILE, WEIGHTS_FILE, check_adapter_files, tensor_shapes
from randbasis.tuner.seen_adapters import seeing_only
from randbasis.tuner.switching import activate
from randbasis.tuner.tied import check_targets, tie_coefficients

_WRAPPERS = threading.Lock()


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
    _checked: dict[str, Target]
    """Layers of the adapter that is being put on that were checked, and are not yet replaced."""
    _known_layers: list[RandbasisLinear] | None = None
    """The adapted layers, once they were looked for; a new adapter may add some."""
    _usual_names: bool = False
    """Whether the names of the adapter that is being put on are PEFT's usual ones."""
    _new: str | None = None
    """The adapter that is being put on."""
    _watch: GradientWatch | None = None
    _switched: tuple[Switched, ...] = ()
    """Fast paths of the model that go past its layers and are off."""

    # --- injection ---

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        config = cast("RandbasisConfig", peft_config)
        self._usual_names = config.target_modules is None
        if config.target_modules is None and model_config.get("model_type") not in self.target_module_mapping:
            raise TargetError(
                "Please specify `target_modules` in `peft_config`: there is no usual choice for model type "
                f"{model_config.get('model_type')!r}; name modules, or use target_modules='all-linear'"
            )
        return super()._prepare_adapter_config(config, model_config)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Check every target before the first is replaced, so that a refusal leaves the model as it was."""
        if self.trained_before is None:
            self.trained_before = frozenset([name for name, p in model.named_parameters() if p.requires_grad])
        config = cast("RandbasisConfig", peft_config)
        self._checked = {}
        if config.target_modules == DUMMY_TARGET_MODULES:
            return
        folder = config.run.folder
        if folder is not None and (config.base_shapes or (folder / PICKLE_FILE).is_file()):
            # Saved with coefficients beside it, which PEFT looks for only after it has changed the model.
            check_adapter_files(folder)
            check_places(model, tensor_shapes(folder / WEIGHTS_FILE), str(folder), config.modules_to_save or ())
        all_linear = str(config.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
        _maybe_include_all_linear_layers(config, model)
        modules = dict(_named_modules(model))
        if all_linear:
            config.target_modules = leave_out_bypassed(model, cast("set[str]", config.target_modules))
        matched = self._matched(config, modules)
        if not matched:
            raise nothing_matched(config, list(modules))
        if config.run.stored is not None:
            config.run.stored.check(matched)
        model_config = self._model_config()
        self._checked = {key: check_target(config, key, modules[key], model_config) for key in matched}
        check_reached(model, matched)
        check_targets(self._checked, modules, config.tie)
        if config.base_weights is not None:
            own = {key: (frozen_weight(modules[key]), parts) for key, (_, parts) in self._checked.items()}
            check_weights(config.base_weights, own, config.base_model_name_or_path)
        names = config.target_modules
        if (self._usual_names or all_linear) and not isinstance(names, str):  # PEFT's: the user may have excluded some
            config.target_modules = {name for name in names or () if names_any(name, matched)}
        warn_of_gaps(model, config, matched, all_linear=all_linear)

    def _matched(self, config: RandbasisConfig, modules: Mapping[str, nn.Module]) -> list[str]:
        inside = tuple([f"{key}." for key, module in modules.items() if isinstance(module, BaseTunerLayer)])
        return [
            key
            for key in modules
            if key and not key.startswith(inside) and self._check_target_module_exists(config, key)
        ]

    def _model_config(self) -> Mapping[str, Any]:
        return cast("dict[str, Any]", self.get_model_config(self.model))

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        """Nothing more: every target was checked before the first was replaced."""

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
        # A state dict may name other layers than the configuration picks.
        checked = self._checked.pop(current_key, None)
        method, parts = checked or check_target(config, current_key, target, self._model_config())
        options = AdapterOptions(
            config.dropout,
            check_order(config.contraction),
            config.init_weights,
            config.quantize_coefficients,
            check_rounding(config.fuse_rounding),
        )
        adds_to_ours = isinstance(target, RandbasisLinear)
        layer = target if adds_to_ours else RandbasisLinear(target, get_quantization_kwargs(cast("Any", self)))
        if not adds_to_ours:
            layer.set_adapter(adapter_name)
            layer.train(target.training)  # PEFT's layers drop inputs in a model that evaluates
            layer.rows_first = layout_of(self.model) == "rows first"
        layer.update_layer(adapter_name, method, parts, current_key, options)
        if not adds_to_ours:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, and note which layers of which shapes the adapter is made for, and what its coefficients mean.

        Raises:
            AdapterNameError: the adapter cannot have this name.
        """
        others = {name: one for name, one in self.peft_config.items() if name != adapter_name}
        self._known_layers, self._new = None, adapter_name
        try:
            with seeing_only(adapter_name):
                check_name(adapter_name, model, others, self.peft_config[adapter_name])
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                config = cast("RandbasisConfig", self.peft_config[adapter_name])
                tie_coefficients(adapter_name, adapted_layers(model), config.tie)
                self._see_to_calls(model)
                config.run = replace(config.run, made_for=made_for(model, adapter_name, config, self._model_config()))
                place_meaning(model, adapter_name, config)
        finally:
            self._new = None

    def _see_to_calls(self, model: nn.Module) -> None:
        """Turn off what would go past the adapted layers, and watch whether they train."""
        self._switched += tuple(call_every_layer(model))
        JointFactors.on(model)
        if self._watch is not None:
            self._watch.stop()
        self._watch = GradientWatch(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        if self._watch is not None:
            self._watch.start()  # PEFT calls the model's forward itself, which no hook sees
        return cast("Any", super()).forward(*args, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a module in the place of another; PEFT's would also take the weight of a head, which may have none."""
        setattr(parent, child_name, new_module)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's, several times quicker.

        Args:
            adapter_name: one name, or several that are active together.
            inference_mode: leave them frozen.
        """
        if self._known_layers is None:
            self._known_layers = self._layers()
        configs = cast("dict[str, RandbasisConfig]", self.peft_config).values()
        if any(config.modules_to_save for config in configs):
            _set_adapter(self.model, adapter_name, inference_mode=inference_mode)
        activate(self._known_layers, adapter_name, inference_mode=inference_mode, new=self._new)
        if self._watch is not None:
            self._watch.forget()
        self.active_adapter = adapter_name

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Coefficients are float32; without ``autocast_adapter_dtype`` they take the dtype of their base layer."""
        if autocast_adapter_dtype:
            with seeing_only(adapter_name):
                super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=True)
            return
        for layer in self._layers():
            layer.cast_to_base(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's."""
        with seeing_only():
            super().delete_adapter(adapter_name)

    # --- mixed batches ---

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Generator[None]:
        """Let every adapted layer see the ``adapter_names`` of a batch for the length of one call, in its thread."""
        adapter_names: list[str] | None = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        with seeing_only():
            batch = self._mixed_batch(adapter_names, args, kwargs)
        with sending(batch):
            yield

    def _mixed_batch(self, adapter_names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> MixedBatch:
        everything = list(self.modules())  # the one walk of a call; what is cut out or copied in meanwhile is seen
        layers = [module for module in everything if isinstance(module, RandbasisLinear)]
        self._check_adapter_names(adapter_names, layers)
        wrappers = [module for module in everything if isinstance(module, AuxiliaryTrainingWrapper)]
        for wrapper in wrappers:
            _let_names_pass(wrapper)
        rows = given_rows(args, kwargs)
        layout = layout_of(self.model, everything)
        if layout != "unknown" and rows is not None and rows != len(adapter_names):
            raise AdapterNameError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {rows} respectively; give one name for each row of the batch"
            )
        # PEFT hands the inputs over to generation, but not to every forward pass, which repeats no rows.
        repeats = rows_of_a_prompt(self.model, kwargs) if rows is not None or "pixel_values" in kwargs else 1
        return MixedBatch(tuple(adapter_names), repeats, layout, frozenset(map(id, (*layers, *wrappers))))

    def _check_adapter_names(self, adapter_names: Sequence[str], layers: Sequence[RandbasisLinear]) -> None:
        if self.training:
            raise AdapterNameError(
                "Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first."
            )
        if isinstance(adapter_names, str):
            raise AdapterNameError(
                f"adapter_names must be a list with one name for each row, got the string {adapter_names!r}; "
                f"write [{adapter_names!r}] * batch_size"
            )
        asked = set(adapter_names) - {BASE}
        unknown = sorted(name for name in asked if not any(name in layer.adapted for layer in layers))
        if unknown:
            known = {name for layer in layers for name in layer.adapted}
            raise AdapterNameError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; "
                f"{near(unknown[0], known | {BASE})}"
            )

    def _layers(self) -> list[RandbasisLinear]:
        return [layer for _, layer in adapted_layers(self.model)]

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
        else:
            put_back_heads(self.model)
        base = cast("Any", super())._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        if self._watch is not None:
            self._watch.stop()
        take_hooks_off(base)
        forget_hooks(base)
        for switched in self._switched:
            switched.restore()
        self._switched = ()
        return base

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        for key, layer in adapted_layers(self.model):
            layer.check_merge(adapter_names, safe_merge=safe_merge, key=key)

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
        PRANC and LoRA-XS, ΔW is linear in them and the result is exactly the weighted sum of the ΔW; for the others it
        is a point between the adapters, as LoRA's ``"linear"`` is. What was trained whole beside them
        (``modules_to_save``) is combined too.

        Args:
            adapters: names of the adapters.
            weights: one factor for each.
            adapter_name: name of the new adapter; nothing happens when it exists.
            combination_type: only ``"linear"``.

        Raises:
            AdapterNameError: an adapter does not exist.
            CombinationError: the adapters differ in more than their coefficients, the type has no meaning here, or
                their heads cannot be combined: one lacks it, shapes differ, or the weights do not sum to one.
        """
        if adapter_name in self.peft_config:
            return
        layers = self._layers()
        check_combination(layers, self.peft_config, adapters, weights, combination_type)
        check_heads(self.model, adapters, weights)
        config = cast("RandbasisConfig", self.peft_config[adapters[0]])
        self.peft_config[adapter_name] = type(config)(**config.to_dict())
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            combine_coefficients(layers, adapters, weights, adapter_name)
            combine_heads(self.model, adapters, weights, adapter_name)

    # --- saving and loading ---

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """As PEFT's, and with what it lost: it drops a key when the name of another adapter is anywhere in it."""
        usual = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if not path_words(model) & set(unwanted_adapter_names):
            return usual
        own = {key: tensor for key, tensor in usual.items() if adapter_of(key) in (None, adapter_name)}
        everything = model.state_dict()
        biases = cls._get_learnable_bias_state_dict(model, everything, config)
        return {
            key: tensor for key, tensor in everything.items() if belongs_to(key, adapter_name) or key in biases
        } | own

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """By the end of a key; a head has lost the name before it comes here, but for copies that are saved with it."""
        if ".modules_to_save." in key:
            return super()._remove_adapter_name_from_key(key, adapter_name)
        return without_adapter(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As PEFT's, after a check of names, counts and values.

        A refused adapter is taken off the model again if it was put there to be loaded; one that was there before
        stays with the coefficients that it had.
        """
        with seeing_only(adapter_name):
            remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        ours = cast("RandbasisConfig", config)
        try:
            check_loaded(model, adapter_name, remapped)
        except RandbasisError:
            if not ours.run.restored and (ours.inference_mode or ours.base_shapes is not None):
                take_off(model, adapter_name)
            raise
        ours.run = replace(ours.run, restored=True, folder=None)
        return remapped


def _named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(cast("Iterator[tuple[str, nn.Module]]", model.named_modules()))


def _let_names_pass(wrapper: nn.Module) -> None:
    """Once and for all: hooks that come and go would be seen, or missed, by the calls of other threads."""
    with _WRAPPERS:
        if pass_names not in vars(wrapper)["_forward_pre_hooks"].values():
            wrapper.register_forward_pre_hook(pass_names, with_kwargs=True)


def take_off(model: nn.Module, adapter_name: str) -> None:
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
    check_native_loading()
    refuse_pickles()

"""The names of PEFT and transformers that this package overrides or reaches into, checked once at import.

Their inner names move between releases. An override whose name moved is never called, and nothing would say so: targets
would not be checked, a mixed batch would be answered by one adapter. So each name stands here with what breaks when it
moves, and a missing one is an error at import. `docs/host-names.md` shows the same table.
"""

import importlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, cast

from randbasis.errors import RegistrationError, VersionPairError

TESTED = {
    "peft": "peft>=0.21,<0.22",
    "transformers": "transformers>=5.14,<5.24",
    "accelerate": "accelerate>=1.10.1",
}
"""Ranges whose every pair works in full; those of the package are wider where a part works: :func:`name_pair`."""


@dataclass(frozen=True, slots=True)
class HostName:
    """A name of a package that adapters live in.

    Args:
        module: where it is.
        name: its dotted path there.
        breaks: what breaks when it moves.
        takes: parameters that it must have.
    """

    module: str
    name: str
    breaks: str
    takes: tuple[str, ...] = ()

    @property
    def package(self) -> str:
        """The distribution that it belongs to."""
        return self.module.partition(".")[0]

    def fault(self) -> str | None:
        """What is wrong with it in the installed version; None where it is as it should be."""
        found: Any
        try:
            found = importlib.import_module(self.module)
            for part in self.name.split("."):
                found = getattr(found, part)
        except AttributeError:
            return f"has no {self.module}.{self.name}"
        except ImportError as error:
            if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == self.package:
                return f"has no {self.module}.{self.name}"
            return f"has a {self.module} that cannot be imported ({error})"
        if not self.takes:
            return None
        parameters = inspect.signature(found).parameters
        missing = [name for name in self.takes if name not in parameters]
        return f"has a {self.module}.{self.name} without parameter {missing[0]!r}" if missing else None


def check_names(names: Iterable[HostName], ranges: Mapping[str, str] = TESTED) -> None:
    """Check that every name is there, with the parameters that are relied on.

    Args:
        names: to check.
        ranges: package → the range in which they were tested, for the message.

    Raises:
        RegistrationError: one is not; the message names it, the version, what would break, and what to install.
    """
    for one in names:
        fault = one.fault()
        if fault is not None:
            raise RegistrationError(
                f"{one.package} {version(one.package)} {fault}, which randbasis needs: {one.breaks}; "
                f"install '{ranges[one.package]}', or a newer randbasis"
            )


_TUNERS = "peft.tuners.tuners_utils"
_LAYER = "every forward pass, merge or switch of an adapted layer"
_LOADING = "saving and loading of adapters"
_QUANTIZED = "quantized base models"

PEFT_NAMES = (
    HostName(
        "peft.utils.peft_types", "PeftType._member_names_", "the type of our adapters is not a member of the list"
    ),
    HostName("peft.utils.peft_types", "PeftType._member_map_", "the type of our adapters cannot be looked up by name"),
    HostName("peft.utils.peft_types", "PeftType._value2member_map_", "a saved adapter's type cannot be looked up"),
    HostName(
        "peft.utils.peft_types",
        "register_peft_method",
        "get_peft_model and from_pretrained do not know our configurations",
        ("name", "config_cls", "model_cls", "prefix"),
    ),
    HostName("peft.mapping", "PEFT_TYPE_TO_CONFIG_MAPPING", "registering twice cannot be told from registering once"),
    HostName("peft", "get_peft_model", "adapters cannot be put on a model"),
    HostName("peft.auto", "MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "a packed adapter cannot be put on a model"),
    HostName("peft", "PeftModel.load_adapter", _LOADING),
    HostName("peft", "PeftModel.get_base_model", "a packed file cannot be put on a model"),
    HostName("peft", "PeftModel._enable_peft_forward_hooks", "adapter_names of a mixed batch are ignored"),
    HostName("peft", "PeftConfig.from_pretrained", "the folder of an adapter is not checked before a model is touched"),
    HostName("peft", "PeftConfig.save_pretrained", "the card of a saved adapter does not name this package"),
    HostName("peft", "PeftConfig.to_dict", "a saved adapter does not say the shapes that it was made for"),
    HostName("peft", "LoraConfig", "export to and import from PEFT's LoRA"),
    HostName(_TUNERS, "BaseTuner._cast_adapter_dtype", "coefficients take the dtype of a half-precision base"),
    HostName(_TUNERS, "BaseTuner._check_target_module_compatiblity", "targets without effect are adapted"),
    HostName(_TUNERS, "BaseTuner._check_target_module_exists", "targets are not checked before the first is replaced"),
    HostName(
        _TUNERS,
        "BaseTuner._create_and_replace",
        "no layer is adapted",
        ("peft_config", "adapter_name", "target", "target_name", "parent", "current_key"),
    ),
    HostName(_TUNERS, "BaseTuner._prepare_adapter_config", "usual targets of an architecture are not found"),
    HostName(_TUNERS, "BaseTuner._prepare_model", "a refused adapter leaves a model half adapted"),
    HostName(
        _TUNERS,
        "BaseTuner._remap_adapter_state_dict_for_load",
        "incomplete or foreign coefficients are loaded unchecked",
        ("model", "config", "adapter_name", "state_dict"),
    ),
    HostName(_TUNERS, "BaseTuner._replace_module", "no layer is adapted"),
    HostName(
        _TUNERS,
        "BaseTuner._unload_and_optionally_merge",
        "a merge that fails leaves a model half merged",
        ("merge", "progressbar", "safe_merge", "adapter_names"),
    ),
    HostName(
        _TUNERS,
        "BaseTuner._get_adapter_state_dict",
        "adapters called like a word of a path lose tensors when saved",
        ("model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"),
    ),
    HostName(_TUNERS, "BaseTuner._get_learnable_bias_state_dict", _LOADING, ("model", "state_dict", "config")),
    HostName(
        _TUNERS,
        "BaseTuner._remove_adapter_name_from_key",
        "adapters called like a word of a path are refused when loaded",
        ("key", "adapter_name"),
    ),
    HostName(_TUNERS, "BaseTuner.forward", "no warning about layers without a gradient"),
    HostName(_TUNERS, "BaseTuner.delete_adapter", "a refused adapter stays on the model"),
    HostName(_TUNERS, "BaseTuner.get_model_config", "parts of fused projections are not found"),
    HostName(_TUNERS, "BaseTuner.inject_adapter", "a saved adapter does not say the shapes that it was made for"),
    HostName(_TUNERS, "BaseTuner.merge_adapter", "a merge that fails leaves a model half merged"),
    HostName(_TUNERS, "BaseTuner.set_adapter", "switching takes PEFT's time", ("adapter_name", "inference_mode")),
    HostName(_TUNERS, "BaseTuner.unload", "a refused adapter stays on the model"),
    HostName(_TUNERS, "BaseTunerLayer._cast_input_dtype", _LAYER),
    HostName(_TUNERS, "BaseTunerLayer._disable_adapters", _LAYER),
    HostName(_TUNERS, "BaseTunerLayer._active_adapter", _LAYER),
    HostName(
        _TUNERS, "BaseTunerLayer._move_adapter_to_device_of_base_layer", "coefficients take the dtype of the base"
    ),
    HostName(_TUNERS, "BaseTunerLayer.active_adapters", _LAYER),
    HostName(_TUNERS, "BaseTunerLayer.adapter_layer_names", "PEFT does not find our coefficients"),
    HostName(_TUNERS, "BaseTunerLayer.delete_adapter", "factors of a deleted adapter are kept"),
    HostName(_TUNERS, "BaseTunerLayer.disable_adapters", _LAYER),
    HostName(_TUNERS, "BaseTunerLayer.get_base_layer", _LAYER),
    HostName(_TUNERS, "BaseTunerLayer.merge", "merging"),
    HostName(_TUNERS, "BaseTunerLayer.merged", _LAYER),
    HostName(_TUNERS, "BaseTunerLayer.other_param_names", "PEFT does not delete what belongs to an adapter"),
    HostName(_TUNERS, "BaseTunerLayer.set_adapter", _LAYER),
    HostName(_TUNERS, "BaseTunerLayer.set_base_weight", "merging"),
    HostName(_TUNERS, "BaseTunerLayer.supports_lora_conversion", "PEFT's own conversion to LoRA"),
    HostName(_TUNERS, "BaseTunerLayer.unmerge", "merging"),
    HostName(_TUNERS, "_maybe_include_all_linear_layers", "target_modules='all-linear'"),
    HostName(_TUNERS, "check_adapters_to_merge", "merging"),
    HostName(_TUNERS, "onload_layer", "merging into offloaded layers"),
    HostName(_TUNERS, "check_target_module_exists", "export to and import from PEFT's LoRA"),
    HostName("peft.tuners.lora", "LoraLayer", "the comparison with LoRA at few bits"),
    HostName("peft.utils", "AuxiliaryTrainingWrapper", "heads in a mixed batch"),
    HostName("peft.utils", "ModulesToSaveWrapper", "merging and combining of trained heads"),
    HostName("peft.utils.constants", "INCLUDE_LINEAR_LAYERS_SHORTHAND", "target_modules='all-linear'"),
    HostName("peft.utils", "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", "target_modules=None"),
    HostName("peft.utils", "get_peft_model_state_dict", "counting what an adapter would weigh"),
    HostName("peft.utils", "set_peft_model_state_dict", _LOADING),
    HostName("peft.utils.constants", "DUMMY_TARGET_MODULES", "adapters that are put on by their state dict"),
    HostName("peft.utils.save_and_load", "torch_load", "a pickle of ours is read"),
    HostName("peft.utils.other", "_set_adapter", "switching of heads", ("model", "adapter_name", "inference_mode")),
    HostName("peft.utils.other", "get_pattern_key", "import of a LoRA with rank_pattern"),
    HostName("peft.utils.quantization_utils", "QuantizationBackend.get_base_weight", _QUANTIZED),
    HostName("peft.utils.quantization_utils", "QuantizationBackend.maybe_clone_base_result", _QUANTIZED),
    HostName("peft.utils.quantization_utils", "get_quantization_kwargs", _QUANTIZED),
    HostName("peft.utils.quantization_utils", "quantization_extra_repr", "print(model)"),
    HostName("peft.utils.quantization_utils", "resolve_quantization_backend", _QUANTIZED),
)
"""What this package overrides or reaches into in PEFT."""

TRANSFORMERS_NAMES = (
    HostName("transformers.integrations.peft", "MIN_PEFT_VERSION", "a pair of versions that cannot work is not named"),
    HostName(
        "transformers.integrations.peft", "check_peft_version", "a pair of versions that cannot work is not named"
    ),
    HostName("transformers.modeling_utils", "load_state_dict", "a pickle of ours is read"),
    HostName("transformers.integrations.peft", "PeftAdapterMixin.load_adapter", "foreign coefficients load unchecked"),
    HostName("accelerate.hooks", "AlignDevicesHook", "layers that accelerate offloads are taken for replaced ones"),
    HostName("transformers.models.auto.modeling_auto", "MODEL_FOR_CAUSAL_LM_MAPPING", "telling decoders from encoders"),
    HostName("transformers.models.auto.modeling_auto", "MODEL_FOR_MASKED_LM_MAPPING", "telling decoders from encoders"),
    HostName("transformers.pytorch_utils", "Conv1D", "the fused projections of GPT-2"),
    HostName("transformers.utils.hub", "cached_file", "a merged model comes without its tokenizer"),
    HostName("transformers.utils", "logging.set_verbosity_error", "messages about heads that are about to be replaced"),
)
"""What the tuner reaches into in transformers; the Trainer's names stand in :mod:`randbasis.train.host_names`."""


def name_pair() -> None:
    """Where the two installed versions cannot work together, let transformers' refusal say which pair can.

    transformers' own methods for adapters (``model.add_adapter`` and six more) ask for the newest PEFT, at times for
    one that is not released, and their message names no way out. Where the versions agree, nothing is touched.
    """
    integration = cast("Any", importlib.import_module("transformers.integrations.peft"))
    try:
        integration.check_peft_version(min_version=integration.MIN_PEFT_VERSION)
    except ValueError:
        integration.check_peft_version = _refuse_pair


def _refuse_pair(min_version: str) -> None:
    raise VersionPairError(
        f"transformers {version('transformers')} takes adapters into its own models (add_adapter, set_adapter, "
        f"save_pretrained, ...) only with PEFT >= {min_version}, installed is {version('peft')}; install a pair that "
        f"works, \"pip install '{TESTED['transformers']}' '{TESTED['peft']}'\", or use peft.get_peft_model and "
        "PeftModel.from_pretrained, which work with this pair too"
    )

"""What a run needs of the machine beside this package: a device, an optimizer, trackers, a quantizer.

All of it is looked for before any work is done, so that nothing is missed an hour later.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments
from transformers.integrations import bitsandbytes, integration_utils
from transformers.quantizers import base as quantizers
from transformers.training_args import OptimizerNames

from randbasis.adapters.base_model import meta_model, read_config
from randbasis.errors import MissingPackageError, SettingError
from randbasis.train.loop_settings import LoopSettings
from randbasis.train.ranks import accelerate_device

POOLER = "pooler"
_TRACKERS = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml", "clearml": "clearml", "flyte": "flytekit"}
"""What a tracker is installed as, where that is another name."""
_PACKS = "support_avx512bf16_for_cpu"
"""Attribute of a layer of bitsandbytes: whether it may."""


def torch_device(name: str) -> torch.device:
    """The device of a name that torch knows; of ``auto`` the accelerator that is there, else the CPU.

    Raises:
        SettingError: torch knows no such device, or this machine has none.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingError(f"device {name!r} is unknown to torch; {_devices()}") from error
    count = torch.accelerator.device_count() if accelerator and device.type == accelerator.type else 0
    if device.type != "cpu" and (device.index or 0) >= count:
        raise SettingError(f"device {name!r} is not on this machine; {_devices()}")
    return device


def _devices() -> str:
    names = ["auto", "cpu"]
    if torch.accelerator.is_available():
        kind = cast("torch.device", torch.accelerator.current_accelerator()).type
        names += [f"{kind}:{index}" for index in range(torch.accelerator.device_count())]
    return f"there are: {', '.join(names)}"


def runs_on_cpu(loop: LoopSettings) -> bool:
    """Whether a run is on the CPU: because it was asked for, or because there is nothing else."""
    return loop.device.partition(":")[0] == "cpu" or not torch.accelerator.is_available()


def check_machine(loop: LoopSettings, *, processes: int = 1) -> None:
    """Raise unless this machine has what a run needs.

    Raises:
        SettingError: there is no such device, or no such tracker.
        MissingPackageError: a package is not installed; the message says how to install it.
    """
    torch_device(loop.device)
    if processes > 1 and loop.device not in ("auto", "cpu"):
        raise SettingError(f"device {loop.device!r} is one, and {processes} processes take one each; leave it out")
    check_trackers(loop.trackers)
    optimizer_class(loop)
    if loop.bits is not None:
        check_quantizer(loop.bits)


def check_trackers(names: Sequence[str]) -> None:
    """Raise unless transformers can report to all of them.

    Raises:
        SettingError: transformers knows no such tracker.
        MissingPackageError: its package is not installed.
    """
    for name in names:
        try:
            (callback,) = cast("list[Any]", integration_utils.get_reporting_integration_callbacks([name]))
        except ValueError as error:
            raise SettingError(f"report_to {name!r} is unknown: {error}") from error
        if name in cast("list[str]", integration_utils.get_available_reporting_integrations()):
            continue
        try:
            callback()  # those that say only so whether their package is there
        except (ImportError, RuntimeError) as error:
            package = _TRACKERS.get(name, name)
            raise MissingPackageError(
                f"report_to {name!r} needs {package}, which is not installed; pip install {package}"
            ) from error


def optimizer_class(loop: LoopSettings) -> tuple[Any, dict[str, Any]]:
    """The class of the optimizer and its options, as transformers has them.

    Raises:
        MissingPackageError: its package is not installed.
    """
    stock = TrainingArguments
    arguments = SimpleNamespace(
        optim=OptimizerNames(loop.optimizer),
        optim_args=None,
        learning_rate=loop.learning_rate,
        adam_beta1=stock.adam_beta1,
        adam_beta2=stock.adam_beta2,
        adam_epsilon=stock.adam_epsilon,
    )
    try:
        return Trainer.get_optimizer_cls_and_kwargs(cast(Any, arguments))
    except (ImportError, ValueError) as error:
        raise MissingPackageError(
            f"optimizer {loop.optimizer!r} needs a package that is not installed: {' '.join(str(error).split())}"
        ) from error


def check_quantizer(bits: int) -> None:
    """Raise unless bases can be read at few bits here.

    Raises:
        MissingPackageError: bitsandbytes is not installed, or has nothing for this device.
    """
    if find_spec("bitsandbytes") is None:
        raise MissingPackageError(
            f"load_in_{bits}bit needs bitsandbytes, which is not installed; pip install bitsandbytes"
        )
    try:
        bitsandbytes.validate_bnb_backend_availability(raise_exception=True)
    except (ImportError, RuntimeError) as error:
        raise MissingPackageError(
            f"load_in_{bits}bit needs a bitsandbytes that runs here: {' '.join(str(error).split())}"
        ) from error


@dataclass(frozen=True)
class Quantized:
    """How a base is read at few bits.

    Args:
        bits: of a weight: 4 (NF4) or 8.
        device: where it computes; a quantized model stays where it was read.
    """

    bits: int
    device: str = "auto"

    @classmethod
    def of(cls, bits: int | None, device: str) -> "Quantized | None":
        """How a base is read, ``None`` for full precision.

        Raises:
            MissingPackageError: see :func:`check_quantizer`.
        """
        if bits is None:
            return None
        check_quantizer(bits)
        return cls(bits, device)

    def options(self, auto: Any, name: str, dtype: torch.dtype) -> dict[str, Any]:
        """The arguments of ``from_pretrained``; what is trained whole beside the adapter stays as it is."""
        model = meta_model(read_config(name), auto)
        backbone = model.base_model_prefix
        heads = [key for key, _ in model.named_children() if key != backbone] if hasattr(model, backbone) else []
        plain = cast("list[str]", quantizers.get_keys_to_not_convert(model))
        kept = sorted({*plain, *heads, POOLER})
        config = BitsAndBytesConfig(
            load_in_4bit=self.bits == 4,
            load_in_8bit=self.bits == 8,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=kept,
        )
        return {"quantization_config": config, "device_map": {"": str(torch_device(self.device))}}

    @staticmethod
    def keep_layout(model: nn.Module) -> None:
        """Keep bitsandbytes from packing weights anew in an evaluation on the CPU: training cannot read that layout."""
        for module in model.modules():
            if hasattr(module, _PACKS):
                setattr(module, _PACKS, False)


class OneDevice(TrainingArguments):
    """Arguments for one device in a process: transformers takes the first, and cuts each batch over all others.

    Args:
        device: of :func:`torch_device`.
    """

    def __init__(self, device: torch.device, **options: Any):
        self._chosen = device
        super().__init__(**options)

    @cached_property
    def _setup_devices(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        numbered = cast("int | None", self._chosen.index) is not None
        with accelerate_device(str(self._chosen) if numbered else None):
            device = cast(torch.device, cast(Any, super())._setup_devices)
        if cast(Any, self.distributed_state).use_distributed or device.type == "cpu":
            return device
        self._n_gpu = 1
        if not numbered:
            return device
        torch.accelerator.set_device_index(self._chosen.index)
        return self._chosen

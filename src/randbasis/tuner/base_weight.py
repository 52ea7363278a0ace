"""The frozen layer under an adapter: its shape, where it lies, and its weight as it was before a merge."""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, cast

import torch
from accelerate.hooks import AlignDevicesHook
from peft.utils import quantization_utils
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from randbasis.errors import BaseMismatchError, BaseWeightError
from randbasis.ops import check_weight, weight_digest
from randbasis.tuner.saved_files import natural_order
from randbasis.tuner.targets import Part

_PLAIN_FORWARDS: Mapping[type[nn.Module], object] = {
    nn.Linear: nn.Linear.forward,
    Conv1D: cast("Any", Conv1D).forward,
}


@dataclass(frozen=True)
class BaseWeight:
    """The weight of a base layer before a merge.

    Attributes:
        base: the layer; some quantization backends put another in its place when they write.
        weight: its parameter.
        attributes: of a quantized parameter; writing a new one changes those of the old one.
        state: what 8-bit layers keep beside the parameter after their first forward pass.
    """

    base: nn.Module
    weight: Tensor
    attributes: dict[str, Any]
    state: dict[str, Any] | None

    @classmethod
    def of(cls, base: nn.Module, *, quantized: bool) -> "BaseWeight":
        """What there is to remember of a layer before its weight is written."""
        weight = cast("Tensor", base.weight)
        state = dict(vars(base.state)) if quantized and hasattr(base, "state") else None
        return cls(base, weight, dict(vars(weight)) if quantized else {}, state)

    def restore(self) -> None:
        """Put the weight back, bit for bit."""
        now = cast("Tensor", self.base.weight)
        if self.attributes:
            vars(self.weight).update(self.attributes)
            if "quant_state" in self.attributes:
                self.base.quant_state = self.attributes["quant_state"]
        elif self.weight.device != now.device or self.weight.dtype != now.dtype:
            self.weight.data = self.weight.data.to(now.device, now.dtype)  # the model was moved in between
        self.base.weight = self.weight
        if self.state is not None:
            vars(self.base.state).update(self.state)


def write_weight(base: nn.Module, merged: Tensor) -> None:
    """Give a plain layer a weight of its own: one that others have too (tied embeddings) stays theirs."""
    weight = cast("Tensor", base.weight)
    base.weight = nn.Parameter(merged, requires_grad=weight.requires_grad)


def offloaded(base: nn.Module) -> bool:
    """Whether the layer's weight is elsewhere between its forward passes, and accelerate's hook brings it."""
    hook = _device_hook(base)
    return hook is not None and bool(hook.offload)


def forward_of_its_own(base: nn.Module) -> str | None:
    """What else than the formula of a linear layer happens when the layer is called; None where nothing does.

    Hooks of accelerate that only move tensors are not counted.
    """
    if "forward" in vars(base) and _device_hook(base) is None:
        return "a forward of its own, put on the instance"
    if base._forward_hooks or base._forward_pre_hooks:  # pyright: ignore[reportPrivateUsage]
        return "forward hooks"
    plain = _PLAIN_FORWARDS.get(type(base))
    if plain is not None and type(base).forward is not plain:
        return "a forward that was replaced in its class"
    if "weight" not in base._parameters and isinstance(getattr(base, "weight", None), Tensor):  # pyright: ignore[reportPrivateUsage]
        return "a weight that is computed from others (a parametrization, weight_norm or pruning)"
    return None


def _device_hook(base: nn.Module) -> AlignDevicesHook | None:
    """Accelerate's hook that moves weights and inputs, where it is all that was hooked on the layer."""
    hook = getattr(base, "_hf_hook", None)
    old = getattr(base, "_old_forward", None)
    plain = old is None or getattr(old, "__func__", None) is type(base).forward
    return hook if type(hook) is AlignDevicesHook and plain else None


def check_derivable(key: str, base: nn.Module) -> None:
    """Raise unless frozen matrices can be made of the weight of a layer: the numbers that it computes with, at hand.

    Args:
        key: module path, for the message.
        base: the layer.

    Raises:
        BaseWeightError: it is quantized, or elsewhere between the forward passes, or not finite.
    """
    backend = quantization_of(base)
    if backend is not None:
        raise BaseWeightError(
            f"the method needs the base weight of {key!r} in full precision, got one quantized by "
            f"{backend.backend_name}: what that stands for depends on the device that unpacks it; load the base model "
            "without quantization, or use a method that draws its matrices from a seed"
        )
    if offloaded(base) and cast("Tensor", base.weight).is_meta:
        raise BaseWeightError(
            f"the method needs the base weight of {key!r} at hand, got one that is offloaded between the forward "
            "passes; load the base model without offloading, or use a method that draws its matrices from a seed"
        )
    check_weight(cast("Tensor", base.weight), f"the base weight of {key!r}")


def weights_digest(found: Iterable[tuple[str, int, str | None]]) -> str | None:
    """One digest of 16 hexadecimal digits for all weights that an adapter is made of; None where one is not at hand.

    A wrapper before all paths changes nothing, as only their order counts.

    Args:
        found: module path, first row and digest of each adapted matrix, in any order.
    """
    ordered = sorted([(natural_order(key), start, digest) for key, start, digest in found])
    digests = [digest for *_, digest in ordered if digest is not None]
    if not ordered or len(digests) < len(ordered):
        return None
    return sha256("".join(digests).encode("ascii")).hexdigest()[:16]


def check_weights(made_for: str, weights: Mapping[str, tuple[Tensor, Sequence[Part]]], base_name: str | None) -> None:
    """Raise unless a model has the weights that the frozen matrices of an adapter are made of.

    Args:
        made_for: of :func:`weights_digest`.
        weights: module path → ``W0`` of ``[out, in]`` and the parts that are adapted; none is compared on the meta
            device.
        base_name: of the base model that the adapter was made for, where one is known.

    Raises:
        BaseMismatchError: it has others; names both digests.
    """
    found = weights_digest(
        [
            (key, part.start, None if weight.is_meta else weight_digest(weight[part.start : part.stop]))
            for key, (weight, parts) in weights.items()
            for part in parts
        ]
    )
    if found is not None and found != made_for:
        raise BaseMismatchError(
            "this adapter was made for another base model: its frozen matrices are made of weights with the digest "
            f"{made_for}, the weights here have {found}; load it on {base_name or 'the base model it was made for'}, "
            "loaded in the dtype in which it was trained, since rounded weights are others"
        )


def full_weight(base: nn.Module, backend: QuantizationBackend) -> Tensor:
    """The weight of a quantized layer in floating point; the layer stays as it is.

    bitsandbytes packs a 4-bit weight anew for CPUs with AVX512-BF16 in the first forward pass of evaluation, and PEFT
    would read that as if nothing had happened. A copy of the layer unpacks its weight when it is asked for its state,
    but leaves the scales of a weight without nested quantization transposed.
    """
    if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
        base = deepcopy(base)
        base.state_dict()
        state = cast("Any", base.weight).quant_state
        if state.absmax.dim() == 2:
            state.absmax = state.absmax.T.reshape(-1).float()
    return backend.get_base_weight(base)


def quantization_of(base: nn.Module, options: Mapping[str, Any] | None = None) -> QuantizationBackend | None:
    """PEFT's backend for a quantized layer; None when the layer is not quantized."""
    return cast("Any", quantization_utils).resolve_quantization_backend(base, **dict(options or {}))


def base_device(base: nn.Module) -> torch.device | None:
    """Device that the layer computes on: that of its weight, quantized or not, or where an offloaded one goes."""
    weight = getattr(base, "weight", getattr(base, "qweight", None))
    if not isinstance(weight, Tensor):
        return None
    hook = _device_hook(base)
    if hook is not None and hook.offload and hook.execution_device is not None:
        return torch.device(hook.execution_device)
    return weight.device


def base_dtype(base: nn.Module) -> torch.dtype | None:
    """Floating dtype that the layer computes in; None when its weight does not say."""
    weight = getattr(base, "weight", None)
    dtype = getattr(base, "compute_dtype", None) or getattr(weight, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None


def layer_shape(base: nn.Module) -> tuple[int, int] | None:
    """``(out, in)`` of a linear layer, quantized or not; None when the module is not one."""
    if isinstance(base, nn.Linear):
        return base.out_features, base.in_features
    if isinstance(base, Conv1D):
        return cast("int", base.nf), cast("int", base.nx)
    quantized = quantization_of(base) is not None
    for names in (("outfeatures", "infeatures"), ("out_features", "in_features")):
        if quantized and all(hasattr(base, name) for name in names):
            return cast("int", getattr(base, names[0])), cast("int", getattr(base, names[1]))
    return None

"""The frozen layer under an adapter: its shape, where it lies, and its weight as it was before a merge."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.utils import quantization_utils
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class BaseWeight:
    """The weight of a base layer before a merge.

    Attributes:
        base: the layer; some quantization backends put another in its place when they write.
        weight: its data, or its whole parameter when it is quantized.
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
        return cls(base, weight if quantized else weight.data, dict(vars(weight)) if quantized else {}, state)

    def restore(self) -> None:
        """Put the weight back, bit for bit."""
        if isinstance(self.weight, nn.Parameter):
            vars(self.weight).update(self.attributes)
            self.base.weight = self.weight
            if "quant_state" in self.attributes:
                self.base.quant_state = self.attributes["quant_state"]
        else:
            weight = cast("Tensor", self.base.weight)
            weight.data = self.weight.to(weight.device, weight.dtype)
        if self.state is not None:
            vars(self.base.state).update(self.state)


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
    """Device of the layer's weight, quantized or not."""
    weight = getattr(base, "weight", getattr(base, "qweight", None))
    return weight.device if isinstance(weight, Tensor) else None


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

"""Adapters put into the base weight of a layer, and taken out of it again bit for bit."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import (
    check_adapters_to_merge,
    onload_layer,  # pyright: ignore[reportUnknownVariableType]
)
from torch import Tensor, nn

from randbasis.errors import MergeError
from randbasis.tuner.base_weight import BaseWeight, forward_of_its_own, full_weight, offloaded, write_weight
from randbasis.tuner.layer_adapters import LayerAdapters


class MergeableLayer(LayerAdapters):
    """What a layer does to its base weight.

    Args:
        base_layer: the layer to adapt.
        quantization: what PEFT's quantization backends need to know of the model.

    Raises:
        LayerTypeError: the layer is not linear.
    """

    def __init__(self, base_layer: nn.Module, quantization: Mapping[str, Any] | None = None) -> None:
        super().__init__(base_layer, quantization)
        self._unmerged: BaseWeight | None = None

    def frozen_weight(self) -> Tensor:
        """``W0`` as ``[out, in]``, before any merge."""
        if self._unmerged is None:
            return super().frozen_weight()
        weight = self._unmerged.weight.detach()
        return weight.T if self.transposed else weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight; :meth:`unmerge` restores its bits.

        Args:
            safe_merge: refuse a result that is not finite, and leave the weight as it was.
            adapter_names: which; None means the active ones.

        Raises:
            MergeError: the quantization of the base weight cannot be written, or safe_merge found a bad value.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.adapted]
        if not names:
            return
        self._check_writable()
        with self._weight_at_hand():
            merged = self._merged_weight(names, safe=safe_merge)
            self._replace_base_weight(merged)
        self.merged_adapters.extend(names)

    def check_merge(self, adapter_names: Sequence[str] | None, *, safe_merge: bool, key: str = "") -> None:
        """Raise what :meth:`merge` would raise, and merge nothing.

        Args:
            adapter_names: as of :meth:`merge`.
            safe_merge: as of :meth:`merge`.
            key: module path, for the message.

        Raises:
            MergeError: as :meth:`merge`.
        """
        wanted = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in wanted if name in self.adapted and name not in self.merged_adapters]
        backend = self.quantization_backend
        if names:
            self._check_writable(key)
        if names and (safe_merge or (backend is not None and not backend.supports_merge)):
            with self._weight_at_hand():
                self._merged_weight(names, safe=safe_merge)

    def _check_writable(self, key: str = "") -> None:
        """Raise unless the base layer with W0 + ΔW computes what the base layer and the adapter compute together."""
        own = forward_of_its_own(self.get_base_layer())
        if own is not None:
            raise MergeError(
                f"an adapter can only be merged into a layer that computes W x + b, the base layer {key!r} has {own}, "
                "which ΔW is added after and would go through when merged; remove it first, or keep the adapter beside "
                "the weights"
            )

    def _weight_at_hand(self) -> AbstractContextManager[None]:
        """Within it an offloaded base weight is where it is computed with, and what is written to it is kept."""
        base = self.get_base_layer()
        absent = offloaded(base) and cast("Tensor", base.weight).is_meta
        return cast("Any", onload_layer)(self) if absent else nullcontext()

    def _merged_weight(self, names: Sequence[str], *, safe: bool) -> Tensor:
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise MergeError(
                f"an adapter cannot be merged into weights quantized by {backend.backend_name}: they cannot be "
                "written; load the base model in full precision and merge there"
            )
        base = self.get_base_layer()
        before = cast("Tensor", base.weight) if backend is None else full_weight(base, backend)
        with torch.no_grad():
            total = sum((self._full_delta(name, None) for name in names), start=torch.zeros((), device=before.device))
            change = total.T if self.transposed else total
            merged = (before.to(torch.promote_types(before.dtype, change.dtype)) + change).to(before.dtype)
        if safe and not bool(torch.isfinite(merged).all()):
            raise MergeError(
                f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken; "
                "merged weights must be finite, the base weight was left as it was; retrain or reload the adapter"
            )
        return merged

    def _replace_base_weight(self, merged: Tensor) -> None:
        base = self.get_base_layer()
        if self._unmerged is None:
            self._unmerged = BaseWeight.of(base, quantized=self.quantization_backend is not None)
        if self.quantization_backend is None:
            write_weight(base, merged)
        else:
            self.set_base_weight(merged)
        self._forget()

    def unmerge(self) -> None:
        """Restore the base weight to the bits it had before :meth:`merge`."""
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._unmerged.base is not self.get_base_layer():
            self.base_layer = self._unmerged.base
        with self._weight_at_hand():
            self._unmerged.restore()
        self._unmerged = None
        self.merged_adapters.clear()
        self._forget()

"""Factors kept between forward passes for as long as the coefficients that they came from do not change."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

CAPACITY = 64
"""Results kept on one layer; the oldest goes first. Mixed batches make one for each set of names."""

Stamps = tuple[int, ...]
"""State of some tensors: what an optimizer, an in-place change or a move would alter."""


class _OptimizerSteps:
    """Counts the steps of all optimizers: fused ones change parameters without moving their version counters."""

    def __init__(self) -> None:
        self.taken = 0
        register_optimizer_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.taken += 1


_STEPS = _OptimizerSteps()


def stamps_of(tensors: Sequence[Tensor]) -> Stamps:
    """Version and address of each tensor, and the steps that optimizers have taken."""
    stamps = [_STEPS.taken]
    for tensor in tensors:
        stamps += (tensor._version, tensor.data_ptr())
    return tuple(stamps)


class FactorCache:
    """Results by key, each valid while its source tensors are the same objects in the same version.

    Any step of an optimizer of torch ends the validity of all. A write through ``tensor.data`` is not seen by torch's
    version counter; ``layer.train()`` empties the cache.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[list[Tensor], Stamps, Any]] = {}

    def get(self, key: Hashable, sources: Sequence[Tensor], compute: Callable[[], Any], *, usable: bool) -> Any:
        """The result for a key, computed when there is none or a source has changed.

        Args:
            key: what is computed.
            sources: the tensors that it is computed from.
            compute: how.
            usable: False computes and keeps nothing (training).
        """
        tracked = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
        if not usable or tracked or torch.compiler.is_compiling() or any(s.is_inference() for s in sources):
            return compute()
        stamps = stamps_of(sources)
        found = self._kept.get(key)
        if found is not None:
            same = len(found[0]) == len(sources) and all(a is b for a, b in zip(found[0], sources, strict=True))
            if same and found[1] == stamps:
                return found[2]
        result = compute()
        self._kept.pop(key, None)
        while len(self._kept) >= CAPACITY:
            self._kept.pop(next(iter(self._kept)))
        self._kept[key] = (list(sources), stamps, result)
        return result

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "FactorCache":
        return FactorCache()

    def __reduce__(self) -> tuple[Any, ...]:
        return FactorCache, ()

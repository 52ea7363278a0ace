"""Factors kept between forward passes for as long as the coefficients that they came from do not change."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

CAPACITY = 64
"""Results kept on one layer; the oldest goes first. Mixed batches make one for each set of names."""

_Stamp = tuple[int, int]


class FactorCache:
    """Results by key, each valid while its source tensors are the same objects in the same version.

    A write through ``tensor.data`` is not seen by torch's version counter; ``layer.train()`` empties the cache.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[list[Tensor], list[_Stamp], Any]] = {}

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
        stamps = [(source._version, source.data_ptr()) for source in sources]
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

"""Factors kept between forward passes for as long as the coefficients that they came from do not change."""

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from randbasis.tuner.row_plan import RowPlan, RowPlans
from randbasis.tuner.snapshot import Snapshot, watched

LEAST_BYTES = 1 << 20
"""What the factors on one layer may always take."""

MATRICES = 2
"""Matrices of float32, of the layer's own shape, that the factors on it may take as many bytes as: two ΔW."""


def limit_of(out_features: int, in_features: int) -> int:
    """Bytes that the factors of all adapters on one layer may take together."""
    return max(LEAST_BYTES, MATRICES * 4 * out_features * in_features)


@dataclass(frozen=True, slots=True)
class _Kept:
    snapshot: Snapshot
    result: Any
    nbytes: int


class FactorCache:
    """Results by key, each valid while its source tensors hold the values that it was made of.

    See :mod:`randbasis.tuner.snapshot` for how that is known, and for what the caller owes where it is not by value.
    What was used longest ago goes first when the results take too many bytes; one that is larger than all may be is not
    kept at all. Results are made outside of inference mode and of autocast: later passes may need more.

    Args:
        limit: bytes of all results together.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self.rows = RowPlans()
        """The plan of a mixed batch that each thread keeps; it may take as many bytes again as the results."""
        self._kept: dict[Hashable, _Kept] = {}
        self._lock = threading.Lock()

    def get(
        self, key: Hashable, sources: Sequence[Tensor], compute: Callable[[], Any], *, usable: bool, decoding: bool
    ) -> Any:
        """The result for a key, computed when there is none or a source has changed.

        Args:
            key: what is computed.
            sources: the tensors that it is computed from.
            compute: how.
            usable: False computes and keeps nothing (training).
            decoding: whether the pass is a step of decoding one token further.
        """
        (result,) = self.get_all([(key, sources)], lambda _: [compute()], usable=usable, decoding=decoding)
        return result

    def get_all(
        self,
        wanted: Sequence[tuple[Hashable, Sequence[Tensor]]],
        compute: Callable[[list[int]], list[Any]],
        *,
        usable: bool,
        decoding: bool,
    ) -> list[Any]:
        """The results for some keys; those that are not there are computed together.

        Args:
            wanted: each key, and the tensors that its result is computed from.
            compute: from places in ``wanted`` to their results.
            usable: False computes all and keeps nothing.
            decoding: whether the pass is a step of decoding one token further. Sources whose values are not compared
                are computed with anew in any other pass, and what was kept of them goes.
        """
        everything = list(range(len(wanted)))
        if not usable or _tracked(source for _, sources in wanted for source in sources):
            return compute(everything)
        how = watched(source for _, sources in wanted for source in sources)
        if how is None:
            return compute(everything)
        if how == "by version" and not decoding:
            self.clear()
            return compute(everything)
        found = {place: kept.result for place in everything if (kept := self._find(*wanted[place])) is not None}
        missing = [place for place in everything if place not in found]
        if missing:
            snapshots = [Snapshot.of(wanted[place][1]) for place in missing]  # before the values are used
            device = wanted[missing[0]][1][0].device.type
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
                made = compute(missing)
            for place, snapshot, result in zip(missing, snapshots, made, strict=True):
                found[place] = result
                if snapshot is not None:
                    self._keep(wanted[place][0], _Kept(snapshot, result, _nbytes(result)))
        return [found[place] for place in everything]

    def _find(self, key: Hashable, sources: Sequence[Tensor]) -> _Kept | None:
        with self._lock:
            kept = self._kept.get(key)
            if kept is None or not kept.snapshot.is_of(sources):
                return None
            self._kept[key] = self._kept.pop(key)  # the newest is last
            return kept

    def _keep(self, key: Hashable, kept: _Kept) -> None:
        with self._lock:
            self._drop(key)
            if kept.nbytes > self.limit:
                return
            while self.nbytes + kept.nbytes > self.limit:
                self._drop(next(iter(self._kept)))
            self._kept[key] = kept
            self.nbytes += kept.nbytes

    def _drop(self, key: Hashable) -> None:
        old = self._kept.pop(key, None)
        self.nbytes -= old.nbytes if old is not None else 0

    def keep_rows(self, plan: RowPlan, *, decoding: bool) -> None:
        """Keep a plan for this thread in the place of the one before, or none where it may not be kept.

        Args:
            plan: of the rows of a mixed batch.
            decoding: as of :meth:`get_all`.
        """
        seen = plan.seen
        usable = seen is not None and (seen.weights.by_value or decoding) and plan.nbytes <= self.limit
        self.rows.plan = plan if usable else None

    def end_rows(self, *, decoding: bool) -> None:
        """A pass without names: a plan that is not compared by value outlasts steps of decoding alone."""
        plan = self.rows.plan
        if plan is not None and plan.seen is not None and not (decoding or plan.seen.weights.by_value):
            self.rows.plan = None

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()
            self.nbytes = 0
            self.rows = RowPlans()  # those of all threads go

    def __deepcopy__(self, memo: dict[int, Any]) -> "FactorCache":
        return FactorCache(self.limit)

    def __reduce__(self) -> tuple[Any, ...]:
        return FactorCache, (self.limit,)


def _tracked(sources: Iterable[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(source.requires_grad for source in sources)


def _nbytes(result: Tensor | Mapping[str, Tensor]) -> int:
    tensors = [result] if isinstance(result, Tensor) else result.values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

"""One forward pass: which sums of which layers one call makes, and what each layer is given of them.

:mod:`randbasis.tuner.joint_factors` says when a pass begins and who asks.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn

from randbasis.methods import Bound, Factors, WeightedSum
from randbasis.tuner.adapted_part import AdaptedPart
from randbasis.tuner.base_weight import base_device
from randbasis.tuner.coefficients import straight_through
from randbasis.tuner.joint_sums import Values, joint_sums, kind_of
from randbasis.tuner.layer_adapters import LayerAdapters
from randbasis.tuner.snapshot import Version

LEAST_NUMBERS = 1 << 24
"""Numbers that the factors of a pass may always have together (64 MiB of float32)."""

SHARE_OF_THE_BASE = 4
"""They may have a fourth of the numbers of the base weights too: NOLA of r = 16 on 7B has one in 160."""

hooks_on_saved = cast("Callable[[bool], Any]", cast("Any", torch)._C._autograd._top_saved_tensors_default_hooks)
"""``hooks_on_saved(False)``: the hooks that take what is saved for the way back, or None."""


@dataclass(slots=True)
class _Group:
    """Sums of many matrices that one call makes.

    Attributes:
        wanted: what they are sums of.
        coefficients: of each matrix; the second says at how many bits they count, math (11).
        made: their sums, by the modes of autograd that they were made in, and where they last for checkpoints.
    """

    wanted: list[WeightedSum] = field(default_factory=list[WeightedSum])
    coefficients: list[tuple[Tensor, int | None]] = field(default_factory=list[tuple[Tensor, int | None]])
    made: dict[tuple[bool, bool], tuple[Sequence[Tensor], Values]] = field(
        default_factory=dict[tuple[bool, bool], tuple[Sequence[Tensor], Values]]
    )

    @property
    def numbers(self) -> int:
        slab = self.wanted[0].basis.slab
        return len(self.wanted) * slab.rows * slab.cols

    def sums(self) -> tuple[Sequence[Tensor], Values]:
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        if modes not in self.made:
            values = Values()
            counted = [effective(c, bits) for c, bits in self.coefficients]
            self.made[modes] = joint_sums(self.wanted, counted, values), values
        return self.made[modes]


@dataclass(slots=True)
class _Slot:
    """One matrix in a pass.

    Attributes:
        layer: that it is on.
        bound: what it is bound to; other streams make another one.
        seen: its coefficients, by name.
        trained: which of them train.
        places: for each of its sums, a group and the place there; None where it is the only one of its kind.
        served: whether it was given them.
    """

    layer: LayerAdapters
    bound: Bound[Any]
    seen: Mapping[str, Version]
    trained: Sequence[bool]
    places: list[tuple[_Group, int] | None]
    served: bool = False


@dataclass(frozen=True, slots=True)
class Served:
    """What a layer was given in a segment of a checkpoint, which will run again."""

    bound: Bound[Any]
    seen: Mapping[str, Version]
    sums: Sequence[tuple["ref[Values]", int] | None]

    def values(self) -> list[Tensor | None]:
        """The sums, where they are there still."""
        found: list[Tensor | None] = []
        for place in self.sums:
            values = None if place is None else place[0]()
            sums = None if values is None else values.sums
            found.append(None if place is None or sums is None else sums[place[1]])
        return found


class ForwardPass:
    """One forward pass of a model in one thread.

    Args:
        owner: who began it.
        layers: the adapted layers that it may reach.
        idle: those of them that the last training pass did not call; :meth:`close` brings it up to date.
    """

    def __init__(self, owner: object, layers: Sequence[LayerAdapters], idle: WeakSet[LayerAdapters]) -> None:
        self.owner = owner
        self.inside: list[nn.Module] = []
        """The modules with hooks of the owner that are running, the outermost first."""
        self._layers, self._idle = layers, idle
        self._slots: dict[tuple[int, int], _Slot] | None = None
        self._trained = False
        self._came_back: list[LayerAdapters] = []

    def factors(self, layer: LayerAdapters, adapter: str, one: AdaptedPart) -> Factors | None:
        """Those of one matrix; None where the layer makes them itself."""
        if self._slots is None:
            self._slots = self._plan()
        self._trained |= torch.is_grad_enabled()
        slot = self._slots.get((id(layer), id(one)))
        if slot is None:
            self._came_back.append(layer)
            return None
        own = layer.trained_coefficients(adapter, one)
        stands = slot.bound is one.bound and all(seen.is_of(own[name]) for name, seen in slot.seen.items())
        if not stands or [c.requires_grad for c in own.values()] != slot.trained:
            return None  # other streams, another tensor, or written to or frozen since the pass began
        slot.served = True
        sums: list[Tensor] = []
        for (name, common), place in zip(one.bound.sums.items(), slot.places, strict=True):
            if place is None:
                counted = effective(own[name], layer.options[adapter].quantize_coefficients)
                sums += joint_sums([common], [counted])
            else:
                sums.append(place[0].sums()[0][place[1]])
        if checkpointed():
            _note_served(slot, one)
        if not (layer.training or torch.is_grad_enabled()):
            sums = [made.clone() for made in sums]  # in evaluation they are kept, and views would keep those of all
        return one.bound.factors_of(sums)

    def close(self) -> None:
        """The pass is over: note who was skipped. In evaluation, one who has its factors still does not ask."""
        if self._trained and self._slots:
            self._idle.difference_update(self._came_back)
            self._idle.update([slot.layer for slot in self._slots.values() if not slot.served])

    # --- who shares what ---

    def _plan(self) -> dict[tuple[int, int], _Slot]:
        groups: dict[Any, _Group] = {}
        found: dict[tuple[int, int], _Slot] = {}
        for layer, adapter, one in self._matrices():
            own = layer.trained_coefficients(adapter, one)
            refused = [why for name, c in own.items() if (why := _refusal(layer, one, c, one.bound.sums[name]))]
            if refused:
                say_once(refused[0])
                continue
            bits = layer.options[adapter].quantize_coefficients
            places: list[tuple[_Group, int] | None] = []
            for name, common in one.bound.sums.items():
                c = own[name]
                key = kind_of(common), c.device, c.dtype, c.requires_grad
                group = groups.get(key)
                if group is None:
                    group = groups[key] = _Group()
                places.append((group, len(group.coefficients)))
                group.wanted.append(common)
                group.coefficients.append((c, bits))
            seen = {name: Version(c) for name, c in own.items()}
            trained = [c.requires_grad for c in own.values()]
            found[id(layer), id(one)] = _Slot(layer, one.bound, seen, trained, places)
        shared = self._shared(groups.values())
        for slot in found.values():
            slot.places = [place if place is not None and id(place[0]) in shared else None for place in slot.places]
        return {key: slot for key, slot in found.items() if any(slot.places)}

    def _matrices(self) -> Iterator[tuple[LayerAdapters, str, AdaptedPart]]:
        idle = self._idle if torch.is_grad_enabled() else ()
        for layer in self._layers:
            if layer.disable_adapters or layer.merged_adapters or (idle and layer in idle):
                continue
            for adapter in layer.active_adapters:
                for one in layer.matrices(adapter):
                    if one.bound.sums:
                        yield layer, adapter, one

    def _shared(self, groups: Iterable[_Group]) -> set[int]:
        """The groups that are worth a product and small enough, the smallest first."""
        area = sum(layer.out_features * layer.in_features for layer in self._layers)
        left = max(LEAST_NUMBERS, area // SHARE_OF_THE_BASE)
        shared: set[int] = set()
        for group in sorted(groups, key=lambda group: group.numbers):
            if len(group.wanted) == 1:
                continue
            if group.numbers > left:
                say_once(
                    f"those of all layers would have {group.numbers:,} numbers, more than {left:,}, the larger of "
                    f"{LEAST_NUMBERS:,} and a fourth of the adapted weights; use a smaller rank, if that will do"
                )
                break
            left -= group.numbers
            shared.add(id(group))
        return shared


def _refusal(layer: LayerAdapters, one: AdaptedPart, c: Tensor, common: WeightedSum) -> str | None:
    """Why a tensor cannot be read before its layer runs; None when it can."""
    sharded = "_is_fsdp_managed_module" in vars(one.holder(layer))  # fully_shard, though it be whole now
    if sharded or type(c) not in (Tensor, nn.Parameter) or c.is_meta or c.shape != (common.basis.slab.count,):
        return "coefficients are sharded, or not there before their own layer runs"
    if one.owner is not None and c.device != base_device(layer.get_base_layer()):
        return "coefficients that layers share lie on the device of another layer"
    if c.is_inference():
        return "coefficients that were made in inference mode have no version"
    if c._backward_hooks:
        return "hooks of coefficients would be called without a gradient where a pass skips their layer"
    return None


def effective(c: Tensor, bits: int | None) -> Tensor:
    """What counts of coefficients that are trained: math (11), and in float32 or wider."""
    counted = c if bits is None else straight_through(c, bits)
    return counted.to(torch.promote_types(counted.dtype, torch.float32))


# --- segments of checkpoints, which run again on the way back ---------------------------------------------------------

SERVED: WeakKeyDictionary[LayerAdapters, dict[int, list[Served]]] = WeakKeyDictionary()
"""Layer → its matrices, by identity → what they were given, the newest last. Not on the layer: no copy may have it."""


def _note_served(slot: _Slot, one: AdaptedPart) -> None:
    if not all(seen.tensor.is_leaf for seen in slot.seen.values()):
        return  # it would hold the graph of others
    sums = [None if place is None else (ref(place[0].sums()[1]), place[1]) for place in slot.places]
    known = SERVED.setdefault(slot.layer, {})
    alive = [old for old in known.get(id(one), ()) if any(value is not None for value in old.values())]
    known[id(one)] = [*alive, Served(slot.bound, slot.seen, sums)]


def checkpointed() -> bool:
    """Whether a segment may run again: its checkpoint then compares what is saved in both of its runs."""
    return torch.is_grad_enabled() and hooks_on_saved(False) is not None


@cache
def say_once(reason: str) -> None:
    """Say why layers do what could be done at once."""
    warnings.warn(f"each layer makes its factors itself, which is slower: {reason}", stacklevel=2)

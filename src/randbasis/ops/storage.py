"""How frozen matrices are kept between calls: densely, as raw words, or not at all.

Stored tensors live here, outside of every module: no checkpoint, no ``to()`` and no copy of a model ever sees them.
Equal slabs of different layers share one :class:`Stored`, and what is made of equal weights one :class:`Derived`; both
live as long as somebody holds them.
"""

import threading
from collections.abc import Callable
from hashlib import sha256
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from randbasis.basis_storage import BasisStorage
from randbasis.errors import BaseWeightError
from randbasis.ops import backends
from randbasis.ops.reference import Slab, Tile
from randbasis.ops.transforms import FORWARD, FUNCTORCH, outside

DENSE_BYTES = 64 << 20
"""``auto`` keeps a slab densely up to this size, where nothing is known of the memory of a device."""

PACKED = 4
"""``auto`` keeps a slab as raw words up to so many times that."""

FREE_SHARE = 256
"""The part of the free memory of a GPU that one slab may take densely.

A model has a slab for each role and shape, some ten: together they take about a twentieth of what is free. That is
256 MiB a slab on an empty GPU of 80 GB, and 16 MiB where 5 GB are left.
"""


def free_bytes(device: torch.device) -> int | None:
    """Bytes that tensors may still take on a device, what torch has reserved for them included; None: not to be had."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def dense_bytes(device: torch.device | None) -> int:
    """Up to which size ``auto`` keeps a slab densely on a device.

    A power of two, so that a little more or less free memory does not decide how a run computes.
    """
    free = None if device is None else free_bytes(device)
    return DENSE_BYTES if free is None else (1 << free.bit_length() >> 1) // FREE_SHARE


def choose_storage(
    slab: Slab, storage: BasisStorage, *, shared: bool, device: torch.device | None = None
) -> BasisStorage:
    """What ``auto`` means for one slab; any other choice is the user's and stands.

    A shared slab is stored once for all layers, so it may be large. A slab of one matrix is one of many, so it gets a
    sixteenth of these budgets. What is kept densely for another adapter is there for this one.

    Args:
        slab: the matrices.
        storage: what the user wants.
        shared: whether many matrices of a model use this slab.
        device: where they will be used, when that is known.
    """
    if storage != "auto":
        return storage
    if held(slab, "dense") is not None:
        return "dense"
    budget = dense_bytes(device) // (1 if shared else 16)
    if slab.disjoint:  # words are as many as the entries of one sum, and give all that a sum asks for
        return "packed" if slab.packed_bytes <= PACKED * budget else "recompute"
    if slab.entries * 4 <= budget:
        return "dense"
    return "packed" if slab.packed_bytes <= PACKED * budget else "recompute"


class Stored:
    """One slab in one kind of storage, built on first use for each device and dtype; ``recompute`` stores nothing.

    A disjoint slab, nearly all of whose entries are 0, is kept as its words when it is to be dense.
    """

    def __init__(self, slab: Slab, storage: BasisStorage) -> None:
        self.slab = slab
        # Known here: each pass of each layer asks.
        self._dense = storage == "dense" and not slab.disjoint
        self._packed = storage == "packed" or (storage == "dense" and slab.disjoint)
        self.storage = storage
        self._tensors: dict[tuple[Any, ...], Tensor] = {}
        self._lock = threading.Lock()

    def dense(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Entries ``[count, rows, cols]`` in floating point, or None when this slab is not stored as those."""
        if not self._dense:
            return None
        key = (device, dtype)
        if key not in self._tensors:
            whole = Tile(0, self.slab.count, 0, self.slab.rows)
            with self._lock, outside():  # what is stored now, training may use later
                if key not in self._tensors:
                    self._tensors[key] = backends.expand(self.slab, whole, dtype, device)
        return self._tensors[key]

    def packed(self, device: torch.device) -> Tensor | None:
        """Raw words ``[count, rows, 4 * blocks]``, of a hashed slab of one matrix; None when they are not stored."""
        if not self._packed:
            return None
        key = (device, torch.int32)
        if key not in self._tensors:
            with self._lock, outside():
                if key not in self._tensors:
                    self._tensors[key] = backends.words(self.slab, device)
        return self._tensors[key]

    def plain(self, like: Tensor) -> Tensor | None:
        """The dense entries, where a product with them may go without an op of its own.

        The call of an op costs as much as a small product. A compiler wants the op; transforms see to themselves.
        Autocast has to be kept away from the product, as an op keeps it.

        Args:
            like: a tensor that they are multiplied with.
        """
        if (
            not self._dense
            or torch.compiler.is_compiling()
            or FORWARD._current_level >= 0  # these two are `transformed()`, asked a few times in each pass of a layer
            or FUNCTORCH.peek_interpreter_stack() is not None
        ):
            return None
        kept = self._tensors.get((like.device, like.dtype))
        return self.dense(like.dtype, like.device) if kept is None else kept

    def scaled(self, factor: float, like: Tensor) -> Tensor | None:
        """What :meth:`plain` gives, times a number, and kept as well."""
        dense = self.plain(like)
        if dense is None:
            return None
        key = (like.device, like.dtype, factor)
        if key not in self._tensors:
            with self._lock, outside():
                self._tensors[key] = dense * factor
        return self._tensors[key]

    @property
    def nbytes(self) -> int:
        """Bytes held now, on all devices."""
        return sum(t.numel() * t.element_size() for t in self._tensors.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> "Stored":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return hold, (self.slab, self.storage)


_held: WeakValueDictionary[tuple[Slab, BasisStorage], Stored] = WeakValueDictionary()
_held_lock = threading.Lock()


def hold(slab: Slab, storage: BasisStorage) -> Stored:
    """The one :class:`Stored` of a slab; keep the result for as long as the slab shall stay stored."""
    with _held_lock:
        stored = _held.get((slab, storage))
        if stored is None:
            stored = _held[slab, storage] = Stored(slab, storage)
        return stored


def held(slab: Slab, storage: BasisStorage) -> Stored | None:
    """The :class:`Stored` of a slab when somebody holds it."""
    return _held.get((slab, storage))


# --- made of a weight -------------------------------------------------------------------------------------------------

Make = Callable[..., tuple[Tensor, ...]]
"""``(weight, *arguments) → tensors``: a function of a module, of a weight ``[out, in]`` in float64 on the CPU."""


def weight_digest(weight: Tensor) -> str:
    """SHA-256 of a weight ``[out, in]``: of its rows in float32, little-endian, whatever its dtype and device."""
    rows = weight.detach().to("cpu", torch.float32).contiguous()
    return sha256(rows.numpy().astype("<f4", copy=False).data).hexdigest()


def check_weight(weight: Tensor, name: str) -> None:
    """Raise unless all numbers of a weight are finite; on the meta device there are none.

    Raises:
        BaseWeightError: one is not.
    """
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        raise BaseWeightError(
            f"{name} must be finite where frozen matrices are made of it, got NaN or infinity in one of shape "
            f"{list(weight.shape)}; take the base model from its source again"
        )


class Derived:
    """Frozen matrices that are made of a weight of the base model, and not of a seed.

    They are made on the CPU in float64 of what the digest is of, so that no device and no dtype decides a number, and
    kept for each device and dtype; ``recompute`` keeps the weight alone and makes them anew. Raw words there are none.

    Attributes:
        digest: of the weight.
        storage: ``"dense"`` or ``"recompute"``.
    """

    def __init__(
        self, make: Make, arguments: tuple[int, ...], digest: str, storage: BasisStorage, source: tuple[Tensor, ...]
    ) -> None:
        """``source``: the matrices in float64, or, to recompute them, the weight."""
        self.digest = digest
        self.storage = storage
        self._made_by = make, arguments
        self._source = source
        self._tensors: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}

    def tensors(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """The matrices; the caller must not write to them.

        Raises:
            BaseWeightError: they are made anew, and the weight is not what it was.
        """
        key = (device, dtype)
        found = self._tensors.get(key)
        if found is not None:
            return found
        with outside():
            exact = self._made_anew() if self.storage == "recompute" else self._source
            made = tuple([one.to(device, dtype) for one in exact])
        if self.storage != "recompute":
            self._tensors[key] = made
        return made

    def _made_anew(self) -> tuple[Tensor, ...]:
        (weight,) = self._source
        now = weight_digest(weight)
        if now != self.digest:
            raise BaseWeightError(
                f"the base weight must be the one that the adapter was put on, of digest {self.digest[:16]}, to make "
                f"its frozen matrices anew, it was changed to {now[:16]}; put the adapter on again, or use "
                "basis_storage='dense', which keeps them"
            )
        make, arguments = self._made_by
        return make(_exact(weight), *arguments)

    @property
    def nbytes(self) -> int:
        """Bytes held now, on all devices; a weight that the model holds too is not counted."""
        own = () if self.storage == "recompute" else self._source
        return sum(t.numel() * t.element_size() for t in (*own, *(t for kept in self._tensors.values() for t in kept)))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Derived":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Derived, (*self._made_by, self.digest, self.storage, self._source)


_derived: WeakValueDictionary[tuple[Make, tuple[int, ...], str], Derived] = WeakValueDictionary()


def derive(make: Make, arguments: tuple[int, ...], weight: Tensor, storage: BasisStorage) -> Derived:
    """What is made of a weight; keep the result for as long as it shall stay stored.

    Args:
        make: how.
        arguments: of ``make``, beside the weight.
        weight: ``[out, in]``.
        storage: ``"recompute"`` keeps the weight itself, all else what was made.

    Raises:
        BaseWeightError: the weight is not finite.
    """
    check_weight(weight, "the base weight")
    digest = weight_digest(weight)
    if storage == "recompute":
        return Derived(make, arguments, digest, storage, (weight.detach(),))
    with _held_lock:
        found = _derived.get((make, arguments, digest))
    if found is None:
        with outside():
            made = Derived(make, arguments, digest, "dense", make(_exact(weight), *arguments))
        with _held_lock:
            found = _derived.setdefault((make, arguments, digest), made)
    return found


def _exact(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32).double()

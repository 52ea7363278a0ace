"""How a slab of a basis is kept between calls: densely, as raw words, or not at all.

Stored tensors live here, outside of every module: no checkpoint, no ``to()`` and no copy of a model ever sees them.
Equal slabs of different layers share one :class:`Stored`; it lives as long as somebody holds it.
"""

import threading
from typing import Any, Literal, cast, get_args
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from randbasis.errors import StorageError, not_one_of
from randbasis.ops import backends
from randbasis.ops.reference import Slab, Tile
from randbasis.ops.transforms import FORWARD, FUNCTORCH, outside

BasisStorage = Literal["auto", "packed", "dense", "recompute"]
"""``packed``: raw words (1 bit an entry for the sign law); ``dense``: floating point; ``recompute``: nothing."""

DENSE_BYTES = 64 << 20
"""``auto`` keeps a slab densely up to this size."""

PACKED_BYTES = 256 << 20
"""``auto`` keeps a slab as raw words up to this size."""


def check_storage(name: str) -> BasisStorage:
    """The kind of storage of that name.

    Raises:
        StorageError: there is no such kind.
    """
    if name not in get_args(BasisStorage):
        raise StorageError(not_one_of("basis_storage", name, get_args(BasisStorage)))
    return cast("BasisStorage", name)


def choose_storage(slab: Slab, storage: BasisStorage, *, shared: bool) -> BasisStorage:
    """What ``auto`` means for one slab; any other choice is the user's and stands.

    A shared slab is stored once for all layers, so it may be large. A slab of one matrix is one of many, so it gets a
    sixteenth of these budgets.
    """
    if storage != "auto":
        return storage
    share = 1 if shared else 16
    if slab.entries * 4 <= DENSE_BYTES // share:
        return "dense"
    return "packed" if slab.packed_bytes <= PACKED_BYTES // share else "recompute"


class Stored:
    """One slab in one kind of storage, built on first use for each device and dtype; ``recompute`` stores nothing."""

    def __init__(self, slab: Slab, storage: BasisStorage) -> None:
        self.slab = slab
        self.storage = storage
        self._tensors: dict[tuple[Any, ...], Tensor] = {}
        self._lock = threading.Lock()

    def dense(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Entries ``[count, rows, cols]`` in floating point, or None when this slab is not stored densely."""
        if self.storage != "dense":
            return None
        key = (device, dtype)
        if key not in self._tensors:
            whole = Tile(0, self.slab.count, 0, self.slab.rows)
            with self._lock, outside():  # what is stored now, training may use later
                if key not in self._tensors:
                    self._tensors[key] = backends.expand(self.slab, whole, dtype, device)
        return self._tensors[key]

    def packed(self, device: torch.device) -> Tensor | None:
        """Raw words ``[count, rows, 4 * blocks]``, or None when this slab is not stored packed."""
        if self.storage != "packed":
            return None
        key = (device, torch.int32)
        if key not in self._tensors:
            with self._lock, outside():
                if key not in self._tensors:
                    self._tensors[key] = backends.words(self.slab, device)
        return self._tensors[key]

    def plain(self, like: Tensor) -> Tensor | None:
        """The dense entries, where a product with them may go without an op of its own.

        The call of an op costs as much as a small product. A compiler wants the op, and so does autocast, which it
        keeps away; transforms see to themselves.

        Args:
            like: a tensor that they are multiplied with.
        """
        if (
            self.storage != "dense"
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled(like.device.type)
            or FORWARD._current_level >= 0  # these two are `transformed()`, asked a few times in each pass of a layer
            or FUNCTORCH.peek_interpreter_stack() is not None
        ):
            return None
        kept = self._tensors.get((like.device, like.dtype))
        return self.dense(like.dtype, like.device) if kept is None else kept

    def scaled(self, factor: float, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Dense entries times a number, kept as well."""
        key = (device, dtype, factor)
        if key not in self._tensors:
            dense = self.dense(dtype, device)
            assert dense is not None
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

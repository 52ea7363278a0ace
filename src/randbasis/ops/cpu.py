"""The ops on a basis as compiled loops over tiles, on the cores that torch may use.

The numbers equal :mod:`randbasis.ops.reference`: words and entries bit for bit, sums within rounding. Sums of float32
go to float64 every few terms. Nothing depends on the number of threads: work is split over outputs, or into parts that
the shape alone decides. The kernels are in :mod:`randbasis.ops.cpu_kernels`, which is imported, and then compiled, on
first use; tensors are float32 or float64 here, on the CPU.
"""

import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, lru_cache
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from randbasis.basis import Basis
from randbasis.errors import BasisShapeError
from randbasis.laws import Law
from randbasis.ops.reference import Slab, Tile

if TYPE_CHECKING:
    from randbasis.ops.cpu_kernels import Decoder, Floats, Source

_INLINE = 1 << 18
"""Entries below which waking another thread costs more than it saves."""
_VECTORS = 128
"""Coefficient vectors that share one pass over the basis: as many as keep their sums in the second-level cache."""
_PARTS = 32
"""Units of work that :func:`inner` aims at: a constant, so that its sums do not depend on the machine."""
_PLACES_A_SUM = 16
"""Places for each sum of a part, at least, where a disjoint slab is cut into parts."""
_SUMS = 1 << 14
"""Sums that are added to in turn, in float64: as many as the first two levels of the cache hold."""


@cache
def available() -> str | None:
    """Why the compiled loops cannot run here; None when they can."""
    if sys.byteorder != "little":
        return "the compiled loops read words as bytes and need a little-endian processor"
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return "NUMBA_DISABLE_JIT is set, so the loops would be interpreted; unset it"
    try:
        import_module("randbasis.ops.cpu_kernels")
    except ImportError as error:
        return f"numba cannot be imported ({error}); install a numba that supports this Python and NumPy"
    return None


# --- threads -----------------------------------------------------------------------------------------------------


class _Helpers:
    """The threads that help the calling one: started when first needed, and anew in a forked child.

    A process forked from one with threads has none of them, so the child must not wait for its parent's. numba's own
    parallel loops are no substitute: one of their layers aborts on concurrent callers, another does not survive fork.
    """

    def __init__(self) -> None:
        self.forget()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, task: Callable[[], None]) -> Future[None]:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="randbasis")
            return self._pool.submit(task)


_helpers = _Helpers()


def _run(kernel: Callable[[int, int], None], units: int, work: int) -> None:
    """Run a kernel on all units, in ranges that idle threads take from one list; ``work`` is their cost in entries."""
    threads = min(torch.get_num_threads(), units, 1 + work // _INLINE)
    if threads <= 1:
        kernel(0, units)
        return
    step = -(-units // (4 * threads))
    ranges = deque((start, min(start + step, units)) for start in range(0, units, step))

    def drain() -> None:
        while True:
            try:
                start, stop = ranges.popleft()
            except IndexError:
                return
            kernel(start, stop)

    futures = [_helpers.submit(drain) for _ in range(threads - 1)]
    drain()
    for future in futures:
        # A helper that has not started yet, because other callers keep the threads busy, is not needed any more.
        if not future.cancel():
            future.result()


# --- ops ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _redrawn(basis: Basis) -> "Source":
    key = (np.uint64(basis.key[0]), np.uint64(basis.key[1]), np.uint64(basis.stream))
    return np.empty(0, np.uint32), 0, *key


def _source(basis: Basis, packed: Tensor | None, shape: tuple[int, int, int]) -> "Source":
    if packed is None:
        return _redrawn(basis)
    _, _, low, high, stream = _redrawn(basis)
    if packed.shape != shape or packed.dtype != torch.int32:
        raise BasisShapeError(
            f"packed must be int32 words of shape {list(shape)}, got {packed.dtype} {list(packed.shape)}; "
            "make it with words()"
        )
    return packed.contiguous().view(-1).numpy().view(np.uint32), shape[2], low, high, stream


@lru_cache(maxsize=64)
def _decoder(law: Law) -> "Decoder":
    from randbasis.ops import cpu_kernels as kernels

    codes = {
        "sign": kernels.SIGN,
        "uniform": kernels.UNIFORM,
        "normal": kernels.NORMAL,
        "sparse": kernels.SPARSE,
    }
    return codes[law.kind], law.threshold, 32 // law.bits, law.power


def _strips(cols: int) -> int:
    from randbasis.ops import cpu_kernels as kernels

    return -(-cols // kernels.STRIP)


def words(
    key0: int,
    key1: int,
    stream: int,
    start_index: int,
    count: int,
    start_row: int,
    rows: int,
    start_block: int,
    blocks: int,
) -> Tensor:
    """Raw random words of whole blocks, math (1)-(3); equals :func:`randbasis.basis.block_words`.

    Returns:
        int32 tensor ``[count, rows, 4 * blocks]``; word ``4 * block + n`` is output ``n`` of the generator.
    """
    from randbasis.ops import cpu_kernels as kernels

    out = torch.empty(count, rows, 4 * blocks, dtype=torch.int32, device="cpu")
    if not out.numel():
        return out
    flat = out.view(-1).numpy().view(np.uint32)
    source = (np.empty(0, np.uint32), 0, np.uint64(key0), np.uint64(key1), np.uint64(stream))
    first = (start_index, start_row, start_block)

    def kernel(start: int, stop: int) -> None:
        kernels.words(flat, source, first, rows, blocks, start, stop)

    # A block costs about as much as 16 entries of a sum.
    _run(kernel, -(-flat.size // (4 * kernels.LANES)), 4 * flat.size)
    return out


def expand(slab: Slab, tile: Tile, dtype: torch.dtype, packed: Tensor | None = None) -> Tensor:
    """The entries of a tile as floating-point numbers; see :func:`randbasis.ops.reference.expand`.

    Args:
        slab: what the tile is a part of.
        tile: which part.
        dtype: float32 or float64.
        packed: raw words of the *tile*, ``[count, rows, 4 * blocks]``, when they are stored; None generates them.

    Raises:
        BasisShapeError: the words are not those of such a tile.
    """
    from randbasis.ops import cpu_kernels as kernels

    out = torch.empty(tile.count, tile.rows, slab.cols, dtype=dtype, device="cpu")
    source = _source(slab.basis, packed, (tile.count, tile.rows, 4 * slab.blocks))
    if not out.numel():
        return out
    lines, decoder, first = out.view(-1, slab.cols).numpy(), _decoder(slab.basis.law), (tile.index, tile.row)

    def kernel(start: int, stop: int) -> None:
        kernels.expand(lines, source, decoder, first, tile.rows, start, stop)

    _run(kernel, -(-lines.shape[0] // kernels.LINES) * _strips(slab.cols), out.numel())
    return out


def combine(coefficients: Tensor, slab: Slab, packed: Tensor | None = None) -> Tensor:
    """``Σᵢ c[n, i] · entries[i]``, math (6), (8), (18), (25); see :func:`randbasis.ops.reference.combine`.

    The basis is generated, or read from its words, once for 128 vectors of coefficients, and never exists in floating
    point but for a few kilobytes. That of the hashed law is one word a place, read once.

    Raises:
        BasisShapeError: the coefficients or the words are not those of the slab.
    """
    from randbasis.ops import cpu_kernels as kernels

    n = coefficients.shape[0]
    if coefficients.shape != (n, slab.count):
        raise BasisShapeError(f"coefficients must be [n, {slab.count}], got {list(coefficients.shape)}")
    source = _source(slab.basis, packed, (slab.drawn.count, slab.rows, 4 * slab.blocks))
    out = torch.empty(n, slab.rows, slab.cols, dtype=coefficients.dtype, device="cpu")
    if not out.numel():
        return out
    if slab.basis.law.disjoint:
        return _gather(out, coefficients, source)
    padded = coefficients.new_zeros(n, -(-slab.count // kernels.LINES) * kernels.LINES)
    padded[:, : slab.count] = coefficients
    sums, factors, decoder = out.numpy(), padded.detach().numpy(), _decoder(slab.basis.law)
    for i in range(0, n, _VECTORS):
        some, their = sums[i : i + _VECTORS], factors[i : i + _VECTORS]

        def kernel(start: int, stop: int, some: "Floats" = some, their: "Floats" = their) -> None:
            kernels.combine(some, their, slab.count, source, decoder, start, stop)

        _run(kernel, slab.rows * _strips(slab.cols), slab.entries * (1 + len(some) // 4))
    return out


def inner(vectors: Tensor, slab: Slab, packed: Tensor | None = None) -> Tensor:
    """``⟨vectors[n], entries[i]⟩``, math (10), (25); see :func:`randbasis.ops.reference.inner`.

    Raises:
        BasisShapeError: the vectors or the words are not those of the slab.
    """
    from randbasis.ops import cpu_kernels as kernels

    n = vectors.shape[0]
    if vectors.shape != (n, slab.rows, slab.cols):
        raise BasisShapeError(f"vectors must be [n, {slab.rows}, {slab.cols}], got {list(vectors.shape)}")
    source = _source(slab.basis, packed, (slab.drawn.count, slab.rows, 4 * slab.blocks))
    if not vectors.numel() or not slab.count:
        return vectors.new_zeros(n, slab.count)
    matrices = vectors.detach().contiguous().numpy()
    if slab.basis.law.disjoint:
        return _segment_sums(matrices, slab.count, source).to(vectors.dtype)
    decoder = _decoder(slab.basis.law)
    spans, places = -(-slab.count // kernels.SPAN), slab.rows * _strips(slab.cols)
    share = -(-places // max(1, _PARTS // spans))
    parts = -(-places // share)
    sums = torch.empty(parts, n, spans * kernels.SPAN, dtype=torch.float64, device="cpu").numpy()

    def kernel(start: int, stop: int) -> None:
        kernels.inner(sums, matrices, slab.count, share, source, decoder, start, stop)

    _run(kernel, parts * spans, slab.entries * (1 + n // 4))
    out = torch.empty(n, slab.count, dtype=vectors.dtype, device="cpu")
    # NumPy's sum, because torch may split one over threads.
    out.numpy()[:] = sums.sum(0)[:, : slab.count] * slab.basis.law.power
    return out


# --- the hashed law ----------------------------------------------------------------------------------------------


def _gather(out: Tensor, coefficients: Tensor, source: "Source") -> Tensor:
    """Fill ``out``, ``[n, rows, cols]``, with the one term of each place, math (25)."""
    from randbasis.ops import hashed_kernels as kernels

    sums, factors = out.numpy(), coefficients.detach().contiguous().numpy()

    def kernel(start: int, stop: int) -> None:
        kernels.combine(sums, factors, source, start, stop)

    n, rows, cols = out.shape
    _run(kernel, rows * _strips(cols), rows * cols * (1 + n))
    return out


def _segment_sums(vectors: "Floats", count: int, source: "Source") -> Tensor:
    """Sums over the places of each matrix, float64 ``[n, count]``, math (25), in parts that the shape alone decides."""
    from randbasis.ops import hashed_kernels as kernels

    n, rows, cols = vectors.shape
    places = rows * _strips(cols)
    # A part has sums of its own, to clear and to add up: it is worth them from several places a sum on.
    share = -(-places // max(1, min(_PARTS, places, rows * cols // (_PLACES_A_SUM * count))))
    sums = torch.empty(-(-places // share), n, count, dtype=torch.float64, device="cpu").numpy()
    group = max(1, _SUMS // count)

    def kernel(start: int, stop: int) -> None:
        kernels.inner(sums, vectors, share, group, source, start, stop)

    _run(kernel, len(sums) * -(-n // group), rows * cols * (1 + n))
    return torch.from_numpy(sums.sum(0))  # NumPy's, as in `inner`

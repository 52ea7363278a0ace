"""The ops on a basis as Triton kernels on CUDA: float32, bfloat16 and float16 tensors.

The numbers equal :mod:`randbasis.ops.reference`: words and entries bit for bit, sums within rounding of float32, in
which all of them are kept. No sum depends on the order in which its programs run: parts are cut by the shape alone, and
where programs add to one sum, as for the hashed law, they add integers. Nothing waits for the device, so calls can be
captured in a CUDA graph once each has run (the first call of a kind compiles its kernel).

The kernels are in :mod:`randbasis.ops.triton_kernels`, imported on first use. With ``TRITON_INTERPRET=1`` set before
anything imports triton, they run on CPU tensors, slowly: for tests.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from randbasis.errors import BasisShapeError
from randbasis.laws import Law
from randbasis.ops.reference import Slab, Tile

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Floating dtypes of the kernels."""

_PROGRAMS = 512
"""Programs that a sum is cut into at least, where its length allows: a few for each multiprocessor of a large GPU.

A constant, so that the parts of a sum do not depend on the device."""
_FEW = 2
"""Vectors that are multiplied one by one; three already cost less as a matrix product with most of its rows empty."""
_ONE = 0x3F800000
"""The bits of 1.0, passed to the kernels: as a constant in their code it would cost an instruction an entry."""
_PART = 512
"""Products in one part of a sum, at least: below, adding the parts costs more than it saves."""


@cache
def available() -> str | None:
    """Why the Triton kernels cannot run here; None when they can."""
    try:
        import_module("randbasis.ops.triton_kernels")
    except ImportError as error:
        return f"triton cannot be imported ({error}); install randbasis[gpu]"
    return None


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot take tensors of this device and dtype; None when they can."""
    if dtype not in (*DTYPES, torch.int32):
        return f"the Triton kernels take float32, bfloat16 and float16, the tensor is {dtype}"
    reason = available()
    if reason is not None or device.type == "cuda":
        return reason
    from randbasis.ops import triton_kernels as kernels

    if device.type == "cpu" and kernels.INTERPRETED:
        return None
    return f"the Triton kernels run on CUDA (or on the CPU with TRITON_INTERPRET=1), the tensor is on {device.type}"


# --- launches ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Shape:
    """Sides of a tile: lines of the basis, blocks and columns of a strip."""

    lines: int
    blocks: int
    cols: int


def _side(wanted: int, least: int, most: int) -> int:
    """The power of two that covers ``wanted``, within limits."""
    return min(most, max(least, 1 << max(0, wanted - 1).bit_length()))


def _shape(law: Law, lines: int, vectors: int, pieces: int) -> _Shape:
    # A thread evaluates the generator once for each block of a tile, so a tile wants as many blocks as there are
    # threads (128). Matrix products want sides of at least 16, and operands in three pieces must leave them registers.
    if law.kind == "sign":
        height = _side(lines, 16, 64 if vectors > 1 and pieces > 1 else 128)
        blocks = 1
    else:
        height = _side(lines, 16, 64)
        blocks = 64 // law.entries_per_block
    return _Shape(height, blocks, blocks * law.entries_per_block)


def _signed(word: int) -> int:
    """The int32 with the bits of a 32-bit word: kernels then have one signature for all seeds."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _names(slab: Slab) -> dict[str, int]:
    key0, key1 = slab.basis.key
    return {"basis_stream": _signed(slab.basis.stream), "key0": _signed(key0), "key1": _signed(key1)}


def _law(law: Law) -> int:
    return ("sign", "uniform", "normal", "sparse").index(law.kind)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _check_packed(packed: Tensor | None, shape: tuple[int, int, int]) -> None:
    if packed is not None and (packed.shape != shape or packed.dtype != torch.int32):
        raise BasisShapeError(
            f"packed must be int32 words of shape {list(shape)}, got {packed.dtype} {list(packed.shape)}; "
            "make it with words()"
        )


def _check_lines(lines: int) -> None:
    if lines >= 1 << 31:
        raise BasisShapeError(
            f"a slab must have fewer than 2**31 rows of all its matrices together on CUDA, got {lines}; use fewer"
        )


# --- basis -------------------------------------------------------------------------------------------------------


def words(slab: Slab, tile: Tile, device: torch.device, *, start_block: int = 0, blocks: int | None = None) -> Tensor:
    """Raw words of a tile, int32 ``[count, rows, 4 * blocks]``; equals :func:`randbasis.basis.block_words`.

    Args:
        slab: what the tile is a part of.
        tile: which indices and rows, wherever the counters of the generator allow.
        device: where.
        start_block: the first block of each row.
        blocks: how many; None means all of the slab.
    """
    from randbasis.ops import triton_kernels as kernels

    width = 4 * (slab.blocks if blocks is None else blocks)
    out = torch.empty(tile.count, tile.rows, width, dtype=torch.int32, device=device)
    if not out.numel():
        return out
    lines = tile.count * tile.rows
    _check_lines(lines)
    starts = {"index0": tile.index, "row0": tile.row, "block0": start_block}
    sides = {"LINES": 32, "BLOCKS": 16}
    grid = (-(-lines // sides["LINES"]), -(-width // (4 * sides["BLOCKS"])))
    with _on(device):
        kernels.KERNELS["words"][grid](
            out, lines, tile.rows, width, **{name: _signed(start) for name, start in starts.items()},
            **_names(slab), **sides, num_warps=4,
        )  # fmt: skip
    return out


def expand(slab: Slab, tile: Tile, dtype: torch.dtype, device: torch.device, packed: Tensor | None = None) -> Tensor:
    """The entries of a tile in floating point; see :func:`randbasis.ops.reference.expand`.

    Args:
        slab: what the tile is a part of.
        tile: which part.
        dtype: one of :data:`DTYPES`.
        device: where.
        packed: raw words of the *tile*, ``[count, rows, 4 * blocks]``, when they are stored; None generates them.

    Raises:
        BasisShapeError: the words are not those of such a tile.
    """
    from randbasis.ops import triton_kernels as kernels

    law = slab.basis.law
    _check_packed(packed, (tile.count, tile.rows, 4 * slab.blocks))
    out = torch.empty(tile.count, tile.rows, slab.cols, dtype=dtype, device=device)
    if not out.numel():
        return out
    lines = tile.count * tile.rows
    _check_lines(lines)
    # Fewer blocks than threads for the sign law: a thread with 128 entries in odd places would run out of registers.
    shape = _Shape(64, 1, 128) if law.kind == "sign" else _Shape(16, 8, 8 * law.entries_per_block)
    grid = (-(-lines // shape.lines), -(-slab.cols // shape.cols))
    with _on(device):
        kernels.KERNELS["expand"][grid](
            out, out if packed is None else packed.contiguous(), lines, tile.rows, slab.cols, 4 * slab.blocks,
            index0=_signed(tile.index), row0=_signed(tile.row), **_names(slab), threshold=law.threshold, one=_ONE,
            power=law.power, STORED=packed is not None, LAW=_law(law), LINES=shape.lines, BLOCKS=shape.blocks,
            COLS=shape.cols, num_warps=4,
        )  # fmt: skip
    return out


# --- sums --------------------------------------------------------------------------------------------------------


def _sum(
    x: Tensor, slab: Slab, packed: Tensor | None, streams: Tensor | None = None, *, joined: bool, transpose: bool
) -> Tensor:
    """One launch of ``spread`` (transpose) or ``gather`` on ``x`` ``[groups, n, ...]``, and the sum over its parts."""
    from randbasis.ops import triton_kernels as kernels

    law, (groups, n, *_) = slab.basis.law, x.shape
    lines, height = (slab.count * slab.rows, 1) if joined else (slab.count, slab.rows)
    _check_lines(slab.count * slab.rows)
    _check_packed(packed, (slab.count, slab.rows, 4 * slab.blocks))
    out_shape = (groups, n, height * slab.cols) if transpose else (groups, n, lines)
    if not (x.numel() and groups * n * lines * height * slab.cols):
        return x.new_zeros(out_shape)
    pieces = 3 if x.dtype == torch.float32 else 1
    vectors = 1 if n <= _FEW else 16 if n <= 16 else 64
    shape = _shape(law, lines, vectors, pieces)
    strips = -(-slab.cols // shape.cols)
    tiles, steps, step = (
        (height * strips, -(-lines // shape.lines), shape.lines)
        if transpose
        else (-(-lines // shape.lines), height * strips, shape.cols)
    )
    programs = tiles * -(-n // vectors) * groups
    share = max(-(-_PART // step) if programs < _PROGRAMS else 1, -(-steps * programs // _PROGRAMS))
    parts = -(-steps // share)
    sums = torch.empty((parts, *out_shape), dtype=x.dtype if parts == 1 else torch.float32, device=x.device)
    kernel = kernels.KERNELS["spread" if transpose else "gather"]
    operand = "float32" if kernels.INTERPRETED else str(torch.bfloat16 if pieces > 1 else x.dtype).partition(".")[2]
    with _on(x.device):
        kernel[(tiles, -(-n // vectors), parts * groups)](
            sums, x.contiguous(), x if packed is None else packed.contiguous(), x if streams is None else streams,
            n, lines, slab.rows, slab.cols, 4 * slab.blocks, groups, share * (step if transpose else 1),
            **_names(slab), threshold=law.threshold, one=_ONE, power=law.power,
            JOINED=joined, STORED=packed is not None, OWN=streams is not None, LAW=_law(law), PIECES=pieces,
            OPERAND=kernels.OPERANDS[operand], VECTORS=vectors, LINES=shape.lines, BLOCKS=shape.blocks, COLS=shape.cols,
            num_warps=8 if vectors >= 64 else 4, num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip
    return sums[0] if parts == 1 else sums.sum(0).to(x.dtype)


def combine(coefficients: Tensor, slab: Slab, packed: Tensor | None = None) -> Tensor:
    """``Σᵢ c[n, i] · entries[i]``, math (6), (8), (18); see :func:`randbasis.ops.reference.combine`.

    Raises:
        BasisShapeError: the coefficients or the words are not those of the slab.
    """
    n = coefficients.shape[0]
    if coefficients.shape != (n, slab.count):
        raise BasisShapeError(f"coefficients must be [n, {slab.count}], got {list(coefficients.shape)}")
    if slab.basis.law.disjoint:
        return _gather(coefficients[None], slab, packed)[0]
    out = _sum(coefficients[None], slab, packed, joined=False, transpose=True)
    return out.view(n, slab.rows, slab.cols)


def inner(vectors: Tensor, slab: Slab, packed: Tensor | None = None) -> Tensor:
    """``⟨vectors[n], entries[i]⟩``, math (10); see :func:`randbasis.ops.reference.inner`.

    Raises:
        BasisShapeError: the vectors or the words are not those of the slab.
    """
    n = vectors.shape[0]
    if vectors.shape != (n, slab.rows, slab.cols):
        raise BasisShapeError(f"vectors must be [n, {slab.rows}, {slab.cols}], got {list(vectors.shape)}")
    if slab.basis.law.disjoint:
        return _segment_sums(vectors[None], slab, packed)[0]
    return _sum(vectors[None], slab, packed, joined=False, transpose=False)[0]


def project(x: Tensor, slab: Slab, packed: Tensor | None = None, *, transpose: bool = False) -> Tensor:
    """``x Mᵀ``, or ``x M``, for the slab as a matrix ``M`` of ``[count * rows, cols]`` that never exists in memory.

    Raises:
        BasisShapeError: ``x`` or the words are not those of the slab.
    """
    width = slab.count * slab.rows if transpose else slab.cols
    if x.shape != (x.shape[0], width):
        raise BasisShapeError(f"x must be [n, {width}] for this slab, got {list(x.shape)}; reshape it")
    return _sum(x[None], slab, packed, joined=True, transpose=transpose)[0]


@lru_cache(maxsize=64)
def _streams(streams: tuple[int, ...], device: torch.device) -> Tensor:
    # Kept, because a copy to the device has no place in a CUDA graph.
    return torch.tensor([_signed(stream) for stream in streams], dtype=torch.int32, device=device)


def combine_each(coefficients: Tensor, slab: Slab, streams: Sequence[int]) -> Tensor:
    """:func:`combine` for many slabs that differ in their stream alone, in one launch.

    Args:
        coefficients: ``[m, n, count]``.
        slab: any of the slabs.
        streams: the ``m`` streams.

    Returns:
        ``[m, n, rows, cols]``.
    """
    m, n, _ = coefficients.shape
    own = _streams(tuple(streams), coefficients.device)
    if slab.basis.law.disjoint:
        return _gather(coefficients, slab, None, own)
    out = _sum(coefficients, slab, None, own, joined=False, transpose=True)
    return out.view(m, n, slab.rows, slab.cols)


def inner_each(vectors: Tensor, slab: Slab, streams: Sequence[int]) -> Tensor:
    """:func:`inner` for many slabs that differ in their stream alone: ``[m, n, rows, cols]`` to ``[m, n, count]``."""
    own = _streams(tuple(streams), vectors.device)
    if slab.basis.law.disjoint:
        return _segment_sums(vectors, slab, None, own)
    return _sum(vectors, slab, None, own, joined=False, transpose=False)


# --- the hashed law ----------------------------------------------------------------------------------------------


_HASHED = {"VECTORS": 8, "LINES": 8, "BLOCKS": 32, "num_warps": 4}
"""Vectors that share the words of a tile, and the sides of it: as many blocks as there are threads, twice."""


def _hashed_grid(slab: Slab, groups: int, n: int) -> tuple[int, int, int]:
    _check_lines(slab.rows)
    tiles = -(-slab.rows // _HASHED["LINES"]) * -(-slab.cols // (4 * _HASHED["BLOCKS"]))
    return tiles, -(-n // _HASHED["VECTORS"]), groups


def _gather(x: Tensor, slab: Slab, packed: Tensor | None, streams: Tensor | None = None) -> Tensor:
    """The one term of each place of the sums, math (25): ``[groups, n, count]`` to ``[groups, n, rows, cols]``."""
    from randbasis.ops import triton_kernels as kernels

    groups, n, _ = x.shape
    _check_packed(packed, (1, slab.rows, 4 * slab.blocks))
    out = torch.empty(groups, n, slab.rows, slab.cols, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    with _on(x.device):
        kernels.KERNELS["hashed_spread"][_hashed_grid(slab, groups, n)](
            out, x.contiguous(), out if packed is None else packed.contiguous(), x if streams is None else streams,
            n, slab.count, slab.rows, slab.cols, 4 * slab.blocks, **_names(slab),
            STORED=packed is not None, OWN=streams is not None, **_HASHED,
        )  # fmt: skip
    return out


def _segment_sums(x: Tensor, slab: Slab, packed: Tensor | None, streams: Tensor | None = None) -> Tensor:
    """Sums over the places of each matrix, math (25): ``[groups, n, rows, cols]`` to ``[groups, n, count]``.

    In integers: of 62 bits less what the number of places takes, for the largest number of a vector.
    """
    from randbasis.ops import triton_kernels as kernels

    groups, n, rows, cols = x.shape
    _check_packed(packed, (1, slab.rows, 4 * slab.blocks))
    if not x.numel():
        return x.new_zeros(groups, n, slab.count)
    largest = x.flatten(2).abs().amax(-1).float()
    bits = 62 - (rows * cols - 1).bit_length()
    scales = torch.exp2((bits - torch.frexp(largest).exponent).clamp(-126, 126).float())
    copies = max(1, min(32, 2048 // slab.count))
    sums = torch.zeros(copies, groups, n, slab.count, dtype=torch.int64, device=x.device)
    with _on(x.device):
        kernels.KERNELS["hashed_gather"][_hashed_grid(slab, groups, n)](
            sums, x.contiguous(), scales, sums if packed is None else packed.contiguous(),
            sums if streams is None else streams,
            n, slab.count, rows, cols, 4 * slab.blocks, groups, copies, **_names(slab),
            STORED=packed is not None, OWN=streams is not None, **_HASHED,
        )  # fmt: skip
    exact = sums.sum(0).double() / scales.unsqueeze(-1)
    # An integer cannot say that a number was not finite.
    return exact.where(largest.isfinite().unsqueeze(-1), torch.nan).to(x.dtype)

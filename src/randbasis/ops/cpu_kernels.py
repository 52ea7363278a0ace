"""The compiled loops of :mod:`randbasis.ops.cpu`: single-threaded, without the GIL, each over a range of units.

Importing this module imports numba. Every kernel works on a *strip* of ``STRIP`` columns of ``LINES`` lines (a line is
one row of one basis matrix) at a time: the generator runs on all blocks of the strip in lanes, the words become
floating-point entries in a buffer of the first-level cache, and the arithmetic reads them from there. Trip counts are
constant, so LLVM vectorises without a remainder loop, and every output is the same sum in the same order whatever
range it is computed in.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numba import njit  # pyright: ignore[reportUnknownVariableType]
from numpy.typing import NDArray

P = ParamSpec("P")
R = TypeVar("R")
Words = NDArray[np.uint32]
Floats = NDArray[Any]
Source = tuple[Words, int, np.uint64, np.uint64, np.uint64]
"""Where words come from: the packed words (none: generate), words a packed line, both halves of the key, the stream."""
Lanes = tuple[Words, Words, Words]
"""Block, row and index of every lane of the generator."""
Decoder = tuple[int, int, int, float]
"""How words become entries: the code of the law, the threshold of the sparse law, entries in a word, the law's power.

The power of two multiplies results, not entries: there are fewer of them."""

LINES = 8
"""Lines that are generated together: basis matrices in the sums, rows of the slab when it is expanded."""
STRIP = 256
"""Columns that are generated together; a multiple of the 128 of a block of signs."""
SPAN = 64
"""Basis matrices that are summed in the dtype of the coefficients before the sum goes to float64."""
LANES = 256
"""Blocks that :func:`words` generates together."""

SIGN, UNIFORM, NORMAL, SPARSE = range(4)

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIER0 = np.uint64(0xD2511F53)
_MULTIPLIER1 = np.uint64(0xCD9E8D57)
_INCREMENT0 = np.uint64(0x9E3779B9)
_INCREMENT1 = np.uint64(0xBB67AE85)
_ONE = np.uint32(1)


def inlined(**options: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """numba's decorator with its types: a part of the kernels."""
    return njit(**options)  # pyright: ignore[reportUnknownVariableType]


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """A kernel: it runs without the GIL, and its compiled code is kept on disk where numba finds a place for it."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError as error:  # as numba says that no place is writable
        if "locator" not in str(error):
            raise
        _say_that_nothing_is_kept()
        return njit(nogil=True)(function)


@cache
def _say_that_nothing_is_kept() -> None:
    warnings.warn(
        "numba finds no writable place for compiled code, so the loops are compiled again in every process; "
        "set NUMBA_CACHE_DIR to a writable folder",
        stacklevel=2,
    )


@inlined()
def _round(
    c0: np.uint64, c1: np.uint64, c2: np.uint64, c3: np.uint64, k0: np.uint64, k1: np.uint64
) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    # Only the low halves count. What is left in the high ones is masked where it would matter, in the products: that
    # compiles to the 32 × 32 → 64 bit multiplication of vector units, and to nothing else.
    product0 = (c0 & _LOW) * _MULTIPLIER0
    product1 = (c2 & _LOW) * _MULTIPLIER1
    return (product1 >> _HALF) ^ c1 ^ k0, product1, (product0 >> _HALF) ^ c3 ^ k1, product0


@inlined()
def generate(out: Words, lanes: Lanes, first: int, source: Source, count: int) -> None:
    """Philox4x32-10, math (1)-(3), on ``count`` lanes; ``first`` is added to every index."""
    block, row, index = lanes
    _, _, key0, key1, stream = source
    for lane in range(count):
        c0, c1, c2, c3 = np.uint64(block[lane]), np.uint64(row[lane]), np.uint64(index[lane]) + np.uint64(first), stream
        k0, k1 = key0, key1
        for _ in range(10):
            c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
            k0, k1 = k0 + _INCREMENT0, k1 + _INCREMENT1
        out[4 * lane] = np.uint32(c0)
        out[4 * lane + 1] = np.uint32(c1)
        out[4 * lane + 2] = np.uint32(c2)
        out[4 * lane + 3] = np.uint32(c3)


@inlined()
def new_lanes(count: int) -> Lanes:
    """Lanes that point nowhere yet."""
    return np.empty(count, np.uint32), np.empty(count, np.uint32), np.empty(count, np.uint32)


@inlined()
def aim(lanes: Lanes, line: int, at: tuple[int, int, int], blocks: int) -> None:
    """Point the lanes of one line at ``blocks`` blocks from ``at = (index, row, block)``."""
    block, row, index = lanes
    for b in range(blocks):
        lane = line * blocks + b
        index[lane] = at[0]
        row[lane] = at[1]
        block[lane] = at[2] + b


@inlined()
def _fetch(
    raw: Words, lanes: Lanes, index: int, source: Source, packed_line: int, step: int, lines: int, strip: int
) -> tuple[Words, int, int]:
    """The words of ``LINES`` lines of a strip: where they are, the first of them, and from one line to the next.

    Generated, with ``index`` added to that of every lane, or packed: then from ``packed_line`` in steps of ``step``.
    What lies beyond the packed ``lines``, or beyond their width, is arbitrary.
    """
    packed, width = source[0], source[1]
    held = raw.size // LINES
    if not width:
        generate(raw, lanes, index, source, raw.size // 4)
        return raw, 0, held
    first = packed_line * width + strip * held
    count = min(held, width - strip * held)
    if lines >= LINES and count == held:
        return packed, first, step * width
    for g in range(min(lines, LINES)):
        line = packed[first + g * step * width :]
        for w in range(count):
            raw[g * held + w] = line[w]
    return raw, 0, held


@inlined()
def _popcount(u: np.uint32) -> np.int32:
    """Bits set among the low 16."""
    u = np.uint32(u - ((u >> _ONE) & np.uint32(0x5555)))
    u = np.uint32((u & np.uint32(0x3333)) + ((u >> np.uint32(2)) & np.uint32(0x3333)))
    u = np.uint32((u + (u >> np.uint32(4))) & np.uint32(0x0F0F))
    return np.int32((u + (u >> np.uint32(8))) & np.uint32(0x1F))


@inlined()
def _decode(out: Floats, fetched: tuple[Words, int, int], decoder: Decoder, one: Any) -> None:
    """``LINES`` lines of a strip as floating-point entries, the table of laws in math.md; ``one`` has their dtype."""
    words, first, step = fetched
    law, threshold, _, _ = decoder
    if law == SIGN:
        for w in range(STRIP // 32):
            for bit in range(32):
                for g in range(LINES):
                    negative = (words[first + g * step + w] >> np.uint32(bit)) & _ONE
                    out[g * STRIP + 32 * w + bit] = -one if negative else one
        return
    for g in range(LINES):
        # Slices, because an index that might be negative would keep the loops from being vectorised.
        start = first + g * step
        line = words[start : start + STRIP // decoder[2]]
        octets, halves, entries = line.view(np.uint8), line.view(np.uint16), out[g * STRIP : (g + 1) * STRIP]
        if law == UNIFORM:
            for col in range(STRIP):
                entries[col] = np.int32(2 * np.int32(octets[col]) - 255)
        elif law == NORMAL:
            for col in range(STRIP):
                entries[col] = np.int32(_popcount(np.uint32(halves[col])) - 8)
        else:
            for col in range(STRIP):
                u = np.int32(halves[col])
                entries[col] = np.int32(np.int32(u < threshold) - np.int32(u >= 65536 - threshold))


@inlined(fastmath={"contract"})
def _add_products(out: Floats, entries: Floats, factors: Floats) -> None:
    """``out[col] += Σ_g factors[g] · entries[g, col]``, in the order of g."""
    for col in range(STRIP):
        total = out[col]
        for g in range(LINES):
            total += factors[g] * entries[g * STRIP + col]
        out[col] = total


# Reassociation lets the compiler sum in lanes. The order that it picks is fixed in the code that it makes, because the
# trip count is a constant: it depends on the processor, never on threads or ranges.
@inlined(fastmath={"contract", "reassoc"})
def _add_dots(out: Floats, entries: Floats, vector: Floats) -> None:
    """``out[g] += Σ_col vector[col] · entries[g, col]``: a loop over columns that reads the vector once."""
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = vector.dtype.type(0)
    for col in range(STRIP):
        x = vector[col]
        s0 += x * entries[col]
        s1 += x * entries[STRIP + col]
        s2 += x * entries[2 * STRIP + col]
        s3 += x * entries[3 * STRIP + col]
        s4 += x * entries[4 * STRIP + col]
        s5 += x * entries[5 * STRIP + col]
        s6 += x * entries[6 * STRIP + col]
        s7 += x * entries[7 * STRIP + col]
    for g, s in enumerate((s0, s1, s2, s3, s4, s5, s6, s7)):
        out[g] += s


@kernel
def words(
    out: Words, source: Source, first: tuple[int, int, int], rows: int, blocks: int, start: int, stop: int
) -> None:
    """Raw words, math (2), in runs of ``LANES`` blocks ``start`` to ``stop`` of the flat ``out``.

    ``first`` holds the first index, row and block.
    """
    lanes = new_lanes(LANES)
    block, row, index = lanes
    for unit in range(start, stop):
        done = unit * LANES
        count = min(LANES, out.size // 4 - done)
        line, b = done // blocks, done % blocks
        lane = 0
        while lane < count:
            run = min(blocks - b, count - lane)
            i, r = line // rows, line % rows
            for k in range(run):
                index[lane + k] = first[0] + i
                row[lane + k] = first[1] + r
                block[lane + k] = first[2] + b + k
            lane += run
            line += 1
            b = 0
        generate(out[4 * done : 4 * (done + count)], lanes, 0, source, count)


@kernel
def expand(
    out: Floats, source: Source, decoder: Decoder, first: tuple[int, int], rows: int, start: int, stop: int
) -> None:
    """Entries times the law's power; ``out`` is ``[lines, cols]``, a unit is ``LINES`` lines of one strip.

    ``first`` holds the first index and row.
    """
    lines, cols = out.shape
    strips = (cols + STRIP - 1) // STRIP
    held = STRIP // decoder[2]
    blocks = held // 4
    lanes = new_lanes(LINES * blocks)
    raw = np.zeros(LINES * held, np.uint32)
    entries = np.empty(LINES * STRIP, out.dtype)
    power = out.dtype.type(decoder[3])
    for unit in range(start, stop):
        line, strip = unit // strips * LINES, unit % strips
        for g in range(LINES):
            at = (first[0] + (line + g) // rows, first[1] + (line + g) % rows, strip * blocks)
            aim(lanes, g, at, blocks)
        fetched = _fetch(raw, lanes, 0, source, line, 1, lines - line, strip)
        _decode(entries, fetched, decoder, out.dtype.type(1))
        left = strip * STRIP
        count = min(STRIP, cols - left)
        for g in range(min(LINES, lines - line)):
            target = out[line + g, left:]
            for col in range(count):
                target[col] = power * entries[g * STRIP + col]


@kernel
def combine(out: Floats, factors: Floats, count: int, source: Source, decoder: Decoder, start: int, stop: int) -> None:
    """``out[n, row, col] = power · Σᵢ factors[n, i] · entry(i, row, col)``; a unit is one strip of one row.

    ``factors`` is ``[n, at least count, a multiple of LINES]``, zero from ``count`` on.
    """
    n, rows, cols = out.shape
    strips = (cols + STRIP - 1) // STRIP
    held = STRIP // decoder[2]
    blocks = held // 4
    lanes = new_lanes(LINES * blocks)
    raw = np.zeros(LINES * held, np.uint32)
    entries = np.empty(LINES * STRIP, out.dtype)
    part = np.empty(n * STRIP, out.dtype)
    total = np.empty(n * STRIP, np.float64)
    for unit in range(start, stop):
        at, strip = unit // strips, unit % strips
        for g in range(LINES):
            aim(lanes, g, (g, at, strip * blocks), blocks)
        total[:] = 0
        for span in range(0, factors.shape[1], SPAN):
            part[:] = 0
            for i in range(span, min(span + SPAN, factors.shape[1]), LINES):
                fetched = _fetch(raw, lanes, i, source, i * rows + at, rows, count - i, strip)
                _decode(entries, fetched, decoder, out.dtype.type(1))
                for j in range(n):
                    _add_products(part[j * STRIP : (j + 1) * STRIP], entries, factors[j, i : i + LINES])
            for j in range(n * STRIP):
                total[j] += part[j]
        left = strip * STRIP
        for j in range(n):
            for col in range(min(STRIP, cols - left)):
                out[j, at, left + col] = decoder[3] * total[j * STRIP + col]


@kernel
def inner(
    out: Floats, vectors: Floats, count: int, share: int, source: Source, decoder: Decoder, start: int, stop: int
) -> None:
    """``out[part, n, i] = ⟨vectors[n], entries[i]⟩`` over one part of the slab's strips.

    A unit is ``SPAN`` basis matrices on ``share`` strips; ``out`` is float64 ``[parts, n, matrices]``, the matrices
    filled up to a multiple of ``SPAN``; the sum over parts and the law's power are left to the caller.
    """
    n, rows, cols = vectors.shape
    strips = (cols + STRIP - 1) // STRIP
    held = STRIP // decoder[2]
    blocks = held // 4
    spans = out.shape[2] // SPAN
    lanes = new_lanes(LINES * blocks)
    raw = np.zeros(LINES * held, np.uint32)
    entries = np.empty(LINES * STRIP, vectors.dtype)
    strip_of = np.empty(n * STRIP, vectors.dtype)
    for unit in range(start, stop):
        part, span = unit // spans, unit % spans * SPAN
        sums = out[part, :, span : span + SPAN]
        sums[:] = 0
        for place in range(part * share, min((part + 1) * share, rows * strips)):
            at, strip = place // strips, place % strips
            left = strip * STRIP
            strip_of[:] = 0
            for j in range(n):
                for col in range(min(STRIP, cols - left)):
                    strip_of[j * STRIP + col] = vectors[j, at, left + col]
            for g in range(LINES):
                aim(lanes, g, (g, at, strip * blocks), blocks)
            for i in range(0, min(SPAN, count - span), LINES):
                fetched = _fetch(raw, lanes, span + i, source, (span + i) * rows + at, rows, count - span - i, strip)
                _decode(entries, fetched, decoder, vectors.dtype.type(1))
                for j in range(n):
                    _add_dots(sums[j, i : i + LINES], entries, strip_of[j * STRIP : (j + 1) * STRIP])

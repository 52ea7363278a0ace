"""The compiled loops of :mod:`randbasis.ops.cpu` for the hashed law, math (25): one pass over a sum, whatever ``k`` is.

Single-threaded and without the GIL, as :mod:`randbasis.ops.cpu_kernels`, whose generator they use; importing this
module imports numba.
"""

import numpy as np
from numpy.typing import NDArray

from randbasis.ops.cpu_kernels import STRIP, Floats, Lanes, Source, Words, aim, generate, inlined, kernel, new_lanes

Terms = tuple[NDArray[np.int64], Floats]
"""For each place of a strip the index of its matrix, and the sign of its entry there."""

_BLOCKS = STRIP // 4
_LOW_BIT = np.uint32(1)


@inlined()
def _terms(
    terms: Terms, raw: Words, lanes: Lanes, source: Source, matrices: np.uint64, row: int, left: int, count: int
) -> None:
    """Whose ``count`` places of a row are, from the column ``left`` on, and with which sign."""
    packed, width = source[0], source[1]
    owners, signs = terms
    if width:
        line = packed[row * width + left : row * width + left + count]
    else:
        aim(lanes, 0, (0, row, left // 4), _BLOCKS)
        generate(raw, lanes, 0, source, _BLOCKS)
        line = raw[:count]
    for col in range(count):
        word = line[col]
        owners[col] = np.int64((np.uint64(word) * matrices) >> np.uint64(32))
        signs[col] = 1 - 2 * np.int32(word & _LOW_BIT)


@kernel
def combine(out: Floats, factors: Floats, source: Source, start: int, stop: int) -> None:
    """``out[n, row, col] = sign · factors[n, owner]``; a unit is one strip of one row."""
    n, _, cols = out.shape
    strips = (cols + STRIP - 1) // STRIP
    lanes, raw = new_lanes(_BLOCKS), np.empty(STRIP, np.uint32)
    owners, signs = np.empty(STRIP, np.int64), np.empty(STRIP, out.dtype)
    matrices = np.uint64(factors.shape[1])
    for unit in range(start, stop):
        row, left = unit // strips, unit % strips * STRIP
        count = min(STRIP, cols - left)
        _terms((owners, signs), raw, lanes, source, matrices, row, left, count)
        for j in range(n):
            own, target = factors[j], out[j, row, left : left + count]
            for col in range(count):
                target[col] = signs[col] * own[owners[col]]


@kernel
def inner(out: Floats, vectors: Floats, share: int, group: int, source: Source, start: int, stop: int) -> None:
    """``out[part, n, owner] += sign · vectors[n, row, col]`` in the order of the places.

    A unit is one part for ``group`` vectors. A part is ``share`` strips; ``out`` is float64 ``[parts, n, matrices]``;
    the sum over parts is left to the caller.
    """
    n, rows, cols = vectors.shape
    strips = (cols + STRIP - 1) // STRIP
    lanes, raw = new_lanes(_BLOCKS), np.empty(STRIP, np.uint32)
    owners, signs = np.empty(STRIP, np.int64), np.empty(STRIP, np.float64)
    matrices = np.uint64(out.shape[2])
    groups = (n + group - 1) // group
    for unit in range(start, stop):
        part, first = unit // groups, unit % groups * group
        last = min(n, first + group)
        out[part, first:last] = 0
        for place in range(part * share, min((part + 1) * share, rows * strips)):
            row, left = place // strips, place % strips * STRIP
            count = min(STRIP, cols - left)
            _terms((owners, signs), raw, lanes, source, matrices, row, left, count)
            for j in range(first, last):
                sums, values = out[part, j], vectors[j, row, left : left + count]
                for col in range(count):
                    sums[owners[col]] += signs[col] * values[col]

"""The CUDA kernels of :mod:`randbasis.ops.triton`; importing this module imports triton.

Every kernel works on *tiles* of the basis: some lines (a line is one row of one basis matrix) by some columns. A tile
is made in registers from its raw words, which are generated or read from packed storage, and goes from there into a
store or into a product. No entry is written to memory but by :func:`expand`.

Entries are integers of at most eight significant bits, so bfloat16 holds them exactly. A float32 operand becomes three
bfloat16 pieces that add up to it and are multiplied one after the other on the tensor cores: so the product of a
float32 with an entry is exact, and only the float32 sums round. A single vector is not worth a matrix product: it is
multiplied by the entries in float32, where they are made.
"""

# The body of a kernel is Triton's own language in Python's syntax: it has no Python types.
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUntypedFunctionDecorator=false, reportMissingTypeArgument=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportUnnecessaryIsInstance=false

from typing import Any

import triton
import triton.language as tl
from triton.runtime import JITFunction

SIGN = tl.constexpr(0)
UNIFORM = tl.constexpr(1)
NORMAL = tl.constexpr(2)
SPARSE = tl.constexpr(3)


# --- tiles of the basis ------------------------------------------------------------------------------------------


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10, math (1), on uint32 tensors of one shape."""
    for _ in tl.static_range(10):
        before0, before2 = c0, c2
        c0 = tl.umulhi(before2, 0xCD9E8D57) ^ c1 ^ k0
        c2 = tl.umulhi(before0, 0xD2511F53) ^ c3 ^ k1
        c1 = tl.mul(before2, 0xCD9E8D57, sanitize_overflow=False)
        c3 = tl.mul(before0, 0xD2511F53, sanitize_overflow=False)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _generate(index, row, block, basis_stream, key0, key1, LINES: tl.constexpr, BLOCKS: tl.constexpr):
    """Words ``[LINES, 4 * BLOCKS]`` of the lines ``(index, row)`` from block ``block`` on, math (2)-(3)."""
    zero = tl.zeros([LINES, BLOCKS], tl.uint32)
    c0 = zero + (block.to(tl.uint32) + tl.arange(0, BLOCKS).to(tl.uint32))[None, :]
    c1 = zero + row.to(tl.uint32)[:, None]
    c2 = zero + index.to(tl.uint32)[:, None]
    c3 = zero + basis_stream.to(tl.uint32)
    w0, w1, w2, w3 = _philox(c0, c1, c2, c3, key0.to(tl.uint32), key1.to(tl.uint32))
    # Joined so that the last two axes count 0, 1, 2, 3.
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [LINES, 4 * BLOCKS])


@triton.jit
def _fetch(packed, line, lines, width, word, LINES: tl.constexpr, WORDS: tl.constexpr):
    """Words ``[LINES, WORDS]`` of packed lines from word ``word`` on; 0 beyond the lines and beyond their width."""
    words = word + tl.arange(0, WORDS)
    at = line.to(tl.int64)[:, None] * width + words[None, :]
    return tl.load(packed + at, mask=(line < lines)[:, None] & (words < width)[None, :], other=0).to(tl.uint32)


@triton.jit
def _decode(words, threshold, one, LAW: tl.constexpr, LINES: tl.constexpr, WORDS: tl.constexpr):
    """Float32 entries ``[LINES, columns]`` of words ``[LINES, WORDS]``, the table of laws in math.md."""
    if LAW == SIGN:
        bit = (31 - tl.arange(0, 32)).to(tl.uint32)[None, None, :]
        # The bit becomes the sign of a one: no comparison, no conversion from integers.
        signed = ((words[:, :, None] << bit) & 0x80000000) | one.to(tl.uint32)
        entries = tl.reshape(signed.to(tl.float32, bitcast=True), [LINES, WORDS * 32])
    elif LAW == UNIFORM:
        octet = (8 * tl.arange(0, 4)).to(tl.uint32)[None, None, :]
        u = ((words[:, :, None] >> octet) & 0xFF).to(tl.int32)
        entries = tl.reshape((2 * u - 255).to(tl.float32), [LINES, WORDS * 4])
    elif LAW == NORMAL:
        # Both halves of a word are counted at once.
        pairs = words - ((words >> 1) & 0x55555555)
        fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
        eights = (fours + (fours >> 4)) & 0x0F0F0F0F
        counts = eights + (eights >> 8)
        half = (16 * tl.arange(0, 2)).to(tl.uint32)[None, None, :]
        u = ((counts[:, :, None] >> half) & 0x1F).to(tl.int32)
        entries = tl.reshape((u - 8).to(tl.float32), [LINES, WORDS * 2])
    else:
        half = (16 * tl.arange(0, 2)).to(tl.uint32)[None, None, :]
        u = ((words[:, :, None] >> half) & 0xFFFF).to(tl.int32)
        signs = tl.where(u < threshold, 1.0, 0.0) - tl.where(u >= 65536 - threshold, 1.0, 0.0)
        entries = tl.reshape(signs, [LINES, WORDS * 2])
    return entries


@triton.jit
def _tile(
    packed, index, row, rows, lines, width, strip, basis_stream, key0, key1, threshold, one,
    STORED: tl.constexpr, LAW: tl.constexpr, LINES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Entries of some lines of a slab in one strip of ``BLOCKS`` blocks, float32 ``[LINES, columns]``."""
    if STORED:
        words = _fetch(packed, index * rows + row, lines, width, strip * (4 * BLOCKS), LINES, 4 * BLOCKS)
    else:
        words = _generate(index, row, strip * BLOCKS, basis_stream, key0, key1, LINES, BLOCKS)
    return _decode(words, threshold, one, LAW, LINES, 4 * BLOCKS)


@triton.jit
def _add_product(sums, x, entries, PIECES: tl.constexpr, OPERAND: tl.constexpr):
    """``sums + x · entries`` on the tensor cores, in float32.

    With three pieces, each is what rounding to bfloat16 leaves of the pieces before. An infinity gives NaN.
    """
    exact = entries.to(OPERAND)
    if PIECES == 1:
        sums = tl.dot(x.to(OPERAND), exact, sums, input_precision="ieee")
    else:
        rest = x
        for _ in tl.static_range(PIECES):
            piece = rest.to(tl.bfloat16)
            sums = tl.dot(piece.to(OPERAND), exact, sums, input_precision="ieee")
            rest = rest - piece.to(tl.float32)
    return sums


# --- kernels -----------------------------------------------------------------------------------------------------

#: Numbers that differ from call to call without changing the code: no variant of a kernel is compiled for a value.
_VALUES = [
    "n", "groups", "basis_stream", "key0", "key1", "threshold", "one", "power", "index0", "row0", "block0", "share",
    "matrices", "copies",
]  # fmt: skip


@triton.jit(do_not_specialize=_VALUES)
def words(
    out, lines, rows, width, index0, row0, block0, basis_stream, key0, key1, LINES: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """Raw words of ``lines`` lines, ``rows`` of them an index; out is int32 ``[lines, width]``, math (2)."""
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    word = tl.program_id(1) * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS)
    index, row = index0 + line // rows, row0 + line % rows
    made = _generate(index, row, block0 + tl.program_id(1) * BLOCKS, basis_stream, key0, key1, LINES, BLOCKS)
    at = line.to(tl.int64)[:, None] * width + word[None, :]
    tl.store(out + at, made.to(tl.int32, bitcast=True), mask=(line < lines)[:, None] & (word < width)[None, :])


@triton.jit(do_not_specialize=_VALUES)
def expand(
    out, packed, lines, rows, cols, width, index0, row0, basis_stream, key0, key1, threshold, one, power,
    STORED: tl.constexpr, LAW: tl.constexpr, LINES: tl.constexpr, BLOCKS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Entries of ``lines`` lines times ``power``, ``[lines, cols]``; ``packed`` has words of these lines alone."""
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    strip = tl.program_id(1)
    if STORED:
        raw = _fetch(packed, line, lines, width, strip * (4 * BLOCKS), LINES, 4 * BLOCKS)
    else:
        index, row = index0 + line // rows, row0 + line % rows
        raw = _generate(index, row, strip * BLOCKS, basis_stream, key0, key1, LINES, BLOCKS)
    col = strip * COLS + tl.arange(0, COLS)
    at = line.to(tl.int64)[:, None] * cols + col[None, :]
    entries = _decode(raw, threshold, one, LAW, LINES, 4 * BLOCKS)
    if LAW != SIGN:
        entries = entries * power
    tl.store(out + at, entries.to(out.dtype.element_ty), mask=(line < lines)[:, None] & (col < cols)[None, :])


@triton.jit(do_not_specialize=_VALUES)
def spread(
    out, x, packed, streams, n, lines, rows, cols, width, groups, share, basis_stream, key0, key1, threshold, one,
    power,
    JOINED: tl.constexpr, STORED: tl.constexpr, OWN: tl.constexpr, LAW: tl.constexpr, PIECES: tl.constexpr,
    OPERAND: tl.constexpr, VECTORS: tl.constexpr, LINES: tl.constexpr, BLOCKS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """``out[part, g, v] = power · Σ_line x[g, v, line] · entries(line)``, math (6), (8), (18): lines into columns.

    ``JOINED``: the lines are all rows of all basis matrices, out is ``[parts, groups, n, cols]``. Else they are the
    basis matrices, each at the row of the output: out is ``[parts, groups, n, rows, cols]``. ``OWN``: group ``g`` has
    the stream ``streams[g]``. A part is ``share`` lines; the sum over parts is left to the caller.
    """
    strips = tl.cdiv(cols, COLS)
    at_row, strip = tl.program_id(0) // strips, tl.program_id(0) % strips
    part, group = tl.program_id(2) // groups, tl.program_id(2) % groups
    if OWN:
        basis_stream = tl.load(streams + group)
    vector = tl.program_id(1) * VECTORS + tl.arange(0, VECTORS)
    source = x + (group * n + vector).to(tl.int64)[:, None] * lines
    sums = tl.zeros([VECTORS, COLS], tl.float32)
    stop = tl.minimum((part + 1) * share, lines)
    for first in range(part * share, stop, LINES):
        line = first + tl.arange(0, LINES)
        if JOINED:
            index, row, count = line // rows, line % rows, lines
        else:
            index, row, count = line, at_row + tl.zeros_like(line), lines * rows
        entries = _tile(
            packed, index, row, rows, count, width, strip, basis_stream, key0, key1, threshold, one,
            STORED, LAW, LINES, BLOCKS,
        )  # fmt: skip
        if VECTORS == 1:
            # Loaded as a column: in this layout a thread sums over lines alone.
            first_of = (group * n + tl.program_id(1)).to(tl.int64) * lines
            column = tl.load(x + first_of + line, mask=line < stop, other=0.0)
            sums += tl.sum(column.to(tl.float32)[:, None] * entries, axis=0)[None, :]
        else:
            value = tl.load(source + line[None, :], mask=(vector < n)[:, None] & (line < stop)[None, :], other=0.0)
            sums = _add_product(sums, value, entries, PIECES, OPERAND)
    col = strip * COLS + tl.arange(0, COLS)
    height = tl.num_programs(0) // strips
    target = (((part * groups + group) * n + vector).to(tl.int64) * height + at_row)[:, None] * cols + col[None, :]
    tl.store(out + target, (sums * power).to(out.dtype.element_ty), mask=(vector < n)[:, None] & (col < cols)[None, :])


@triton.jit(do_not_specialize=_VALUES)
def gather(
    out, x, packed, streams, n, lines, rows, cols, width, groups, share, basis_stream, key0, key1, threshold, one,
    power,
    JOINED: tl.constexpr, STORED: tl.constexpr, OWN: tl.constexpr, LAW: tl.constexpr, PIECES: tl.constexpr,
    OPERAND: tl.constexpr, VECTORS: tl.constexpr, LINES: tl.constexpr, BLOCKS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """``out[part, g, v, line] = power · ⟨x[g, v], entries(line)⟩``, math (10): the adjoint of ``spread``.

    ``JOINED``: as there, and x is ``[groups, n, cols]``. Else x is ``[groups, n, rows, cols]`` and a line is a whole
    basis matrix. A part is ``share`` strips of columns; the sum over parts is left to the caller.
    """
    strips = tl.cdiv(cols, COLS)
    height = 1 if JOINED else rows
    part, group = tl.program_id(2) // groups, tl.program_id(2) % groups
    if OWN:
        basis_stream = tl.load(streams + group)
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    vector = tl.program_id(1) * VECTORS + tl.arange(0, VECTORS)
    source = (group * n + vector).to(tl.int64) * height
    # One vector: the sum over the columns of a strip, which lie in different threads, waits for the end.
    sums = tl.zeros([LINES, COLS] if VECTORS == 1 else [VECTORS, LINES], tl.float32)
    for place in range(part * share, tl.minimum((part + 1) * share, height * strips)):
        at_row, strip = place // strips, place % strips
        col = strip * COLS + tl.arange(0, COLS)
        at = (source + at_row)[:, None] * cols + col[None, :]
        value = tl.load(x + at, mask=(vector < n)[:, None] & (col < cols)[None, :], other=0.0)
        if JOINED:
            index, row, count = line // rows, line % rows, lines
        else:
            index, row, count = line, at_row + tl.zeros_like(line), lines * rows
        entries = _tile(
            packed, index, row, rows, count, width, strip, basis_stream, key0, key1, threshold, one,
            STORED, LAW, LINES, BLOCKS,
        )  # fmt: skip
        if VECTORS == 1:
            sums += value.to(tl.float32) * entries
        else:
            sums = _add_product(sums, value, tl.trans(entries), PIECES, OPERAND)
    target = ((part * groups + group) * n + vector).to(tl.int64)[:, None] * lines + line[None, :]
    if VECTORS == 1:  # noqa: SIM108 -- Triton compiles this branch, not that of an expression
        result = tl.sum(sums, axis=1)[None, :]
    else:
        result = sums
    tl.store(
        out + target, (result * power).to(out.dtype.element_ty), mask=(vector < n)[:, None] & (line < lines)[None, :]
    )


# --- the hashed law ----------------------------------------------------------------------------------------------


@triton.jit
def _owners(
    packed, row, rows, width, strip, matrices, basis_stream, key0, key1,
    STORED: tl.constexpr, LINES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Whose the places ``[LINES, 4 * BLOCKS]`` of some rows in one strip are, and with which sign, math (25)."""
    if STORED:
        drawn = _fetch(packed, row, rows, width, strip * (4 * BLOCKS), LINES, 4 * BLOCKS)
    else:
        drawn = _generate(tl.zeros_like(row), row, strip * BLOCKS, basis_stream, key0, key1, LINES, BLOCKS)
    owner = tl.umulhi(drawn, tl.zeros_like(drawn) + matrices.to(tl.uint32)).to(tl.int32)
    return owner, 1 - 2 * (drawn & 1).to(tl.int32)


@triton.jit(do_not_specialize=_VALUES)
def hashed_spread(
    out, x, packed, streams, n, matrices, rows, cols, width, basis_stream, key0, key1,
    STORED: tl.constexpr, OWN: tl.constexpr, VECTORS: tl.constexpr, LINES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """``out[g, v, row, col] = sign · x[g, v, owner]``, math (25); ``OWN``: group ``g`` has a stream, ``streams[g]``."""
    strips = tl.cdiv(cols, 4 * BLOCKS)
    group, strip = tl.program_id(2), tl.program_id(0) % strips
    if OWN:
        basis_stream = tl.load(streams + group)
    row = tl.program_id(0) // strips * LINES + tl.arange(0, LINES)
    col = strip * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS)
    owner, sign = _owners(packed, row, rows, width, strip, matrices, basis_stream, key0, key1, STORED, LINES, BLOCKS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    place = row.to(tl.int64)[:, None] * cols + col[None, :]
    first = tl.program_id(1) * VECTORS
    for vector in range(first, tl.minimum(first + VECTORS, n)):
        at = (group * n + vector).to(tl.int64)
        value = tl.load(x + at * matrices + owner, mask=inside, other=0.0).to(tl.float32) * sign.to(tl.float32)
        tl.store(out + at * rows * cols + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_VALUES)
def hashed_gather(
    out, x, scales, packed, streams, n, matrices, rows, cols, width, groups, copies, basis_stream, key0, key1,
    STORED: tl.constexpr, OWN: tl.constexpr, VECTORS: tl.constexpr, LINES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """``out[copy, g, v, owner] += sign · x[g, v, row, col] · scales[g, v]`` in int64: the adjoint of ``hashed_spread``.

    A sum of integers does not depend on the order in which programs add to it. There are some copies, for programs not
    to wait for each other where the matrices are few; the sum over them is left to the caller.
    """
    strips = tl.cdiv(cols, 4 * BLOCKS)
    group, strip = tl.program_id(2), tl.program_id(0) % strips
    if OWN:
        basis_stream = tl.load(streams + group)
    row = tl.program_id(0) // strips * LINES + tl.arange(0, LINES)
    col = strip * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS)
    owner, sign = _owners(packed, row, rows, width, strip, matrices, basis_stream, key0, key1, STORED, LINES, BLOCKS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    place = row.to(tl.int64)[:, None] * cols + col[None, :]
    first = tl.program_id(1) * VECTORS
    copy = tl.program_id(0) % copies
    for vector in range(first, tl.minimum(first + VECTORS, n)):
        at = (group * n + vector).to(tl.int64)
        value = tl.load(x + at * rows * cols + place, mask=inside, other=0.0).to(tl.float32)
        # What is not finite is no integer: the caller knows of it.
        scaled = tl.where(tl.abs(value) <= 3.4028234e38, value * tl.load(scales + at), 0.0)
        fixed = scaled.to(tl.int64) * sign.to(tl.int64)
        target = ((copy * groups + group).to(tl.int64) * n + vector) * matrices
        tl.atomic_add(out + target + owner, fixed, mask=inside, sem="relaxed")


KERNELS: dict[str, Any] = {
    "words": words,
    "expand": expand,
    "spread": spread,
    "gather": gather,
    "hashed_spread": hashed_spread,
    "hashed_gather": hashed_gather,
}

INTERPRETED = not isinstance(words, JITFunction)
"""Whether ``TRITON_INTERPRET`` was set when this module was imported: the kernels then run on the CPU, slowly."""

OPERANDS = {"float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16}
"""Dtypes of a product's operands by name. (The interpreter multiplies bfloat16 as integers, so it gets float32.)"""

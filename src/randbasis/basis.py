"""SEED → BASIS: a seed names an infinite random tensor, math (1)-(5).

Entry ``(i, row, col)`` of a basis is a pure function of ``(seed, stream, law, i, row, col)``: not of the shape asked
for, the device, the dtype, the library version, the other layers or any global random state. Everything here is
plain torch integer arithmetic in int64 that never overflows: the specification in code. The fast paths in
:mod:`randbasis.ops` must equal it bit for bit.
"""

import hashlib
import math
import operator
import re
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from torch import Tensor

from randbasis.errors import BasisShapeError, LawError, SeedError

BLOCK_BITS = 128
"""Bits that one evaluation of the generator gives."""

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)


@dataclass(frozen=True, slots=True)
class Law:
    """How the random bits of an entry become an integer; see the table of laws in math.md.

    Attributes:
        name: canonical name, ``"sign"``, ``"uniform"``, ``"normal"`` or ``"sparse(s)"``.
        bits: bits that one entry takes from a block of 128.
        variance: exact variance of the integer entry.
        threshold: ``t`` of the sparse law, 0 for the others.
    """

    name: str
    bits: int
    variance: float
    threshold: int = 0

    @property
    def entries_per_block(self) -> int:
        """``E`` of math (2): entries in one block of 128 bits."""
        return BLOCK_BITS // self.bits

    @property
    def unit_scale(self) -> float:
        """The real factor of math (5) that gives the basis unit variance."""
        return 1.0 / math.sqrt(self.variance)

    @property
    def power(self) -> float:
        """The greatest power of two that is not above :attr:`unit_scale`: what entries are multiplied by, math (5).

        An entry times a power of two is exact in every floating dtype, and a sum of such entries is as large as one
        of unit variance, within a factor of two: so it is stored in float16 where the result itself can be.
        """
        return 2.0 ** math.floor(math.log2(self.unit_scale))

    @property
    def kind(self) -> str:
        """The name without its parameter: ``"sign"``, ``"uniform"``, ``"normal"`` or ``"sparse"``."""
        return self.name.partition("(")[0]


_DENSE_LAWS = {
    "sign": Law("sign", bits=1, variance=1.0),
    "uniform": Law("uniform", bits=8, variance=21845.0),
    "normal": Law("normal", bits=16, variance=4.0),
}
_SPARSE = re.compile(r"sparse\(\s*([0-9.]+(?:e[0-9]+)?)\s*\)")


def parse_law(name: str | Law) -> Law:
    """The law of that name.

    Args:
        name: ``"sign"``, ``"uniform"``, ``"normal"`` or ``"sparse(s)"`` with ``2 <= s <= 65536``: an entry is ``+1``
            and ``-1`` with probability ``1/s`` each, else 0.

    Raises:
        LawError: the name is none of these, or ``s`` is out of range.
    """
    if isinstance(name, Law):
        return name
    if name in _DENSE_LAWS:
        return _DENSE_LAWS[name]
    match = _SPARSE.fullmatch(name)
    try:
        sparsity = float(match.group(1)) if match else math.nan
    except ValueError:
        sparsity = math.nan
    if not 2.0 <= sparsity <= 65536.0:
        raise LawError(
            f"law must be 'sign', 'uniform', 'normal' or 'sparse(s)' with 2 <= s <= 65536, got {name!r}; "
            "use for example law='sign' or law='sparse(6)'"
        )
    threshold = round(65536 / sparsity)
    # All digits: ops get a law by its name, and a rounded s may have another threshold.
    return Law(
        f"sparse({repr(sparsity).removesuffix('.0')})", bits=16, variance=2 * threshold / 65536, threshold=threshold
    )


def check_seed(seed: SupportsIndex) -> int:
    """The seed as a Python integer.

    Raises:
        SeedError: it is not an integer, is negative, or needs more than 64 bits.
    """
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise SeedError(f"seed must be an integer from 0 to 2**64 - 1, got {seed!r}; pass for example seed=0")
    value = operator.index(seed)
    if not 0 <= value < 2**64:
        raise SeedError(f"seed must be from 0 to 2**64 - 1, got {value}; take it modulo 2**64")
    return value


def stream_of(name: str | int) -> int:
    """The 32-bit stream of a name, math (4); an integer is a stream already.

    Args:
        name: ``"<method>/<role>"`` for a basis shared by all layers, ``"<method>/<role>/<module path>"`` for the
            basis of one matrix, or the stream itself.

    Raises:
        BasisShapeError: neither a name nor an integer of 32 unsigned bits.
    """
    if isinstance(name, str):
        return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:4], "little")
    if isinstance(name, bool) or not hasattr(name, "__index__") or not 0 <= name < 2**32:
        raise BasisShapeError(
            f"a stream must be an integer from 0 to 2**32 - 1, got {name!r}; use stream_of('method/role')"
        )
    return operator.index(name)


@dataclass(frozen=True, slots=True)
class Basis:
    """One infinite frozen random tensor: a family of matrices that no file stores.

    Attributes:
        seed: 64-bit unsigned seed.
        stream: 32-bit unsigned stream, :func:`stream_of` a name.
        law: how bits become entries.
    """

    seed: int
    stream: int
    law: Law

    @classmethod
    def named(cls, seed: SupportsIndex, name: str | int, law: str | Law) -> "Basis":
        """The basis of a seed, a name and a law, each checked."""
        return cls(check_seed(seed), stream_of(name), parse_law(law))

    @property
    def key(self) -> tuple[int, int]:
        """The key of the generator, math (2)."""
        return self.seed & _MASK, self.seed >> 32


def _multiply(value: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit numbers, in halves so that int64 never overflows."""
    low = value * (multiplier & 0xFFFF)
    high = value * (multiplier >> 16)
    total = low + ((high & 0xFFFF) << 16)
    return ((high >> 16) + (total >> 32)) & _MASK, total & _MASK


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10, math (1).

    Args:
        counter: four int64 tensors of 32-bit values, broadcastable against each other.
        key: two 32-bit integers.

    Returns:
        Four int64 tensors of 32-bit values of the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK, (k1 + _KEY_INCREMENTS[1]) & _MASK
    zero = c0 & c1 & c2 & c3 & 0
    return tuple(out | zero for out in (c0, c1, c2, c3))


def _check_range(axis: str, start: int, size: int, limit: int) -> None:
    if start < 0 or size < 0 or start + size > limit:
        raise BasisShapeError(
            f"{axis} must lie in 0..{limit} (the generator's counter has 32 bits), got start {start} and size {size}; "
            "ask for a smaller shape"
        )


def block_words(
    basis: Basis,
    index: tuple[int, int],
    row: tuple[int, int],
    block: tuple[int, int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Raw random words of whole blocks, math (2) and (3): what packed storage holds for every law.

    Args:
        basis: which infinite tensor.
        index: first basis matrix and how many.
        row: first row and how many.
        block: first block of 128 bits in a row and how many.
        device: where to compute.

    Returns:
        int32 tensor ``[count, rows, 4 * blocks]``; word ``4 * block + n`` is output ``n`` of the generator.

    Raises:
        BasisShapeError: an axis leaves the 32 bits of its counter.
    """
    for axis, (start, size) in {"index": index, "row": row, "block": block}.items():
        _check_range(axis, start, size, 2**32)
    i, r, b = (
        torch.arange(start, start + size, dtype=torch.int64, device=device) for start, size in (index, row, block)
    )
    stream = torch.tensor(basis.stream, dtype=torch.int64, device=device)
    outs = philox((b[None, None, :], r[None, :, None], i[:, None, None], stream), basis.key)
    words = torch.stack(outs, dim=-1).reshape(index[1], row[1], 4 * block[1])
    return torch.where(words > 0x7FFFFFFF, words - 0x100000000, words).to(torch.int32)


def decode(words: Tensor, law: str | Law) -> Tensor:
    """Integer entries from raw words, math (3) and the table of laws.

    Args:
        words: int32 ``[..., w]``, whole blocks.
        law: the law.

    Returns:
        int16 tensor ``[..., w * 32 / bits]``.
    """
    chosen = parse_law(law)
    shifts = torch.arange(0, 32, chosen.bits, dtype=torch.int32, device=words.device)
    u = ((words.unsqueeze(-1) >> shifts) & ((1 << chosen.bits) - 1)).flatten(-2)
    if chosen.kind == "sign":
        entries = 1 - 2 * u
    elif chosen.kind == "uniform":
        entries = 2 * u - 255
    elif chosen.kind == "normal":
        entries = _popcount16(u) - 8
    else:
        t = chosen.threshold
        entries = (u < t).to(torch.int32) - (u >= 65536 - t).to(torch.int32)
    return entries.to(torch.int16)


def _popcount16(u: Tensor) -> Tensor:
    u = u - ((u >> 1) & 0x5555)
    u = (u & 0x3333) + ((u >> 2) & 0x3333)
    u = (u + (u >> 4)) & 0x0F0F
    return (u + (u >> 8)) & 0x1F


def basis_entries(
    seed: SupportsIndex,
    name: str | int,
    law: str | Law,
    shape: tuple[int, int, int],
    *,
    start: tuple[int, int, int] = (0, 0, 0),
    device: torch.device | str = "cpu",
) -> Tensor:
    """Integer entries of a basis, math (1)-(5).

    Multiply by ``parse_law(law).unit_scale`` for a basis of unit variance.

    Args:
        seed: 64-bit unsigned seed.
        name: stream name such as ``"nola/A"``, or the stream itself.
        law: ``"sign"``, ``"uniform"``, ``"normal"`` or ``"sparse(s)"``.
        shape: ``(count, rows, cols)``.
        start: first index, row and column.
        device: where to compute; the result does not depend on it.

    Returns:
        int16 tensor of that shape.

    Raises:
        SeedError: the seed is not a 64-bit unsigned integer.
        LawError: unknown law.
        BasisShapeError: the shape leaves the generator's counters.
    """
    basis = Basis.named(seed, name, law)
    count, rows, cols = shape
    first_index, first_row, first_col = start
    per_block = basis.law.entries_per_block
    _check_range("col", first_col, cols, per_block * 2**32)
    first_block = first_col // per_block
    blocks = -(-(first_col + cols) // per_block) - first_block
    words = block_words(basis, (first_index, count), (first_row, rows), (first_block, blocks), device)
    skip = first_col - first_block * per_block
    return decode(words, basis.law)[..., skip : skip + cols].contiguous()

"""SEED → BASIS: a seed names an infinite random tensor, math (1)-(5), (25).

Entry ``(i, row, col)`` of a basis is a pure function of ``(seed, stream, law, i, row, col)``: not of the shape asked
for, the device, the dtype, the library version, the other layers or any global random state. Everything here is
plain torch integer arithmetic in int64 that never overflows: the specification in code. The fast paths in
:mod:`randbasis.ops` must equal it bit for bit.
"""

from dataclasses import dataclass
from typing import SupportsIndex

import torch
from torch import Tensor

from randbasis.errors import BasisShapeError, LawError, StreamValueError
from randbasis.laws import Law, check_seed, parse_law, stream_of

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)


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


def check_streams(name: str, found: Tensor) -> None:
    """Raise unless a tensor holds streams, math (4): one rounded bit names another random matrix.

    Args:
        name: of the tensor, for the message.
        found: the tensor.

    Raises:
        StreamValueError: it is of another dtype than int64, or holds what is no unsigned integer of 32 bits.
    """
    if found.is_meta:
        return
    if found.dtype != torch.int64:
        raise not_streams(name, f"a tensor of {found.dtype}")
    if bool(((found < 0) | (found >= 1 << 32)).any()):
        raise not_streams(name, f"{found.tolist()}")


def not_streams(name: str, got: str) -> StreamValueError:
    """What is said of a tensor ``name`` that should hold streams and holds what it ``got``."""
    return StreamValueError(
        f"{name} must be int64 with values of 32 bits, as saved: streams name the random matrices of a basis that is "
        f"not shared, and are no numbers to be cast or averaged, got {got}; leave integers alone where coefficients "
        "are cast or averaged (AveragedModel without use_buffers), and load the saved adapter again"
    )


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
        law: the law; the hashed one has :func:`hashed_terms`.

    Returns:
        int16 tensor ``[..., w * 32 / bits]``.

    Raises:
        LawError: the law is hashed, whose words are those of all matrices together.
    """
    chosen = parse_law(law)
    if chosen.disjoint:
        raise LawError(f"law must be one whose matrices have words of their own, got {chosen.name!r}; use hashed_terms")
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


def hashed_terms(words: Tensor, law: str | Law) -> tuple[Tensor, Tensor]:
    """Whose each place of a hashed basis is, and with which sign: ``i = floor(w · k / 2³²)``, math (25).

    Args:
        words: int32 ``[..., w]``, those of index 0.
        law: ``"hashed(k)"``.

    Returns:
        The index of the matrix and the sign of its entry there, int64 ``[..., w]``; the other matrices have 0.

    Raises:
        LawError: the law is another, or does not say of how many matrices.
    """
    chosen = parse_law(law)
    if not chosen.matrices:
        raise LawError(f"law must be 'hashed(k)' for a basis of k matrices, got {chosen.name!r}; say how many")
    w = words.to(torch.int64) & _MASK
    return (w * chosen.matrices) >> 32, 1 - 2 * (w & 1)


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
        law: ``"sign"``, ``"uniform"``, ``"normal"``, ``"sparse(s)"`` or ``"hashed(k)"``.
        shape: ``(count, rows, cols)``.
        start: first index, row and column.
        device: where to compute; the result does not depend on it.

    Returns:
        int16 tensor of that shape.

    Raises:
        SeedError: the seed is not a 64-bit unsigned integer.
        LawError: unknown law, or ``"hashed"`` without its ``k``, which is not read from the shape.
        BasisShapeError: the shape leaves the generator's counters, or the ``k`` matrices of a hashed law.
    """
    basis = Basis.named(seed, name, law)
    count, rows, cols = shape
    first_index, first_row, first_col = start
    per_block = basis.law.entries_per_block
    _check_range("col", first_col, cols, per_block * 2**32)
    first_block = first_col // per_block
    blocks = -(-(first_col + cols) // per_block) - first_block
    own = (first_index, count)
    words = block_words(basis, (0, 1) if basis.law.disjoint else own, (first_row, rows), (first_block, blocks), device)
    entries = _decode_hashed(words, basis.law, own) if basis.law.disjoint else decode(words, basis.law)
    skip = first_col - first_block * per_block
    return entries[..., skip : skip + cols].contiguous()


def _decode_hashed(words: Tensor, law: Law, index: tuple[int, int]) -> Tensor:
    """The entries of some matrices of a hashed basis, int16 ``[count, rows, w]``, math (25)."""
    owner, sign = hashed_terms(words, law)
    first, count = index
    if first < 0 or count < 0 or first + count > law.matrices:
        raise BasisShapeError(
            f"index must lie in 0..{law.matrices} for the law {law.name!r}, got start {first} and size {count}; "
            "ask for fewer matrices, or for those of a law with a larger k, which is another basis"
        )
    wanted = torch.arange(first, first + count, device=words.device).view(-1, 1, 1)
    return torch.where(owner == wanted, sign, 0).to(torch.int16)

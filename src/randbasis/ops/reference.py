"""Every op on a basis in plain torch: the specification in code, on any device and in any floating dtype.

A :class:`Slab` is a finite part of a basis. As a matrix it is read in one of two ways: ``[count, rows * cols]``, to
combine whole basis matrices, or ``[count * rows, cols]``, to project vectors. The functions here work tile by tile
and hold at most one tile in floating point. Sums of a hashed slab, math (25), read its words once, whatever its count.
Entries in floating point are the integers times the power of their law, math (5).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from randbasis.basis import Basis, block_words, decode, hashed_terms
from randbasis.errors import BasisShapeError

TILE_ENTRIES = 1 << 20
"""Entries of the basis that exist in floating point at one time on the recompute path."""


@dataclass(frozen=True, slots=True)
class Slab:
    """The first ``count`` matrices of a basis, ``rows`` × ``cols`` each.

    Attributes:
        basis: the infinite tensor that it is a part of; the law ``"hashed"`` becomes that of ``count`` matrices.
        count: number of basis matrices.
        rows: rows of each.
        cols: columns of each.
    """

    basis: Basis
    count: int
    rows: int
    cols: int

    def __post_init__(self) -> None:
        law = self.basis.law
        if not law.disjoint:
            return
        if not law.matrices:
            object.__setattr__(self, "basis", replace(self.basis, law=law.of(self.count)))
        elif self.count != law.matrices:
            raise BasisShapeError(
                f"count must be {law.matrices} for the law {law.name!r}, got {self.count}; another number of matrices "
                "is another basis, which law='hashed' gives"
            )

    @property
    def disjoint(self) -> bool:
        """Whether each place belongs to one of several matrices: it is never written out, and its sums are one pass."""
        return self.count > 1 and self.basis.law.disjoint

    @property
    def drawn(self) -> "Tile":
        """What words are drawn for: all matrices, or one where all have their words in common, math (25)."""
        return Tile(0, 1 if self.basis.law.disjoint else self.count, 0, self.rows)

    @property
    def summands(self) -> int:
        """Matrices that a place of a sum has an entry of, other than 0."""
        return self.drawn.count

    @property
    def entries(self) -> int:
        """Number of entries."""
        return self.count * self.rows * self.cols

    @property
    def blocks(self) -> int:
        """Blocks of 128 bits in a row."""
        return -(-self.cols // self.basis.law.entries_per_block)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the raw words."""
        return self.drawn.count * self.rows * self.blocks * 16


@dataclass(frozen=True, slots=True)
class Tile:
    """A range of basis matrices and a range of their rows; one of the two is whole or single."""

    index: int
    count: int
    row: int
    rows: int


def tiles(slab: Slab, limit: int = TILE_ENTRIES) -> Iterator[Tile]:
    """Cover a slab with tiles of at most ``limit`` entries (but at least one row)."""
    return subtiles(slab, Tile(0, slab.count, 0, slab.rows), limit)


def subtiles(slab: Slab, tile: Tile, limit: int = TILE_ENTRIES) -> Iterator[Tile]:
    """Cover a tile with tiles of at most ``limit`` entries (but at least one row), in row-major order."""
    matrix = tile.rows * slab.cols
    if matrix <= limit:
        step = max(1, limit // max(1, matrix))
        for index in range(0, tile.count, step):
            yield Tile(tile.index + index, min(step, tile.count - index), tile.row, tile.rows)
        return
    step = max(1, limit // max(1, slab.cols))
    for index in range(tile.count):
        for row in range(0, tile.rows, step):
            yield Tile(tile.index + index, 1, tile.row + row, min(step, tile.rows - row))


def words(slab: Slab, tile: Tile, device: torch.device) -> Tensor:
    """Raw words of a tile, int32 ``[count, rows, 4 * blocks]``, math (2); of a hashed slab, those of index 0."""
    return block_words(slab.basis, (tile.index, tile.count), (tile.row, tile.rows), (0, slab.blocks), device)


def expand(slab: Slab, tile: Tile, dtype: torch.dtype, device: torch.device, packed: Tensor | None = None) -> Tensor:
    """The entries of a tile times the power of their law, ``[count, rows, cols]``, exact in every dtype, math (5).

    Args:
        slab: what the tile is a part of.
        tile: which part.
        dtype: floating dtype of the result.
        device: where.
        packed: raw words of the whole slab when they are stored; None generates them.
    """
    mine = drawn_for(slab, tile)
    raw = words(slab, mine, device) if packed is None else part(packed, mine)
    if slab.basis.law.disjoint:
        return scattered(slab, tile, raw, dtype)
    entries = decode(raw, slab.basis.law)[..., : slab.cols].to(dtype)
    return entries if slab.basis.law.power == 1 else entries.mul_(slab.basis.law.power)


def drawn_for(slab: Slab, tile: Tile) -> Tile:
    """The part of :attr:`Slab.drawn` that a tile of the slab is made of."""
    return Tile(0, 1, tile.row, tile.rows) if slab.basis.law.disjoint else tile


def scattered(slab: Slab, tile: Tile, raw: Tensor, dtype: torch.dtype) -> Tensor:
    """The entries of a tile of a hashed slab, ``[count, rows, cols]``, from its words ``[1, rows, w]``, math (25)."""
    owner, sign = hashed_terms(raw[..., : slab.cols], slab.basis.law)
    owner -= tile.index
    inside = (owner >= 0) & (owner < tile.count)
    out = torch.zeros(tile.count, tile.rows, slab.cols, dtype=dtype, device=raw.device)
    # A place has one owner, so no two of these meet; those of other tiles write the 0 that is there.
    return out.scatter_(0, owner.where(inside, 0), sign.where(inside, 0).to(dtype))


def part(packed: Tensor, tile: Tile) -> Tensor:
    """The words of a tile from the words of its slab."""
    return packed[tile.index : tile.index + tile.count, tile.row : tile.row + tile.rows]


def combine(coefficients: Tensor, slab: Slab, packed: Tensor | None = None) -> Tensor:
    """``Σᵢ c[n, i] · entries[i]``: the sums of math (6), (8) and (18) without the real factor.

    Args:
        coefficients: ``[n, count]``.
        slab: the basis matrices.
        packed: raw words of the whole slab when they are stored.

    Returns:
        ``[n, rows, cols]`` in the dtype of the coefficients.
    """
    out = coefficients.new_zeros(coefficients.shape[0], slab.rows, slab.cols)
    if slab.basis.law.disjoint:
        for rows, owner, sign in _terms(slab, coefficients.device, packed):
            out[:, rows] = coefficients[:, owner] * sign.to(out.dtype)
        return out
    for tile in tiles(slab):
        entries = expand(slab, tile, coefficients.dtype, coefficients.device, packed)
        summand = coefficients[:, tile.index : tile.index + tile.count] @ entries.flatten(1)
        out[:, tile.row : tile.row + tile.rows] += summand.view(-1, tile.rows, slab.cols)
    return out


def inner(gradient: Tensor, slab: Slab, packed: Tensor | None = None) -> Tensor:
    """``⟨gradient[n], entries[i]⟩``, the adjoint of :func:`combine`, math (10) without the real factor.

    Args:
        gradient: ``[n, rows, cols]``.
        slab: the basis matrices.
        packed: raw words of the whole slab when they are stored.

    Returns:
        ``[n, count]``.
    """
    if slab.basis.law.disjoint:
        return _segment_sums(gradient, slab, packed)
    out = gradient.new_zeros(gradient.shape[0], slab.count)
    for tile in tiles(slab):
        entries = expand(slab, tile, gradient.dtype, gradient.device, packed)
        rows = gradient[:, tile.row : tile.row + tile.rows].flatten(1)
        out[:, tile.index : tile.index + tile.count] += rows @ entries.flatten(1).T
    return out


def _terms(slab: Slab, device: torch.device, packed: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some rows of a hashed slab at a time, and whose their places are with which sign, ``[rows, cols]``."""
    for tile in subtiles(slab, slab.drawn):
        raw = words(slab, tile, device) if packed is None else part(packed, tile)
        yield slice(tile.row, tile.row + tile.rows), *hashed_terms(raw[0, :, : slab.cols], slab.basis.law)


def _segment_sums(gradient: Tensor, slab: Slab, packed: Tensor | None) -> Tensor:
    # In float64, of one vector at a time: that is one loop in a fixed order on the CPU.
    out = torch.zeros(gradient.shape[0], slab.count, dtype=torch.float64, device=gradient.device)
    for rows, owner, sign in _terms(slab, gradient.device, packed):
        for sums, values in zip(out, gradient[:, rows].double(), strict=True):
            sums.index_add_(0, owner.flatten(), (values * sign).flatten())
    return out.to(gradient.dtype)

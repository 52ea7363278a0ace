"""Every op on a basis in plain torch: the specification in code, on any device and in any floating dtype.

A :class:`Slab` is a finite part of a basis. As a matrix it is read in one of two ways: ``[count, rows * cols]``, to
combine whole basis matrices, or ``[count * rows, cols]``, to project vectors. The functions here work tile by tile
and hold at most one tile in floating point.
Entries in floating point are the integers times the power of their law, math (5).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from randbasis.basis import Basis, block_words, decode

TILE_ENTRIES = 1 << 20
"""Entries of the basis that exist in floating point at one time on the recompute path."""


@dataclass(frozen=True, slots=True)
class Slab:
    """The first ``count`` matrices of a basis, ``rows`` × ``cols`` each.

    Attributes:
        basis: the infinite tensor that it is a part of.
        count: number of basis matrices.
        rows: rows of each.
        cols: columns of each.
    """

    basis: Basis
    count: int
    rows: int
    cols: int

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
        return self.count * self.rows * self.blocks * 16


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
    """Raw words of a tile, int32 ``[count, rows, 4 * blocks]``, math (2)."""
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
    raw = words(slab, tile, device) if packed is None else part(packed, tile)
    entries = decode(raw, slab.basis.law)[..., : slab.cols].to(dtype)
    return entries if slab.basis.law.power == 1 else entries.mul_(slab.basis.law.power)


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
    out = gradient.new_zeros(gradient.shape[0], slab.count)
    for tile in tiles(slab):
        entries = expand(slab, tile, gradient.dtype, gradient.device, packed)
        rows = gradient[:, tile.row : tile.row + tile.rows].flatten(1)
        out[:, tile.index : tile.index + tile.count] += rows @ entries.flatten(1).T
    return out

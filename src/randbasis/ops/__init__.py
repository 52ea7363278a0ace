"""The arithmetic on a basis: tensors in, tensors out; no modules, no files.

The op table. Each op has a schema, a fake for tracing and an autograd formula; :mod:`randbasis.ops.backends` chooses
who computes it. An op takes its frozen matrices by name (key, stream, law, shape), never as tensors: so nothing
frozen is saved for the backward pass, and ``torch.compile`` sees one opaque call.

======================  ==========================================================================================
op                      what it computes
======================  ==========================================================================================
``randbasis::product``  ``x Mᵀ`` or ``x M`` for a slab read as a matrix ``M``; the two are each other's gradient
``randbasis::sandwich``  ``Σⱼ Bⱼᵀ Λⱼ A Γⱼ``, the weight order of VeRA (12) and RandLoRA (14), with its own backward
======================  ==========================================================================================
"""

from typing import Any

import torch
from torch import Tensor

from randbasis.basis import Basis, Law, parse_law
from randbasis.errors import BasisShapeError
from randbasis.ops import backends
from randbasis.ops.reference import Slab, Tile, tiles
from randbasis.ops.storage import BasisStorage, Stored, check_storage, choose_storage, held, hold

__all__ = [
    "BasisStorage",
    "Slab",
    "Stored",
    "check_storage",
    "choose_storage",
    "combine",
    "entries",
    "hold",
    "project",
    "sandwich",
]


def _name(slab: Slab) -> list[int]:
    key0, key1 = slab.basis.key
    return [key0, key1, slab.basis.stream, slab.count, slab.rows, slab.cols]


def _slab(name: list[int], law: Law) -> Slab:
    key0, key1, stream, count, rows, cols = name
    return Slab(Basis(key0 | key1 << 32, stream, law), count, rows, cols)


def _packed(slab: Slab, storage: BasisStorage, device: torch.device) -> Tensor | None:
    stored = held(slab, storage)
    return stored.packed(device) if stored is not None else None


def _tile_entries(slab: Slab, tile: Tile, storage: BasisStorage, like: Tensor) -> Tensor:
    """Entries of a tile from whatever is stored, ``[count, rows, cols]``."""
    stored = held(slab, storage)
    dense = stored.dense(like.dtype, like.device) if stored is not None else None
    if dense is not None:
        return dense[tile.index : tile.index + tile.count, tile.row : tile.row + tile.rows]
    packed = stored.packed(like.device) if stored is not None else None
    return backends.expand(slab, tile, like.dtype, like.device, packed)


def _no_autocast(x: Tensor) -> torch.autocast:
    # An op computes in the dtype of its arguments: what autocast wants was decided before the call.
    return torch.autocast(x.device.type, enabled=False)


# --- product -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("randbasis::product", mutates_args=())
def _product(x: Tensor, name: list[int], law: str, join_rows: bool, transpose: bool, storage: str) -> Tensor:
    _product_width(x, name, join_rows, transpose)
    slab = _slab(name, parse_law(law))
    kind = check_storage(storage)
    with _no_autocast(x):
        dense = held(slab, kind)
        matrix = dense.dense(x.dtype, x.device) if dense is not None else None
        if matrix is not None:
            matrix = matrix.flatten(0, 1) if join_rows else matrix.flatten(1)
            return x @ matrix if transpose else x @ matrix.T
        if join_rows:
            return _product_by_rows(x, slab, transpose, kind)
        packed = _packed(slab, kind, x.device)
        if transpose:
            return backends.combine(x, slab, packed).flatten(1)
        return backends.inner(x.view(-1, slab.rows, slab.cols), slab, packed)


def _product_by_rows(x: Tensor, slab: Slab, transpose: bool, storage: BasisStorage) -> Tensor:
    out = x.new_zeros(x.shape[0], slab.cols if transpose else slab.count * slab.rows)
    for tile in tiles(slab):
        rows = _tile_entries(slab, tile, storage, x).flatten(0, 1)
        first = tile.index * slab.rows + tile.row
        last = first + rows.shape[0]
        if transpose:
            out.addmm_(x[:, first:last], rows)
        else:
            torch.mm(x, rows.T, out=out[:, first:last])
    return out


@_product.register_fake
def _(x: Tensor, name: list[int], law: str, join_rows: bool, transpose: bool, storage: str) -> Tensor:
    return x.new_empty(x.shape[0], _product_width(x, name, join_rows, transpose))


def _product_width(x: Tensor, name: list[int], join_rows: bool, transpose: bool) -> int:
    """Columns of the product, once those of ``x`` are checked."""
    _, _, _, count, rows, cols = name
    height, width = (count * rows, cols) if join_rows else (count, rows * cols)
    taken, given = (height, width) if transpose else (width, height)
    if x.dim() != 2 or x.shape[1] != taken:
        raise BasisShapeError(f"x must be [n, {taken}] for this slab, got {list(x.shape)}; reshape it")
    return given


def _product_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.arguments = inputs


def _product_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    name, law, join_rows, transpose, storage = ctx.arguments
    return _product(gradient.contiguous(), name, law, join_rows, not transpose, storage), None, None, None, None, None


_product.register_autograd(_product_backward, setup_context=_product_setup)


def combine(coefficients: Tensor, slab: Slab, storage: BasisStorage) -> Tensor:
    """``Σᵢ c[n, i] · entries[i]``: the sums of math (6), (8) and (18), without the real factors.

    The gradient is math (10). On the recompute path no more than one tile of the basis exists in floating point.

    Args:
        coefficients: ``[..., count]``.
        slab: the basis matrices.
        storage: how the basis is kept; see :mod:`randbasis.ops.storage`.

    Returns:
        ``[..., rows, cols]`` in the dtype of the coefficients.

    Raises:
        BasisShapeError: the coefficients do not end in ``count``.
    """
    flat = coefficients.reshape(-1, coefficients.shape[-1])
    out = _product(flat, _name(slab), slab.basis.law.name, False, True, storage)
    return out.view(*coefficients.shape[:-1], slab.rows, slab.cols)


def project(x: Tensor, slab: Slab, storage: BasisStorage, *, transpose: bool = False) -> Tensor:
    """``x Mᵀ`` for the slab as a matrix ``M`` of ``[count * rows, cols]``; ``x M`` when transposed.

    Args:
        x: ``[..., cols]``; ``[..., count * rows]`` when transposed.
        slab: the basis matrices.
        storage: how the basis is kept.
        transpose: multiply by ``M`` and not by its transpose.

    Returns:
        ``[..., count * rows]``; ``[..., cols]`` when transposed.

    Raises:
        BasisShapeError: ``x`` has another width.
    """
    flat = x.reshape(-1, x.shape[-1])
    out = _product(flat, _name(slab), slab.basis.law.name, True, transpose, storage)
    return out.view(*x.shape[:-1], out.shape[-1])


def entries(slab: Slab, storage: BasisStorage, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The integer entries of a slab in floating point, ``[count, rows, cols]``; a fresh tensor, or the stored one.

    The caller must not write to it.
    """
    whole = Tile(0, slab.count, 0, slab.rows)
    return _tile_entries(slab, whole, storage, torch.empty(0, dtype=dtype, device=device))


# --- sandwich ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("randbasis::sandwich", mutates_args=())
def _sandwich(
    diagonal: Tensor, columns: Tensor | None, a_name: list[int], b_name: list[int], law: str, storage: str
) -> Tensor:
    a, b, kind = _slab(a_name, parse_law(law)), _slab(b_name, parse_law(law)), check_storage(storage)
    out = diagonal.new_zeros(b.cols, a.cols)
    with _no_autocast(diagonal):
        for tile, a_rows, b_rows in _sandwich_tiles(a, b, kind, diagonal):
            scaled = a_rows * _rows(diagonal, tile).unsqueeze(-1)
            if columns is not None:
                scaled = scaled * columns[tile.index : tile.index + tile.count].unsqueeze(1)
            out.addmm_(b_rows.flatten(0, 1).T, scaled.flatten(0, 1))
    return out


def _sandwich_tiles(a: Slab, b: Slab, storage: BasisStorage, like: Tensor) -> Any:
    """Tiles of B with the rows of A that meet them: ``(tile, [1, rows, a.cols], [count, rows, b.cols])``."""
    for tile in tiles(b, TILE_OF_SANDWICH):
        a_rows = _tile_entries(a, Tile(0, 1, tile.row, tile.rows), storage, like)
        yield tile, a_rows, _tile_entries(b, tile, storage, like)


TILE_OF_SANDWICH = 1 << 20
"""Entries of B, and about as many of ``Λ A Γ``, that exist in floating point at one time."""


def _rows(diagonal: Tensor, tile: Tile) -> Tensor:
    return diagonal[tile.index : tile.index + tile.count, tile.row : tile.row + tile.rows]


@_sandwich.register_fake
def _(diagonal: Tensor, columns: Tensor | None, a_name: list[int], b_name: list[int], law: str, storage: str) -> Tensor:
    return diagonal.new_empty(b_name[5], a_name[5])


@torch.library.custom_op("randbasis::sandwich_backward", mutates_args=())
def _sandwich_gradients(
    gradient: Tensor,
    diagonal: Tensor,
    columns: Tensor | None,
    a_name: list[int],
    b_name: list[int],
    law: str,
    storage: str,
) -> tuple[Tensor, Tensor]:
    a, b, kind = _slab(a_name, parse_law(law)), _slab(b_name, parse_law(law)), check_storage(storage)
    for_diagonal = torch.zeros_like(diagonal)
    for_columns = diagonal.new_zeros(0) if columns is None else torch.zeros_like(columns)
    with _no_autocast(diagonal):
        for tile, a_rows, b_rows in _sandwich_tiles(a, b, kind, diagonal):
            met = (b_rows.flatten(0, 1) @ gradient).view(tile.count, tile.rows, a.cols).mul_(a_rows)
            if columns is None:
                _rows(for_diagonal, tile).add_(met.sum(-1))
                continue
            part = columns[tile.index : tile.index + tile.count]
            _rows(for_diagonal, tile).add_((met @ part.unsqueeze(-1)).squeeze(-1))
            wanted = (_rows(diagonal, tile).unsqueeze(1) @ met).squeeze(1)
            for_columns[tile.index : tile.index + tile.count].add_(wanted)
    return for_diagonal, for_columns


@_sandwich_gradients.register_fake
def _(
    gradient: Tensor,
    diagonal: Tensor,
    columns: Tensor | None,
    a_name: list[int],
    b_name: list[int],
    law: str,
    storage: str,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(diagonal), diagonal.new_empty(0) if columns is None else torch.empty_like(columns)


def _sandwich_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    diagonal, columns, *ctx.arguments = inputs
    ctx.save_for_backward(diagonal, columns)


def _sandwich_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    diagonal, columns = ctx.saved_tensors
    for_diagonal, for_columns = _sandwich_gradients(gradient.contiguous(), diagonal, columns, *ctx.arguments)
    return for_diagonal, None if columns is None else for_columns, None, None, None, None


_sandwich.register_autograd(_sandwich_backward, setup_context=_sandwich_setup)


def sandwich(diagonal: Tensor, columns: Tensor | None, a: Slab, b: Slab, storage: BasisStorage) -> Tensor:
    """``Σⱼ Bⱼᵀ Λⱼ A Γⱼ`` without a graph over its terms: math (12) and (14) in weight order (20).

    Args:
        diagonal: ``Λ``, ``[n, r]``.
        columns: ``Γ``, ``[n, a.cols]``, or None for ones.
        a: one matrix ``r × a.cols`` (index 0 of its basis).
        b: ``n`` matrices ``r × b.cols``.
        storage: how both are kept.

    Returns:
        ``[b.cols, a.cols]`` of integer entries combined, without the real factors.
    """
    return _sandwich(diagonal, columns, _name(a), _name(b), a.basis.law.name, storage)

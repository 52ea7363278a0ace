"""The arithmetic on a basis: tensors in, tensors out; no modules, no files.

The op table. Each op has a schema, a fake for tracing and an autograd formula; :mod:`randbasis.ops.backends` chooses
who computes it. An op takes its frozen matrices by name (key, stream, law, shape), never as tensors: so nothing
frozen is saved for the backward pass, and ``torch.compile`` sees one opaque call.

======================  ==========================================================================================
op                      what it computes
======================  ==========================================================================================
``randbasis::product``  ``x Mᵀ`` or ``x M`` for a slab read as a matrix ``M``; the two are each other's gradient
``randbasis::product_each``  the same for many slabs that differ in their stream alone, each with vectors of its own
``randbasis::sandwich``  ``Σⱼ Bⱼᵀ Λⱼ A Γⱼ``, the weight order of VeRA (12) and RandLoRA (14), with its own backward
======================  ==========================================================================================

The entries that they multiply by are the integers of math (3) times the power of two of their law, math (5): exact in
every dtype, and of unit variance within a factor of two, so that float16 holds sums of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from randbasis.basis import Basis, Law, parse_law
from randbasis.errors import BasisShapeError
from randbasis.ops import backends
from randbasis.ops.reference import Slab, Tile, tiles
from randbasis.ops.storage import BasisStorage, Stored, check_storage, choose_storage, held, hold
from randbasis.ops.transforms import check_differentiated_once, outside, traced, transformed

__all__ = [
    "BasisStorage",
    "Slab",
    "Stored",
    "check_differentiated_once",
    "check_storage",
    "choose_storage",
    "combine",
    "combine_each",
    "entries",
    "hold",
    "project",
    "sandwich",
    "traced",
    "transformed",
]


def _name(slab: Slab) -> list[int]:
    key0, key1 = slab.basis.key
    return [key0, key1, slab.basis.stream, slab.count, slab.rows, slab.cols]


def _slab(name: list[int], law: Law) -> Slab:
    key0, key1, stream, count, rows, cols = name
    return Slab(Basis(key0 | key1 << 32, stream, law), count, rows, cols)


def _tile_entries(slab: Slab, tile: Tile, storage: BasisStorage, like: Tensor) -> Tensor:
    """Entries of a tile from whatever is stored, ``[count, rows, cols]``."""
    stored = held(slab, storage)
    dense = stored.dense(like.dtype, like.device) if stored is not None else None
    if dense is not None:
        return dense[tile.index : tile.index + tile.count, tile.row : tile.row + tile.rows]
    packed = stored.packed(like.device) if stored is not None else None
    if transformed() or traced():
        with outside():
            return backends.expand(slab, tile, like.dtype, like.device, packed)
    return backends.expand(slab, tile, like.dtype, like.device, packed)


def _plain(slab: Slab, storage: BasisStorage, like: Tensor) -> Tensor | None:
    """The stored entries ``[count, rows, cols]`` where a product with them may go without an op of its own.

    The call of an op costs as much as a small product. A compiler wants the op, and so does autocast, which it keeps
    away. A transform wants torch's own operations, so there the entries are made for the product when none are stored.
    """
    if transformed():
        return entries(slab, storage, like.dtype, like.device)
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(like.device.type):
        return None
    stored = held(slab, storage) if storage == "dense" else None
    return stored.dense(like.dtype, like.device) if stored is not None else None


def _no_autocast(x: Tensor) -> torch.autocast:
    # An op computes in the dtype of its arguments: what autocast wants was decided before the call.
    return torch.autocast(x.device.type, enabled=False)


def _linear(x: Tensor, matrix: Tensor) -> Tensor:
    """``x Mᵀ`` in the dtype of both: autocast is kept away, as from the ops."""
    if torch.is_autocast_enabled(x.device.type):
        with _no_autocast(x):
            return torch.nn.functional.linear(x, matrix)
    return torch.nn.functional.linear(x, matrix)


# --- product -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("randbasis::product", mutates_args=())
def _product(x: Tensor, name: list[int], law: str, join_rows: bool, transpose: bool, storage: str) -> Tensor:
    _product_width(x, name, join_rows, transpose)
    with _no_autocast(x):
        return _multiply(x, _slab(name, parse_law(law)), join_rows, transpose, check_storage(storage))


def _multiply(x: Tensor, slab: Slab, join_rows: bool, transpose: bool, storage: BasisStorage) -> Tensor:
    stored = held(slab, storage)
    matrix = stored.dense(x.dtype, x.device) if stored is not None else None
    if matrix is not None:
        matrix = matrix.flatten(0, 1) if join_rows else matrix.flatten(1)
        return x @ matrix if transpose else x @ matrix.T
    packed = stored.packed(x.device) if stored is not None else None
    if join_rows:
        return backends.project(x, slab, packed, transpose=transpose)
    if transpose:
        return backends.combine(x, slab, packed).flatten(1)
    return backends.inner(x.view(-1, slab.rows, slab.cols), slab, packed)


@_product.register_fake
def _(x: Tensor, name: list[int], law: str, join_rows: bool, transpose: bool, storage: str) -> Tensor:
    return x.new_empty(x.shape[0], _product_width(x, name, join_rows, transpose))


def _product_width(x: Tensor, name: list[int], join_rows: bool, transpose: bool) -> int:
    """Columns of the product, once those of ``x`` are checked."""
    taken, given = _widths(name, join_rows, transpose)
    if x.dim() != 2 or x.shape[1] != taken:
        raise BasisShapeError(f"x must be [n, {taken}] for this slab, got {list(x.shape)}; reshape it")
    return given


def _widths(name: list[int], join_rows: bool, transpose: bool) -> tuple[int, int]:
    _, _, _, count, rows, cols = name
    height, width = (count * rows, cols) if join_rows else (count, rows * cols)
    return (height, width) if transpose else (width, height)


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
    plain = _plain(slab, storage, flat)
    if plain is not None and flat.shape[1] == slab.count:
        out = _linear(flat, plain.flatten(1).T)
        return out.view(*coefficients.shape[:-1], slab.rows, slab.cols)
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
    plain = _plain(slab, storage, x)
    if plain is not None and x.shape[-1] == (slab.count * slab.rows if transpose else slab.cols):
        matrix = plain.flatten(0, 1)
        return _linear(x, matrix.T if transpose else matrix)
    flat = x.reshape(-1, x.shape[-1])
    out = _product(flat, _name(slab), slab.basis.law.name, True, transpose, storage)
    return out.view(*x.shape[:-1], out.shape[-1])


def entries(slab: Slab, storage: BasisStorage, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The entries of a slab times their law's power, ``[count, rows, cols]``, math (5): a new tensor, or a stored one.

    The caller must not write to it.
    """
    whole = Tile(0, slab.count, 0, slab.rows)
    return _tile_entries(slab, whole, storage, torch.empty(0, dtype=dtype, device=device))


# --- many bases of one shape --------------------------------------------------------------------------------------


@torch.library.custom_op("randbasis::product_each", mutates_args=())
def _product_each(x: Tensor, name: list[int], streams: list[int], law: str, transpose: bool, storage: str) -> Tensor:
    width = _product_each_width(x, name, streams, transpose)
    slabs = [_slab([*name[:2], stream, *name[3:]], parse_law(law)) for stream in streams]
    kind = check_storage(storage)
    with _no_autocast(x):
        if slabs and all(held(slab, kind) is None for slab in slabs) and backends.launches_together(x):
            return backends.product_each(x, slabs, transpose=transpose)
        out = x.new_empty(*x.shape[:-1], width)
        for i, slab in enumerate(slabs):
            out[i] = _multiply(x[i], slab, False, transpose, kind)
        return out


@_product_each.register_fake
def _(x: Tensor, name: list[int], streams: list[int], law: str, transpose: bool, storage: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], _product_each_width(x, name, streams, transpose))


def _product_each_width(x: Tensor, name: list[int], streams: list[int], transpose: bool) -> int:
    taken, given = _widths(name, False, transpose)
    if x.dim() != 3 or x.shape[0] != len(streams) or x.shape[2] != taken:
        raise BasisShapeError(
            f"x must be [{len(streams)}, n, {taken}] for these slabs, got {list(x.shape)}; reshape it"
        )
    return given


def _product_each_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    name, streams, law, transpose, storage = ctx.arguments
    return (
        _product_each(gradient.contiguous(), name, streams, law, not transpose, storage),
        None,
        None,
        None,
        None,
        None,
    )


_product_each.register_autograd(_product_each_backward, setup_context=_product_setup)


def combine_each(coefficients: Tensor, slabs: Sequence[Slab], storage: BasisStorage) -> Tensor:
    """:func:`combine` for each of many slabs: all adapted matrices of one shape, each with a basis of its own.

    On CUDA, and where nothing is stored, that is one launch.

    Args:
        coefficients: ``[m, ..., count]``, of slab ``i`` at ``i``.
        slabs: ``m`` slabs of one shape, law and seed.
        storage: how they are kept.

    Returns:
        ``[m, ..., rows, cols]``.

    Raises:
        BasisShapeError: the slabs differ in more than their stream, or the coefficients do not fit them.
    """
    if not slabs:
        raise BasisShapeError("slabs must hold at least one slab, got none; leave the call out")
    first = slabs[0]
    for slab in slabs:
        if (
            _name(slab)[:2] + _name(slab)[3:] != _name(first)[:2] + _name(first)[3:]
            or slab.basis.law != first.basis.law
        ):
            raise BasisShapeError(
                f"slabs must differ in their stream alone, got {first} and {slab}; call once for each"
            )
    flat = coefficients.reshape(coefficients.shape[0], -1, coefficients.shape[-1])
    streams = [slab.basis.stream for slab in slabs]
    out = _product_each(flat, _name(first), streams, first.basis.law.name, True, storage)
    return out.view(*coefficients.shape[:-1], first.rows, first.cols)


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
    for tile in tiles(b, max(TILE_OF_SANDWICH, backends.tile_entries(like.device) // 4)):
        a_rows = _tile_entries(a, Tile(0, 1, tile.row, tile.rows), storage, like)
        yield tile, a_rows, _tile_entries(b, tile, storage, like)


TILE_OF_SANDWICH = 1 << 20
"""Entries of B, and about as many of ``Λ A Γ``, that exist in floating point at one time on the CPU."""


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
    check_differentiated_once()
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
        ``[b.cols, a.cols]`` of entries combined, without the real factors.
    """
    if transformed():
        return _plain_sandwich(diagonal, columns, a, b, storage)
    return _sandwich(diagonal, columns, _name(a), _name(b), a.basis.law.name, storage)


def _plain_sandwich(diagonal: Tensor, columns: Tensor | None, a: Slab, b: Slab, storage: BasisStorage) -> Tensor:
    """:func:`sandwich` in torch's own operations, with a graph over its terms."""
    scaled = diagonal.unsqueeze(-1) * entries(a, storage, diagonal.dtype, diagonal.device)
    if columns is not None:
        scaled = scaled * columns.unsqueeze(1)
    lines = entries(b, storage, diagonal.dtype, diagonal.device).flatten(0, 1)
    return _linear(lines.T, scaled.flatten(0, 1).T)

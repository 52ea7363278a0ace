"""BASIS → SUMS AND PRODUCTS: the arithmetic on a basis; tensors in, tensors out; no modules, no files.

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
every dtype, and of unit variance within a factor of two, so that float16 holds sums of them. Those of the hashed law
(25) are 1, 0 and −1: a sum of them has one term in each place, is a gather, and its gradient a sum by segments.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from randbasis.basis import Basis
from randbasis.basis_storage import check_storage
from randbasis.errors import BasisShapeError
from randbasis.laws import Law, parse_law
from randbasis.ops import backends, hashed
from randbasis.ops.reference import Slab, Tile, tiles
from randbasis.ops.storage import (
    Derived,
    Stored,
    check_weight,
    choose_storage,
    derive,
    held,
    hold,
    weight_digest,
)
from randbasis.ops.transforms import check_differentiated_once, outside, recorded, traced, transformed, watched

__all__ = [
    "Derived",
    "Slab",
    "Stored",
    "check_differentiated_once",
    "check_weight",
    "choose_storage",
    "combine",
    "combine_each",
    "derive",
    "entries",
    "hold",
    "inner",
    "inner_each",
    "no_autocast",
    "project",
    "recorded",
    "sandwich",
    "scaled_entries",
    "traced",
    "transformed",
    "watched",
    "weight_digest",
    "weighted_sum",
]


def _name(slab: Slab) -> list[int]:
    key0, key1 = slab.basis.key
    return [key0, key1, slab.basis.stream, slab.count, slab.rows, slab.cols]


def _slab(name: list[int], law: Law) -> Slab:
    key0, key1, stream, count, rows, cols = name
    return Slab(Basis(key0 | key1 << 32, stream, law), count, rows, cols)


def _stored(name: list[int], law: str, storage: str) -> Stored:
    """What an op is about: kept, where somebody keeps it, and made for this call where nobody does."""
    slab, kind = _slab(name, parse_law(law)), check_storage(storage)
    return held(slab, kind) or Stored(slab, "recompute")


def _tile_entries(stored: Stored, tile: Tile, like: Tensor) -> Tensor:
    """Entries of a tile from whatever is stored, ``[count, rows, cols]``."""
    dense = stored.dense(like.dtype, like.device)
    if dense is not None:
        return dense[tile.index : tile.index + tile.count, tile.row : tile.row + tile.rows]
    packed = stored.packed(like.device)
    if transformed() or traced():
        with outside():
            return backends.expand(stored.slab, tile, like.dtype, like.device, packed)
    return backends.expand(stored.slab, tile, like.dtype, like.device, packed)


def _plain(stored: Stored, like: Tensor) -> Tensor | None:
    """The entries ``[count, rows, cols]`` where a product with them may, or must, go without an op of its own.

    A transform wants torch's own operations, so there the entries are made for the product when none are stored.
    """
    plain = stored.plain(like)
    if plain is None and transformed():
        return entries(stored, like.dtype, like.device)
    return plain


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A block that computes in the dtype of its arguments: what autocast wants was decided before."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _direct(x: Tensor) -> bool:
    """Whether nothing but autograd watches, so that a Function may stand for an op.

    The dispatch of an op costs the host several times what a Function does, and both more than a small product.
    """
    return type(x) in (Tensor, Parameter) and not x.is_meta and not torch.compiler.is_compiling() and not watched()


def _linear(x: Tensor, matrix: Tensor) -> Tensor:
    """``x Mᵀ`` in the dtype of both: autocast is kept away, as from the ops."""
    if torch.is_autocast_enabled(x.device.type):
        with no_autocast(x):
            return torch.nn.functional.linear(x, matrix)
    return torch.nn.functional.linear(x, matrix)


# --- product -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("randbasis::product", mutates_args=())
def _product(x: Tensor, name: list[int], law: str, join_rows: bool, transpose: bool, storage: str) -> Tensor:
    _product_width(x, name, join_rows, transpose)
    with no_autocast(x):
        return _multiply(x, _stored(name, law, storage), join_rows, transpose)


def _multiply(x: Tensor, stored: Stored, join_rows: bool, transpose: bool) -> Tensor:
    slab, matrix = stored.slab, stored.dense(x.dtype, x.device)
    if matrix is not None:
        matrix = matrix.flatten(0, 1) if join_rows else matrix.flatten(1)
        return x @ matrix if transpose else x @ matrix.T
    packed = stored.packed(x.device)
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


class _Product(torch.autograd.Function):
    """The op ``product`` where nothing but autograd watches, see :func:`_direct`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Stored, join_rows: bool, transpose: bool) -> Tensor:
        ctx.arguments = stored, join_rows, not transpose
        _product_width(x, _name(stored.slab), join_rows, transpose)
        with no_autocast(x):
            return _multiply(x, stored, join_rows, transpose)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient = gradient.contiguous()
        if torch.is_grad_enabled() or not _direct(gradient):
            return _multiplied(gradient, *ctx.arguments), None, None, None
        with no_autocast(gradient):
            return _multiply(gradient, *ctx.arguments), None, None, None


def _multiplied(x: Tensor, stored: Stored, join_rows: bool, transpose: bool) -> Tensor:
    """The product of ``x``, ``[n, width]``, with a slab as it is stored, by the shortest way that is open."""
    if _direct(x):
        return cast("Tensor", _Product.apply(x, stored, join_rows, transpose))  # pyright: ignore[reportUnknownMemberType]
    slab = stored.slab
    return _product(x, _name(slab), slab.basis.law.name, join_rows, transpose, stored.storage)


def combine(coefficients: Tensor, stored: Stored) -> Tensor:
    """``Σᵢ c[n, i] · entries[i]``: the sums of math (6), (8) and (18), without the real factors.

    The gradient is math (10). On the recompute path no more than one tile of the basis exists in floating point.

    Args:
        coefficients: ``[..., count]``.
        stored: the basis matrices, and how they are kept.

    Returns:
        ``[..., rows, cols]`` in the dtype of the coefficients.

    Raises:
        BasisShapeError: the coefficients do not end in ``count``.
    """
    slab = stored.slab
    if slab.disjoint and transformed():
        return hashed.gathered(coefficients, stored)
    plain = _plain(stored, coefficients)
    flat = coefficients.reshape(-1, coefficients.shape[-1])
    if plain is not None and flat.shape[1] == slab.count:
        out = _linear(flat, plain.view(slab.count, -1).T)
    else:
        out = _multiplied(flat, stored, False, True)
    return out.view(*coefficients.shape[:-1], slab.rows, slab.cols)


def inner(vectors: Tensor, stored: Stored) -> Tensor:
    """``⟨vectors[n], entries[i]⟩``: the gradient of :func:`combine`, math (10), without the real factors.

    Args:
        vectors: ``[..., rows, cols]``.
        stored: the basis matrices, and how they are kept.

    Returns:
        ``[..., count]`` in the dtype of the vectors.

    Raises:
        BasisShapeError: the vectors do not end in ``rows, cols``.
    """
    slab = stored.slab
    if slab.disjoint and transformed():
        return hashed.segment_sums(vectors, stored)
    plain = _plain(stored, vectors)
    flat = vectors.reshape(-1, vectors.shape[-2] * vectors.shape[-1])
    if plain is not None and vectors.shape[-2:] == (slab.rows, slab.cols):
        out = _linear(flat, plain.view(slab.count, -1))
    else:
        out = _multiplied(flat, stored, False, False)
    return out.view(*vectors.shape[:-2], slab.count)


def weighted_sum(coefficients: Tensor, stored: Stored, factor: float, offset: Tensor | None = None) -> Tensor:
    """``factor · Σᵢ c[n, i] · entries[i] + offset``: :func:`combine` with its real factor, in one call where that does.

    Args:
        coefficients: ``[..., count]``.
        stored: the basis matrices, and how they are kept.
        factor: real factor of the sum.
        offset: ``[rows, cols]``.

    Returns:
        ``[..., rows, cols]`` in the dtype of the coefficients.

    Raises:
        BasisShapeError: the coefficients do not end in ``count``.
    """
    slab, dims = stored.slab, coefficients.dim()
    plain = stored.plain(coefficients) if dims <= 2 and coefficients.shape[-1] == slab.count else None
    if plain is None:
        total = combine(coefficients * factor, stored)
        return total if offset is None else total + offset
    lines = plain.view(slab.count, -1)
    # Without an offset the first argument is not read.
    start, beta = (coefficients.new_empty(()), 0) if offset is None else (offset.view(-1), 1)
    add, operands = (torch.addmv, (lines.T, coefficients)) if dims == 1 else (torch.addmm, (coefficients, lines))
    if torch.is_autocast_enabled(coefficients.device.type):
        with no_autocast(coefficients):
            total = add(start, *operands, beta=beta, alpha=factor)
    else:
        total = add(start, *operands, beta=beta, alpha=factor)
    return total.view(slab.rows, slab.cols) if dims == 1 else total.view(-1, slab.rows, slab.cols)


def project(x: Tensor, stored: Stored, *, transpose: bool = False) -> Tensor:
    """``x Mᵀ`` for the slab as a matrix ``M`` of ``[count * rows, cols]``; ``x M`` when transposed.

    Args:
        x: ``[..., cols]``; ``[..., count * rows]`` when transposed.
        stored: the basis matrices, and how they are kept.
        transpose: multiply by ``M`` and not by its transpose.

    Returns:
        ``[..., count * rows]``; ``[..., cols]`` when transposed.

    Raises:
        BasisShapeError: ``x`` has another width.
    """
    slab, plain = stored.slab, _plain(stored, x)
    if plain is not None and x.shape[-1] == (slab.count * slab.rows if transpose else slab.cols):
        matrix = plain.flatten(0, 1)
        return _linear(x, matrix.T if transpose else matrix)
    flat = x.reshape(-1, x.shape[-1])
    out = _multiplied(flat, stored, True, transpose)
    return out.view(*x.shape[:-1], out.shape[-1])


def entries(stored: Stored, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The entries of a slab times their law's power, ``[count, rows, cols]``, math (5): a new tensor, or a stored one.

    The caller must not write to it.
    """
    dense = stored.dense(dtype, device)
    if dense is not None:
        return dense
    slab = stored.slab
    return _tile_entries(stored, Tile(0, slab.count, 0, slab.rows), torch.empty(0, dtype=dtype, device=device))


def scaled_entries(stored: Stored, factor: float, like: Tensor) -> Tensor:
    """The entries of a slab of one matrix times a number, ``[rows, cols]``, in the dtype and on the device of ``like``.

    The caller must not write to it.
    """
    scaled = stored.scaled(factor, like)
    if scaled is not None:
        return scaled[0]
    return combine(torch.full((1, 1), factor, dtype=like.dtype, device=like.device), stored)[0]


# --- many bases of one shape --------------------------------------------------------------------------------------


@torch.library.custom_op("randbasis::product_each", mutates_args=())
def _product_each(x: Tensor, name: list[int], streams: list[int], law: str, transpose: bool, storage: str) -> Tensor:
    width = _product_each_width(x, name, streams, transpose)
    bases = [_stored([*name[:2], stream, *name[3:]], law, storage) for stream in streams]
    with no_autocast(x):
        if bases and all(one.storage == "recompute" for one in bases) and backends.launches_together(x):
            return backends.product_each(x, [one.slab for one in bases], transpose=transpose)
        out = x.new_empty(*x.shape[:-1], width)
        for i, one in enumerate(bases):
            out[i] = _multiply(x[i], one, False, transpose)
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


def combine_each(coefficients: Tensor, bases: Sequence[Stored]) -> Tensor:
    """:func:`combine` for each of many slabs: all adapted matrices of one shape, each with a basis of its own.

    On CUDA, and where nothing is stored, that is one launch.

    Args:
        coefficients: ``[m, ..., count]``, of slab ``i`` at ``i``.
        bases: ``m`` slabs of one shape, law and seed, kept in one way.

    Returns:
        ``[m, ..., rows, cols]``.

    Raises:
        BasisShapeError: the bases differ in more than their stream, or the coefficients do not fit them.
    """
    first = _check_alike(bases)
    flat = coefficients.reshape(coefficients.shape[0], -1, coefficients.shape[-1])
    streams = [one.slab.basis.stream for one in bases]
    out = _product_each(flat, _name(first), streams, first.basis.law.name, True, bases[0].storage)
    return out.view(*coefficients.shape[:-1], first.rows, first.cols)


def inner_each(vectors: Tensor, bases: Sequence[Stored]) -> Tensor:
    """:func:`inner` for each of many slabs: the gradient of :func:`combine_each`.

    Args:
        vectors: ``[m, ..., rows, cols]``, of slab ``i`` at ``i``.
        bases: ``m`` slabs of one shape, law and seed, kept in one way.

    Returns:
        ``[m, ..., count]``.

    Raises:
        BasisShapeError: the bases differ in more than their stream, or the vectors do not fit them.
    """
    first = _check_alike(bases)
    flat = vectors.reshape(vectors.shape[0], -1, vectors.shape[-2] * vectors.shape[-1])
    streams = [one.slab.basis.stream for one in bases]
    out = _product_each(flat, _name(first), streams, first.basis.law.name, False, bases[0].storage)
    return out.view(*vectors.shape[:-2], first.count)


def _check_alike(bases: Sequence[Stored]) -> Slab:
    """The first slab, once it is known that the others differ in their stream alone."""
    if not bases:
        raise BasisShapeError("bases must hold at least one slab, got none; leave the call out")
    first = bases[0].slab
    for one in bases:
        alike = replace(one.slab.basis, stream=first.basis.stream)
        if replace(one.slab, basis=alike) != first or one.storage != bases[0].storage:
            raise BasisShapeError(
                f"bases must differ in their stream alone, got {first} and {one.slab}; call once for each"
            )
    return first


# --- sandwich ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("randbasis::sandwich", mutates_args=())
def _sandwich(
    diagonal: Tensor,
    columns: Tensor | None,
    a_name: list[int],
    b_name: list[int],
    law: str,
    storage: str,
    dtype: torch.dtype,
) -> Tensor:
    with no_autocast(diagonal):
        return _sum_of_terms(diagonal, columns, _stored(a_name, law, storage), _stored(b_name, law, storage), dtype)


def _sum_of_terms(diagonal: Tensor, columns: Tensor | None, a: Stored, b: Stored, dtype: torch.dtype) -> Tensor:
    product = backends.wide(diagonal.device, dtype)
    size = _size(diagonal, columns) if product == torch.float16 else None
    summed = torch.promote_types(product, torch.float32)
    out: Tensor | None = None
    for tile, a_rows, b_rows in _sandwich_tiles(a, b, diagonal, product):
        scaled = a_rows * (_rows(diagonal, tile) if size is None else _rows(diagonal, tile) / size).unsqueeze(-1)
        if columns is not None:
            scaled = scaled * columns[tile.index : tile.index + tile.count].unsqueeze(1)
        lines, scaled = b_rows.flatten(0, 1).T, scaled.flatten(0, 1).to(product)
        if out is None:
            out = lines @ scaled
        elif product == summed:
            out.addmm_(lines, scaled)
        else:
            out = out.to(summed).add_(lines @ scaled)
    assert out is not None  # a slab has a tile
    return (out if size is None else out * size).to(dtype)


def _size(diagonal: Tensor, columns: Tensor | None) -> Tensor:
    """A power of two that ``Λ A Γ`` is divided by for float16, among whose smallest numbers γ = 1/width would be."""
    largest = diagonal.abs().amax() if columns is None else diagonal.abs().amax() * columns.abs().amax()
    return torch.exp2(largest.float().clamp_min(2.0**-100).log2().ceil()).to(diagonal.dtype)


def _sandwich_tiles(a: Stored, b: Stored, like: Tensor, product: torch.dtype) -> Iterator[tuple[Tile, Tensor, Tensor]]:
    """Tiles of B with the rows of A that meet them: ``(tile, [1, rows, a.cols], [count, rows, b.cols])``.

    A is in the dtype of ``like``, B in that of the product.
    """
    slab, lines = b.slab, like.new_empty(0, dtype=product)
    if slab.count * slab.rows * slab.cols <= TILE_OF_SANDWICH:
        yield (
            Tile(0, slab.count, 0, slab.rows),
            entries(a, like.dtype, like.device),
            entries(b, product, like.device),
        )
        return
    at_once = backends.tile_entries(like.device) // (4 if product == like.dtype else 2)
    for tile in tiles(slab, max(TILE_OF_SANDWICH, at_once)):
        a_rows = _tile_entries(a, Tile(0, 1, tile.row, tile.rows), like)
        yield tile, a_rows, _tile_entries(b, tile, lines)


TILE_OF_SANDWICH = 1 << 20
"""Entries of B, and about as many of ``Λ A Γ``, that exist in floating point at one time on the CPU."""


SMALL_SANDWICH = 1 << 14
"""Entries of ``Λ A Γ`` up to which a graph over them costs less than a call of a Function of our own."""


def _rows(diagonal: Tensor, tile: Tile) -> Tensor:
    return diagonal[tile.index : tile.index + tile.count, tile.row : tile.row + tile.rows]


@_sandwich.register_fake
def _(diagonal: Tensor, columns: Tensor | None, a_name: list[int], b_name: list[int], *others: Any) -> Tensor:
    *_, dtype = others
    return diagonal.new_empty(b_name[5], a_name[5], dtype=dtype)


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
    a, b = _stored(a_name, law, storage), _stored(b_name, law, storage)
    with no_autocast(diagonal):
        for_diagonal, for_columns = _gradients_of_terms(gradient, diagonal, columns, a, b)
    return for_diagonal, diagonal.new_zeros(0) if for_columns is None else for_columns


def _gradients_of_terms(
    gradient: Tensor, diagonal: Tensor, columns: Tensor | None, a: Stored, b: Stored
) -> tuple[Tensor, Tensor | None]:
    for_diagonal = torch.zeros_like(diagonal)
    for_columns = None if columns is None else torch.zeros_like(columns)
    product, size = backends.wide(gradient.device, gradient.dtype), None
    if product == torch.float16:  # sums over all rows of what is multiplied by the scale of a loss
        size = _size(gradient.float(), None)
        gradient = gradient.float() / size
    gradient = gradient.to(product)
    for tile, a_rows, b_rows in _sandwich_tiles(a, b, diagonal, product):
        met = (b_rows.flatten(0, 1) @ gradient).to(diagonal.dtype).view(tile.count, tile.rows, a.slab.cols).mul_(a_rows)
        if size is not None:
            met.mul_(size)
        if columns is None or for_columns is None:
            _rows(for_diagonal, tile).add_(met.sum(-1))
            continue
        part = columns[tile.index : tile.index + tile.count]
        _rows(for_diagonal, tile).add_((met @ part.unsqueeze(-1)).squeeze(-1))
        wanted = (_rows(diagonal, tile).unsqueeze(1) @ met).squeeze(1)
        for_columns[tile.index : tile.index + tile.count].add_(wanted)
    return for_diagonal, for_columns


@_sandwich_gradients.register_fake
def _(gradient: Tensor, diagonal: Tensor, columns: Tensor | None, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(diagonal), diagonal.new_empty(0) if columns is None else torch.empty_like(columns)


def _sandwich_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    diagonal, columns, *ctx.arguments = inputs
    ctx.save_for_backward(diagonal, columns)


def _sandwich_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    check_differentiated_once()
    diagonal, columns = ctx.saved_tensors
    for_diagonal, for_columns = _sandwich_gradients(gradient.contiguous(), diagonal, columns, *ctx.arguments[:-1])
    return for_diagonal, None if columns is None else for_columns, None, None, None, None, None


_sandwich.register_autograd(_sandwich_backward, setup_context=_sandwich_setup)


class _Sandwich(torch.autograd.Function):
    """The op, called at once: its dispatch costs more than the products of a small layer."""

    @staticmethod
    def forward(ctx: Any, diagonal: Tensor, columns: Tensor | None, a: Stored, b: Stored, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(diagonal, columns)
        ctx.bases = a, b
        with no_autocast(diagonal):
            return _sum_of_terms(diagonal, columns, a, b, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        check_differentiated_once()
        with no_autocast(gradient):
            return *_gradients_of_terms(gradient.contiguous(), *ctx.saved_tensors, *ctx.bases), None, None, None


def sandwich(
    diagonal: Tensor, columns: Tensor | None, a: Stored, b: Stored, dtype: torch.dtype | None = None
) -> Tensor:
    """``Σⱼ Bⱼᵀ Λⱼ A Γⱼ`` without a graph over its terms: math (12) and (14) in weight order (20).

    Args:
        diagonal: ``Λ``, ``[n, r]``.
        columns: ``Γ``, ``[n, a.cols]``, or None for ones.
        a: one matrix ``r × a.cols`` (index 0 of its basis).
        b: ``n`` matrices ``r × b.cols``, kept as ``a`` is.
        dtype: of the result, and on a GPU of the operands of the large product and of that of the gradient, which are
            added in float32; None takes that of ``diagonal``.

    Returns:
        ``[b.cols, a.cols]`` of entries combined, without the real factors.
    """
    small = diagonal.numel() * a.slab.cols <= SMALL_SANDWICH
    plain = small and a.plain(diagonal) is not None and b.plain(diagonal) is not None and not traced()
    if plain or transformed():
        out = _plain_sandwich(diagonal, columns, a, b)
        return out if dtype is None else out.to(dtype)
    dtype = diagonal.dtype if dtype is None else dtype
    if _direct(diagonal):
        return cast("Tensor", _Sandwich.apply(diagonal, columns, a, b, dtype))  # pyright: ignore[reportUnknownMemberType]
    return _sandwich(diagonal, columns, _name(a.slab), _name(b.slab), a.slab.basis.law.name, b.storage, dtype)


def _plain_sandwich(diagonal: Tensor, columns: Tensor | None, a: Stored, b: Stored) -> Tensor:
    """:func:`sandwich` in torch's own operations, with a graph over its terms."""
    scaled = diagonal.unsqueeze(-1) * entries(a, diagonal.dtype, diagonal.device)
    if columns is not None:
        scaled = scaled * columns.unsqueeze(1)
    lines = entries(b, diagonal.dtype, diagonal.device).flatten(0, 1)
    return _linear(lines.T, scaled.flatten(0, 1).T)

"""Which implementation runs an op, and why another was refused.

``RANDBASIS_BACKEND`` may name one (``reference``, ``cpu`` or ``triton``): then it is used or its refusal is an error.
By default the fastest that accepts the device and dtype runs; falling back to the reference is said once, with the
reason.

``RANDBASIS_PROJECT`` says how Triton multiplies by a basis that is not stored densely: ``fused`` makes its entries
inside of the product, ``expanded`` writes them to memory, some at a time, for the vendor's product; ``auto`` decides by
the number of vectors.
"""

import os
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from randbasis.errors import BackendError
from randbasis.ops import cpu, reference, triton
from randbasis.ops.reference import Slab, Tile

Backend = Literal["reference", "cpu", "triton"]

ENVIRONMENT = "RANDBASIS_BACKEND"
BACKENDS = ("auto", "reference", "cpu", "triton")
PROJECT_ENVIRONMENT = "RANDBASIS_PROJECT"
PROJECTS = ("auto", "fused", "expanded")

FUSED_VECTORS = 64
"""Vectors that one tile of the fused product holds: for more, it would make every entry more than once."""

EXPANDED_ENTRIES = 1 << 26
"""Entries that exist at one time in the memory of a GPU (128 MiB of bfloat16): small tiles would leave it idle."""


def refusal(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why the compiled CPU path cannot take tensors of this device and dtype; None when it can."""
    if device.type != "cpu":
        return f"the compiled loops run on the CPU only, the tensor is on {device.type}"
    if dtype not in (torch.float32, torch.float64, torch.int32):
        return f"the compiled loops take float32 and float64, the tensor is {dtype}"
    return cpu.available()


@lru_cache(maxsize=64)
def _chosen(device_type: str, dtype: torch.dtype, named: str) -> Backend:
    if named not in BACKENDS:
        raise BackendError(f"{ENVIRONMENT} must be one of {list(BACKENDS)}, got {named!r}; unset it for the default")
    if named == "reference":
        return "reference"
    device = torch.device(device_type)
    fast: Backend = "triton" if named == "triton" or (named == "auto" and device_type == "cuda") else "cpu"
    reason = triton.refusal(device, dtype) if fast == "triton" else refusal(device, dtype)
    if reason is None:
        return fast
    if named == fast:
        raise BackendError(f"{ENVIRONMENT}={named} was asked for but {reason}; unset it to fall back to the reference")
    takes = {"cuda": triton.DTYPES, "cpu": (torch.float32, torch.float64)}.get(device_type, ())
    if dtype in takes:
        warnings.warn(f"randbasis falls back to its plain torch path, which is slower: {reason}", stacklevel=2)
    return "reference"


def chosen(device: torch.device, dtype: torch.dtype) -> Backend:
    """Who computes on this device in this dtype.

    Raises:
        BackendError: the environment names a backend that does not exist or cannot run here.
    """
    return _chosen(device.type, dtype, os.environ.get(ENVIRONMENT, "auto"))


def tile_entries(device: torch.device) -> int:
    """Entries of the basis that may exist in floating point at one time on this device."""
    return EXPANDED_ENTRIES if device.type == "cuda" else reference.TILE_ENTRIES


def wide(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: the CPU adds half precision in float32, faster and with fewer roundings."""
    if device.type != "cpu" or dtype not in (torch.float16, torch.bfloat16):
        return dtype
    return dtype if os.environ.get(ENVIRONMENT) == "triton" else torch.float32


def words(slab: Slab, device: torch.device) -> Tensor:
    """Raw words of a whole slab, int32 ``[count, rows, 4 * blocks]``, math (2); of a hashed one, of one matrix."""
    return _words(slab, slab.drawn, device)


def _words(slab: Slab, tile: Tile, device: torch.device) -> Tensor:
    backend = chosen(device, torch.int32)
    if backend == "triton":
        return triton.words(slab, tile, device)
    if backend == "cpu":
        basis = slab.basis
        return cpu.words(*basis.key, basis.stream, tile.index, tile.count, tile.row, tile.rows, 0, slab.blocks)
    parts = [reference.words(slab, small, device).flatten() for small in reference.subtiles(slab, tile)]
    empty = torch.empty(0, dtype=torch.int32, device=device)
    return torch.cat([empty, *parts]).view(tile.count, tile.rows, 4 * slab.blocks)


def expand(slab: Slab, tile: Tile, dtype: torch.dtype, device: torch.device, packed: Tensor | None = None) -> Tensor:
    """Entries of a tile in floating point, ``[count, rows, cols]``; see :func:`reference.expand`."""
    if wide(device, dtype) != dtype:
        return expand(slab, tile, wide(device, dtype), device, packed).to(dtype)
    if slab.basis.law.disjoint:
        mine = reference.drawn_for(slab, tile)
        raw = _words(slab, mine, device) if packed is None else reference.part(packed, mine)
        return reference.scattered(slab, tile, raw, dtype)
    backend = chosen(device, dtype)
    part = None if packed is None else reference.part(packed, tile)
    if backend == "triton":
        return triton.expand(slab, tile, dtype, device, part)
    if backend == "cpu":
        return cpu.expand(slab, tile, dtype, part)
    if tile.count * tile.rows * slab.cols <= reference.TILE_ENTRIES:
        return reference.expand(slab, tile, dtype, device, packed)
    out = torch.empty(tile.count, tile.rows, slab.cols, dtype=dtype, device=device)
    for small in reference.subtiles(slab, tile):
        first = small.index - tile.index
        row = small.row - tile.row
        out[first : first + small.count, row : row + small.rows] = reference.expand(slab, small, dtype, device, packed)
    return out


def combine(coefficients: Tensor, slab: Slab, packed: Tensor | None) -> Tensor:
    """``Σᵢ c[n, i] · entries[i]``, ``[n, rows, cols]``; see :func:`reference.combine`."""
    dtype, sums = _sums(coefficients)
    return sums.combine(coefficients.to(dtype), slab, packed).to(coefficients.dtype)


def inner(gradient: Tensor, slab: Slab, packed: Tensor | None) -> Tensor:
    """``⟨gradient[n], entries[i]⟩``, ``[n, count]``; see :func:`reference.inner`."""
    dtype, sums = _sums(gradient)
    return sums.inner(gradient.to(dtype), slab, packed).to(gradient.dtype)


class _Sums(Protocol):
    """What every implementation can do with a whole slab at once."""

    def combine(self, coefficients: Tensor, slab: Slab, packed: Tensor | None, /) -> Tensor: ...
    def inner(self, vectors: Tensor, slab: Slab, packed: Tensor | None, /) -> Tensor: ...


_SUMS: dict[Backend, _Sums] = {"reference": reference, "cpu": cpu, "triton": triton}


def _sums(values: Tensor) -> tuple[torch.dtype, _Sums]:
    """The dtype to compute in, and who computes."""
    dtype = wide(values.device, values.dtype)
    return dtype, _SUMS[chosen(values.device, dtype)]


def project(x: Tensor, slab: Slab, packed: Tensor | None, *, transpose: bool) -> Tensor:
    """``x Mᵀ``, or ``x M``, for the slab as a matrix ``[count * rows, cols]``, with one tile of it at a time at most.

    Raises:
        BackendError: the environment names a way of multiplying that does not exist.
    """
    way = os.environ.get(PROJECT_ENVIRONMENT, "auto")
    if way not in PROJECTS:
        raise BackendError(
            f"{PROJECT_ENVIRONMENT} must be one of {list(PROJECTS)}, got {way!r}; unset it for the default"
        )
    fused = way == "fused" or (way == "auto" and x.shape[0] <= FUSED_VECTORS)
    if fused and not slab.basis.law.disjoint and chosen(x.device, x.dtype) == "triton":
        return triton.project(x, slab, packed, transpose=transpose)
    out = x.new_zeros(x.shape[0], slab.cols if transpose else slab.count * slab.rows)
    for tile in reference.tiles(slab, tile_entries(x.device)):
        lines = expand(slab, tile, x.dtype, x.device, packed).flatten(0, 1)
        first = tile.index * slab.rows + tile.row
        last = first + lines.shape[0]
        if transpose:
            out.addmm_(x[:, first:last], lines)
        else:
            torch.mm(x, lines.T, out=out[:, first:last])
    return out


def launches_together(x: Tensor) -> bool:
    """Whether many products of one shape are one launch here, and not one call after the other."""
    return chosen(x.device, x.dtype) == "triton"


def product_each(x: Tensor, slabs: Sequence[Slab], *, transpose: bool) -> Tensor:
    """:func:`combine` (transposed) or :func:`inner` on ``x[i]`` and slab ``i``, ``[m, n, ...]``, in one launch."""
    streams = [slab.basis.stream for slab in slabs]
    if transpose:
        return triton.combine_each(x, slabs[0], streams).flatten(2)
    return triton.inner_each(x.view(*x.shape[:2], slabs[0].rows, slabs[0].cols), slabs[0], streams)

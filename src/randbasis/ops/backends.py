"""Which implementation runs an op, and why another was refused.

``RANDBASIS_BACKEND`` may name one (``reference`` or ``cpu``): then it is used or its refusal is an error. By default
the fastest that accepts the device and dtype runs; falling back to the reference is said once, with the reason.
"""

import os
import warnings
from functools import lru_cache

import torch
from torch import Tensor

from randbasis.errors import BackendError
from randbasis.ops import cpu, reference
from randbasis.ops.reference import Slab, Tile

ENVIRONMENT = "RANDBASIS_BACKEND"
BACKENDS = ("auto", "reference", "cpu")


def refusal(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why the compiled CPU path cannot take tensors of this device and dtype; None when it can."""
    if device.type != "cpu":
        return f"the compiled loops run on the CPU only, the tensor is on {device.type}"
    if dtype not in (torch.float32, torch.float64, torch.int32):
        return f"the compiled loops take float32 and float64, the tensor is {dtype}"
    return cpu.available()


@lru_cache(maxsize=64)
def _compiled(device_type: str, dtype: torch.dtype, named: str) -> bool:
    if named not in BACKENDS:
        raise BackendError(f"{ENVIRONMENT} must be one of {list(BACKENDS)}, got {named!r}; unset it for the default")
    if named == "reference":
        return False
    reason = refusal(torch.device(device_type), dtype)
    if reason is None:
        return True
    if named == "cpu":
        raise BackendError(f"{ENVIRONMENT}=cpu was asked for but {reason}; unset it to fall back to the reference")
    if device_type == "cpu" and dtype in (torch.float32, torch.float64):
        warnings.warn(f"randbasis falls back to its plain torch path, which is slower: {reason}", stacklevel=2)
    return False


def compiled(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the compiled CPU path runs for this device and dtype.

    Raises:
        BackendError: the environment names a backend that does not exist or cannot run here.
    """
    return _compiled(device.type, dtype, os.environ.get(ENVIRONMENT, "auto"))


def _wide(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: the CPU adds half precision in float32, faster and with fewer roundings."""
    return torch.float32 if device.type == "cpu" and dtype in (torch.float16, torch.bfloat16) else dtype


def words(slab: Slab, device: torch.device) -> Tensor:
    """Raw words of a whole slab, int32 ``[count, rows, 4 * blocks]``, math (2)."""
    if compiled(device, torch.int32):
        basis = slab.basis
        return cpu.words(*basis.key, basis.stream, 0, slab.count, 0, slab.rows, 0, slab.blocks)
    parts = [reference.words(slab, tile, device).flatten() for tile in reference.tiles(slab)]
    empty = torch.empty(0, dtype=torch.int32, device=device)
    return torch.cat([empty, *parts]).view(slab.count, slab.rows, 4 * slab.blocks)


def expand(slab: Slab, tile: Tile, dtype: torch.dtype, device: torch.device, packed: Tensor | None = None) -> Tensor:
    """Entries of a tile in floating point, ``[count, rows, cols]``; see :func:`reference.expand`."""
    if _wide(device, dtype) != dtype:
        return expand(slab, tile, _wide(device, dtype), device, packed).to(dtype)
    if compiled(device, dtype):
        part = None if packed is None else reference.part(packed, tile)
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
    wide = _wide(coefficients.device, coefficients.dtype)
    if wide != coefficients.dtype:
        return combine(coefficients.to(wide), slab, packed).to(coefficients.dtype)
    if compiled(coefficients.device, coefficients.dtype):
        return cpu.combine(coefficients.contiguous(), slab, packed)
    return reference.combine(coefficients, slab, packed)


def inner(gradient: Tensor, slab: Slab, packed: Tensor | None) -> Tensor:
    """``⟨gradient[n], entries[i]⟩``, ``[n, count]``; see :func:`reference.inner`."""
    wide = _wide(gradient.device, gradient.dtype)
    if wide != gradient.dtype:
        return inner(gradient.to(wide), slab, packed).to(gradient.dtype)
    if compiled(gradient.device, gradient.dtype):
        return cpu.inner(gradient.contiguous(), slab, packed)
    return reference.inner(gradient, slab, packed)

"""Coefficients as codes of few bits and one scale a vector, math (11), and codes as bytes.

A scale keeps 17 significant bits of ``max|c| / (2^(bits-1) - 1)``, rounded towards zero. With a code of at most seven
bits, ``scale · code`` is then exact in float32, the largest code is always used, and quantizing what was dequantized
gives the same codes and scales: a packed file that is unpacked and packed again is the same file.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from randbasis.errors import CodeError, CoefficientValueError, PrecisionError

BITS = (32, 16, 8, 4, 3, 2)
"""Bits of a coefficient that a file may have."""
CODED = (8, 4, 3, 2)
"""Those that are codes with scales."""

_KEPT = ~((1 << 36) - 1)
"""Mask over a float64 that leaves 17 significant bits."""
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def largest_code(bits: int) -> int:
    """``2^(bits-1) - 1``: codes run from minus this to this."""
    return (1 << (bits - 1)) - 1


def check_precision(bits: int, group: int) -> None:
    """Raise unless coefficients can be stored with these bits and this group size.

    Args:
        bits: one of :data:`BITS`.
        group: coefficients that share a scale; 0 for one scale a vector.

    Raises:
        PrecisionError: they cannot.
    """
    if bits not in BITS:
        raise PrecisionError(f"bits must be one of {list(BITS)}, got {bits!r}; 16 is the usual choice")
    if group < 0 or (group and bits not in CODED):
        raise PrecisionError(
            f"group must be 0 (one scale a vector) or, with {list(CODED)} bits, the number of coefficients that share "
            f"a scale, got group={group!r} with {bits} bits; use group=0"
        )


def run_count(length: int, group: int) -> int:
    """Scales of one vector."""
    return -(-length // group) if group else 1


def run_lengths(lengths: Sequence[int], group: int) -> Tensor:
    """Coefficients under each scale, in the order of the scales.

    Args:
        lengths: entries of each vector, that is of each coefficient tensor of each matrix.
        group: coefficients that share a scale; 0 for one scale a vector.
    """
    runs = [min(group, length - done) for length in lengths for done in range(0, length, group)] if group else lengths
    return torch.tensor(runs, dtype=torch.int64)


def quantize(values: Tensor, runs: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of coefficients, math (11).

    Args:
        values: ``[n]``, floating.
        runs: from :func:`run_lengths`, adding up to n.
        bits: one of :data:`CODED`.

    Returns:
        Codes ``[n]`` int8 and scales ``[runs]`` float32. A run whose scale would be below the smallest normal float32
        gets the scale 0 and codes 0.

    Raises:
        CoefficientValueError: a value is not finite.
    """
    exact = values.detach().double()
    if not bool(torch.isfinite(exact).all()):
        raise CoefficientValueError("coefficients must be finite to be quantized; use an earlier checkpoint")
    runs = runs.to(exact.device)
    of = torch.repeat_interleave(torch.arange(len(runs), device=exact.device), runs)
    largest = torch.zeros(len(runs), dtype=torch.float64, device=exact.device)
    largest = largest.scatter_reduce(0, of, exact.abs(), "amax") / largest_code(bits)
    scales = (largest.view(torch.int64) & _KEPT).view(torch.float64)
    scales = torch.where(scales >= _SMALLEST_SCALE, scales, 0.0)
    spread = scales[of]
    codes = torch.where(spread > 0, (exact / torch.where(spread > 0, spread, 1.0)).round(), 0.0)
    return codes.to(torch.int8), scales.to(torch.float32)


def dequantize(codes: Tensor, scales: Tensor, runs: Tensor) -> Tensor:
    """``scale · code`` in float32.

    Args:
        codes: ``[n]`` int8.
        scales: ``[runs]`` float32.
        runs: from :func:`run_lengths`.
    """
    return codes.to(torch.float32) * torch.repeat_interleave(scales, runs.to(scales.device))


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes of 2, 3 or 4 bits as bytes: code ``i`` in two's complement at bits ``[i·bits, (i+1)·bits)``.

    Bit ``j`` of the whole is bit ``j mod 8``, the least significant being bit 0, of byte ``j div 8``. The bits after
    the last code are 0.

    Args:
        codes: ``[n]`` int8.
        bits: 2, 3 or 4.

    Returns:
        ``[ceil(n · bits / 8)]`` uint8.
    """
    unsigned = codes.numpy().view(np.uint8)[:, None]
    each = np.unpackbits(unsigned, axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(each.reshape(-1), bitorder="little"))


def unpack_codes(packed: Tensor, count: int, bits: int, where: str) -> Tensor:
    """The inverse of :func:`pack_codes`.

    Args:
        packed: ``[ceil(count · bits / 8)]`` uint8.
        count: how many codes there are.
        bits: 2, 3 or 4.
        where: the file, for the message.

    Raises:
        CodeError: a bit after the last code is not 0.
    """
    stream = np.unpackbits(packed.numpy(), bitorder="little")
    if stream[count * bits :].any():
        raise CodeError(
            f"{where}: the bits after the last of {count} codes of {bits} bits must be 0, got "
            f"{stream[count * bits :].tolist()}; the file was not written by randbasis: take it from its source again"
        )
    each = stream[: count * bits].reshape(count, bits)
    whole = np.concatenate([each, np.repeat(each[:, -1:], 8 - bits, axis=1)], axis=1)  # the sign fills the byte
    return torch.from_numpy(np.packbits(whole, axis=1, bitorder="little").reshape(-1).view(np.int8))


def check_codes(codes: Tensor, bits: int, where: str) -> None:
    """Raise unless every code is in the symmetric range of math (11).

    Raises:
        CodeError: there is ``-2^(bits-1)``.
    """
    wrong = codes < -largest_code(bits)
    if bool(wrong.any()):
        raise CodeError(
            f"{where}: codes of {bits} bits must be in ±{largest_code(bits)}, got {int(codes[wrong][0])} at index "
            f"{int(wrong.nonzero()[0])}; the file was not written by randbasis: take it from its source again"
        )

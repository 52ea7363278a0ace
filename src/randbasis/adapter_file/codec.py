"""Coefficients as codes of few bits and one scale a vector, math (11), and codes as bytes.

A scale keeps 17 significant bits of ``max|c| / (2^(bits-1) - 1)``, rounded towards zero. With a code of at most seven
bits, ``scale · code`` is then exact in float32, the largest code is always used, and quantizing what was dequantized
gives the same codes and scales: a packed file that is unpacked and packed again is the same file.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from randbasis.adapter_file.precision import CODED, check_precision, largest_code
from randbasis.errors import CodeError, CoefficientValueError, PrecisionError

_KEPT = ~((1 << 36) - 1)
"""Mask over a float64 that leaves 17 significant bits."""
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


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
        bits: one of :data:`~randbasis.adapter_file.precision.CODED`.

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
    scales = scale_of(largest.scatter_reduce(0, of, exact.abs(), "amax"), bits)
    return nearest_codes(exact, scales[of]).to(torch.int8), scales.to(torch.float32)


def scale_of(largest: Tensor, bits: int) -> Tensor:
    """``s`` of math (11).

    Args:
        largest: ``max|c|``, float64.
        bits: one of :data:`~randbasis.adapter_file.precision.CODED`.

    Returns:
        float64 of 17 significant bits; 0 where that would be below the smallest normal float32.
    """
    scales = ((largest / largest_code(bits)).view(torch.int64) & _KEPT).view(torch.float64)
    return torch.where(scales >= _SMALLEST_SCALE, scales, 0.0)


def nearest_codes(values: Tensor, scales: Tensor) -> Tensor:
    """``round(c / s)`` of math (11), half to even, as float64; 0 where the scale is 0.

    Args:
        values: float64.
        scales: float64, of a shape that expands to that of the values.
    """
    return torch.where(scales > 0, (values / torch.where(scales > 0, scales, 1.0)).round(), 0.0)


def dequantize(codes: Tensor, scales: Tensor, runs: Tensor) -> Tensor:
    """``scale · code`` in float32.

    Args:
        codes: ``[n]`` int8.
        scales: ``[runs]`` float32.
        runs: from :func:`run_lengths`.
    """
    return codes.to(torch.float32) * torch.repeat_interleave(scales, runs.to(scales.device))


def rounded(values: Tensor, lengths: Sequence[int], bits: int, group: int = 0) -> Tensor:
    """Coefficients as a file of so many bits gives them back.

    Args:
        values: ``[n]``, floating.
        lengths: entries of each vector, adding up to n.
        bits: one of :data:`~randbasis.adapter_file.precision.BITS`; 32 changes nothing.
        group: coefficients that share a scale; 0 for one scale a vector.

    Returns:
        ``[n]``: float32 of codes and scales, float16 with 16 bits (bfloat16 stays).

    Raises:
        PrecisionError: there is no such precision, or a value does not fit it.
        CoefficientValueError: a value is not finite.
    """
    check_precision(bits, group)
    if bits in CODED:
        runs = run_lengths(lengths, group)
        return dequantize(*quantize(values, runs, bits), runs)
    return values if bits == 32 or values.dtype in (torch.float16, torch.bfloat16) else narrowed(values, torch.float16)


def narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in a dtype of fewer bits.

    Raises:
        PrecisionError: a value is beyond its range.
    """
    narrow = values.to(dtype)
    if not bool(torch.isfinite(narrow).all()):
        raise PrecisionError(
            f"coefficients up to {float(values.abs().max()):.4g} do not fit {dtype}, which ends at "
            f"{torch.finfo(dtype).max:.4g}; use 32 bits, or 8 bits with scales"
        )
    return narrow


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

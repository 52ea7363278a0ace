"""Coefficients as codes of few bits and one scale a vector, math (11).

A scale keeps 17 significant bits of ``max|c| / (2^(bits-1) - 1)``, rounded towards zero. With a code of at most seven
bits, ``scale · code`` is then exact in float32, the largest code is always used, and quantizing what was dequantized
gives the same codes and scales: a packed file that is unpacked and packed again is the same file.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from randbasis.errors import CoefficientValueError, PrecisionError
from randbasis.precision import CODED, check_precision, largest_code, run_lengths

_KEPT = ~((1 << 36) - 1)
"""Mask over a float64 that leaves 17 significant bits."""
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def quantize(values: Tensor, runs: Sequence[int], bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of coefficients, math (11).

    Args:
        values: ``[n]``, floating.
        runs: from :func:`~randbasis.precision.run_lengths`, adding up to n.
        bits: one of :data:`~randbasis.precision.CODED`.

    Returns:
        Codes ``[n]`` int8 and scales ``[runs]`` float32. A run whose scale would be below the smallest normal float32
        gets the scale 0 and codes 0.

    Raises:
        CoefficientValueError: a value is not finite.
    """
    exact = values.detach().double()
    if not bool(torch.isfinite(exact).all()):
        raise CoefficientValueError("coefficients must be finite to be quantized; use an earlier checkpoint")
    of = torch.repeat_interleave(
        torch.arange(len(runs), device=exact.device), torch.tensor(runs, dtype=torch.int64, device=exact.device)
    )
    largest = torch.zeros(len(runs), dtype=torch.float64, device=exact.device)
    scales = scale_of(largest.scatter_reduce(0, of, exact.abs(), "amax"), bits)
    return nearest_codes(exact, scales[of]).to(torch.int8), scales.to(torch.float32)


def scale_of(largest: Tensor, bits: int) -> Tensor:
    """``s`` of math (11).

    Args:
        largest: ``max|c|``, float64.
        bits: one of :data:`~randbasis.precision.CODED`.

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


def dequantize(codes: Tensor, scales: Tensor, runs: Sequence[int]) -> Tensor:
    """``scale · code`` in float32.

    Args:
        codes: ``[n]`` int8.
        scales: ``[runs]`` float32.
        runs: from :func:`~randbasis.precision.run_lengths`.
    """
    repeats = torch.tensor(runs, dtype=torch.int64, device=scales.device)
    return codes.to(torch.float32) * torch.repeat_interleave(scales, repeats)


def rounded(values: Tensor, lengths: Sequence[int], bits: int, group: int = 0) -> Tensor:
    """Coefficients as a file of so many bits gives them back.

    Args:
        values: ``[n]``, floating.
        lengths: entries of each vector, adding up to n.
        bits: one of :data:`~randbasis.precision.BITS`; 32 changes nothing.
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


def narrowed(
    values: Tensor,
    dtype: torch.dtype,
    what: str = "coefficients",
    way_out: str = "use 32 bits, or 8 bits with scales",
) -> Tensor:
    """Values in a dtype of fewer bits; ``what`` they are and the ``way_out`` are for the message.

    Raises:
        PrecisionError: a value is beyond its range.
    """
    narrow = values.to(dtype)
    if not bool(torch.isfinite(narrow).all()):
        raise PrecisionError(
            f"{what} up to {float(values.abs().max()):.4g} do not fit {dtype}, which ends at "
            f"{torch.finfo(dtype).max:.4g}; {way_out}"
        )
    return narrow

"""How many bits a coefficient may have, and how many scales there are then; no tensor is needed to say so."""

from collections.abc import Sequence

from randbasis.errors import PrecisionError

BITS = (32, 16, 8, 4, 3, 2)
"""Bits of a coefficient that a file may have."""
CODED = (8, 4, 3, 2)
"""Those that are codes with scales."""


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
    if type(bits) is not int or bits not in BITS:
        raise PrecisionError(f"bits must be one of {list(BITS)}, got {bits!r}; 16 is the usual choice")
    if type(group) is not int or group < 0 or (group and bits not in CODED):
        raise PrecisionError(
            f"group must be 0 (one scale a vector) or, with {list(CODED)} bits, the number of coefficients that share "
            f"a scale, got group={group!r} with {bits} bits; use group=0"
        )


def check_training_precision(bits: int | None) -> None:
    """Raise unless coefficients can be trained as codes of so many bits; None is full precision.

    Raises:
        PrecisionError: they cannot.
    """
    if bits is not None and (type(bits) is not int or bits not in CODED):
        raise PrecisionError(
            f"quantize_coefficients must be one of {list(CODED)} bits, or None for full precision, got {bits!r}; "
            "3 is the usual choice, and 16 bits need no training: pack the adapter at 16"
        )


def run_count(length: int, group: int) -> int:
    """Scales of one vector."""
    return -(-length // group) if group else 1


def run_lengths(lengths: Sequence[int], group: int) -> list[int]:
    """Coefficients under each scale, in the order of the scales.

    Args:
        lengths: entries of each vector, that is of each coefficient tensor of each matrix.
        group: coefficients that share a scale; 0 for one scale a vector.
    """
    if not group:
        return list(lengths)
    return [min(group, length - done) for length in lengths for done in range(0, length, group)]

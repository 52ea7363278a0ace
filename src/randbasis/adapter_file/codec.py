"""Codes as bytes, and bytes that are no codes refused."""

import numpy as np
from numpy.typing import NDArray

from randbasis.errors import CodeError
from randbasis.precision import largest_code


def pack_codes(codes: NDArray[np.int8], bits: int) -> bytes:
    """Codes of 2, 3 or 4 bits as bytes: code ``i`` in two's complement at bits ``[i·bits, (i+1)·bits)``.

    Bit ``j`` of the whole is bit ``j mod 8``, the least significant being bit 0, of byte ``j div 8``. The bits after
    the last code are 0.

    Args:
        codes: ``[n]``.
        bits: 2, 3 or 4.

    Returns:
        ``ceil(n · bits / 8)`` bytes.
    """
    each = np.unpackbits(codes.view(np.uint8)[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(each.reshape(-1), bitorder="little").tobytes()


def unpack_codes(packed: bytes | bytearray, count: int, bits: int, where: str) -> NDArray[np.int8]:
    """The inverse of :func:`pack_codes`.

    Args:
        packed: ``ceil(count · bits / 8)`` bytes.
        count: how many codes there are.
        bits: 2, 3 or 4.
        where: the file, for the message.

    Returns:
        ``[count]``.

    Raises:
        CodeError: a bit after the last code is not 0.
    """
    eights = np.zeros((-(-len(packed) // bits), 4), np.uint8)  # eight codes are as many bytes as one has bits
    whole = np.zeros(len(eights) * bits, np.uint8)
    whole[: len(packed)] = np.frombuffer(packed, np.uint8)
    eights[:, :bits] = whole.reshape(-1, bits)
    each = (eights.view("<u4") >> np.arange(0, 8 * bits, bits, dtype=np.uint32)).astype(np.uint8)
    codes = (each << (8 - bits)).view(np.int8).reshape(-1) >> (8 - bits)  # the sign fills the byte
    if codes[count:].any():
        left = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")[count * bits :]
        raise CodeError(
            f"{where}: the bits after the last of {count} codes of {bits} bits must be 0, got "
            f"{left.tolist()}; the file was not written by randbasis: take it from its source again"
        )
    return codes[:count]


def check_codes(codes: NDArray[np.int8], bits: int, where: str) -> None:
    """Raise unless every code is in the symmetric range of math (11).

    Raises:
        CodeError: one is beyond it.
    """
    wrong = np.flatnonzero(np.abs(codes.astype(np.int16)) > largest_code(bits))
    if wrong.size:
        raise CodeError(
            f"{where}: codes of {bits} bits must be in ±{largest_code(bits)}, got {codes[wrong[0]]} at index "
            f"{wrong[0]}; the file was not written by randbasis: take it from its source again"
        )

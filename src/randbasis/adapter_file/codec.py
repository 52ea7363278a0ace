"""Codes as bytes, and bytes that are no codes refused."""

import numpy as np
import torch
from torch import Tensor

from randbasis.errors import CodeError
from randbasis.precision import largest_code


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

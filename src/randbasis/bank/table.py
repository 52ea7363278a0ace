"""Rows of coefficients, one a resident adapter, in pieces: a table that grows copies nothing."""

import torch
from torch import Tensor

PIECE = 4 << 20
"""Bytes of a piece, if one row is no larger."""


class Table:
    """Rows of one length and dtype in the memory of the host. Row 0 stays zeros: the base model.

    Nothing here is locked: the bank calls under its own lock.

    Args:
        count: coefficients of a row.
        dtype: they are kept in.
    """

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.row_bytes = count * dtype.itemsize
        self._count = count
        self._rows = max(1, PIECE // max(1, self.row_bytes))
        self._pieces: list[Tensor] = []
        self._free: list[int] = []
        self._used = 0
        self.put(torch.zeros(count, dtype=dtype))

    def put(self, values: Tensor) -> int:
        """Copy values ``[count]`` into a free row; returns the row."""
        if self._free:
            row = self._free.pop()
        else:
            row = self._used
            if row == len(self._pieces) * self._rows:
                self._pieces.append(torch.empty(self._rows, self._count, dtype=self.dtype))
            self._used += 1
        self[row].copy_(values)
        return row

    def free(self, row: int) -> None:
        """Give a row back."""
        self._free.append(row)

    def __getitem__(self, row: int) -> Tensor:
        return self._pieces[row // self._rows][row % self._rows]

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return len(self._pieces) * self._rows * self.row_bytes

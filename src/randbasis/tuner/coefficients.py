"""Leaf modules that hold what an adapter stores: coefficients, and the streams of a basis that is not shared.

Each is a module with a ``.weight``, which is what sharding, state dicts and transformers' own loader expect.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn


class Coefficients(nn.Module):
    """One trainable tensor of coefficients.

    Args:
        start: its values before training.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start)

    def extra_repr(self) -> str:
        """Shape, for ``print(model)``."""
        return f"shape={list(self.weight.shape)}"


class Streams(nn.Module):
    """The streams of the matrices of one layer, ``[parts, roles]``, math (4): what is stored wins over any path.

    The integers are read from the tensor once after it changes, not in every forward pass.

    Args:
        streams: one tuple of streams for each part.
    """

    weight: Tensor

    def __init__(self, streams: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor(streams, dtype=torch.int64))
        self._read_from: Tensor | None = self.weight
        self._values = streams

    @property
    def values(self) -> list[tuple[int, ...]]:
        """The streams as integers."""
        if self._read_from is not self.weight and not self.weight.is_meta:
            rows = cast("list[list[int]]", self.weight.tolist())
            self._values = [tuple(row) for row in rows]
            self._read_from = self.weight
        return self._values

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read_from = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Streams":
        return Streams(self.values)

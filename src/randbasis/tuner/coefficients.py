"""Leaf modules that hold what an adapter stores: coefficients, and the streams of a basis that is not shared.

Each is a module with a ``.weight``, which is what sharding, state dicts and transformers' own loader expect.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from randbasis.basis import check_streams, not_streams
from randbasis.codes import nearest_codes, scale_of
from randbasis.tuner.snapshot import Snapshot


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


def straight_through(values: Tensor, bits: int) -> Tensor:
    """Math (11) in the forward pass, the identity in the backward pass (Bengio et al., arXiv 1308.3432).

    The result is to the last bit what :func:`randbasis.codes.rounded` makes of the values with one scale
    for all of them, which is what a packed file holds. Zeros stay zeros and are given their gradient; values that are
    not finite make the result NaN.

    Args:
        values: one vector, that is one coefficient tensor of one matrix, in any shape.
        bits: 8, 4, 3 or 2.

    Returns:
        The shape of the values, in float32 or wider.
    """
    with torch.no_grad():
        exact = values.double()
        scale = scale_of(exact.abs().amax(), bits)
        nearest = (nearest_codes(exact, scale) * scale).to(torch.promote_types(values.dtype, torch.float32))
    # The difference is exactly 0 and carries the gradient: nothing is rounded by adding it.
    return nearest + (values - values.detach())


class Streams(nn.Module):
    """The streams of the matrices of one layer, ``[parts, roles]``, math (4): what is stored wins over any path.

    The integers are read from the tensor after it changes, not in every forward pass: see
    :mod:`randbasis.tuner.snapshot` for how a change is seen.

    Args:
        streams: one tuple of streams for each part.
    """

    weight: Tensor

    def __init__(self, streams: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor(streams, dtype=torch.int64))
        self._values = streams
        self._read_from = Snapshot.of([self.weight])

    @property
    def values(self) -> list[tuple[int, ...]]:
        """The streams as integers."""
        if torch.compiler.is_compiling() and self._read_from is not None:
            return self._values
        if not self.weight.is_meta and (self._read_from is None or not self._read_from.is_of([self.weight])):
            self._read_from = Snapshot.of([self.weight])
            check_streams("the streams of a layer", self.weight)
            found = cast("list[list[int]]", self.weight.tolist())
            _check_not_rounded(self._values, found)
            self._values = [tuple(row) for row in found]
        return self._values

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        found = state_dict.get(f"{prefix}weight")
        if found is not None:
            check_streams(f"{prefix}weight", found)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if found is not None:
            self._read_from = None  # for a compiler, under which no values are compared

    def __deepcopy__(self, memo: dict[int, Any]) -> "Streams":
        return Streams(self.values)


def _check_not_rounded(before: list[tuple[int, ...]], found: list[list[int]]) -> None:
    """What averages all tensors of a model writes streams back by way of floating point."""
    for dtype in (torch.float32, torch.bfloat16):
        exact = torch.tensor(before, dtype=torch.float64, device="cpu")
        rounded = cast("list[list[int]]", exact.to(dtype).to(torch.int64).tolist())
        if found == rounded != [list(row) for row in before]:
            raise not_streams("the streams of a layer", f"{found}, which are {before} rounded to {dtype}")

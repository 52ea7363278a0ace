"""What one layer does in evaluation, decided once: decoding a token must not pay for decisions that do not change."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from randbasis.ops import traced
from randbasis.tuner.snapshot import Snapshot

Term = Callable[[Tensor], Tensor]
"""From the input of the layer to a summand of its output."""


def decodes(x: Tensor, *, rows_first: bool) -> bool:
    """Whether an input looks like a step of decoding one token further: one token a row, and it is known which is that.

    Args:
        x: the input of a layer.
        rows_first: whether the layer is known to see ``[rows, tokens, in]``.
    """
    return rows_first and x.dim() == 3 and x.shape[1] == 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where the tensor of a coefficient (or of stored streams) lies: ``modules[adapter]`` has it as its ``weight``.

    Attributes:
        modules: the children of the container that holds one such module for each adapter.
        adapter: its name.
        module: the module that was there.
        tensors: the parameters, or buffers, of that module.
    """

    modules: Mapping[str, nn.Module | None]
    adapter: str
    module: nn.Module
    tensors: Mapping[str, Tensor | None]

    @classmethod
    def of(cls, container: nn.ModuleDict, adapter: str) -> "Place":
        """The place in a container, by torch's own dictionaries: its accessors cost many times a look into them."""
        module = container[adapter]
        kind = "_parameters" if "weight" in vars(module)["_parameters"] else "_buffers"
        return cls(vars(container)["_modules"], adapter, module, vars(module)[kind])

    @property
    def tensor(self) -> Tensor:
        """What lies there."""
        return cast("Tensor", self.module.weight)

    def holds(self, tensor: Tensor) -> bool:
        """Whether this very tensor lies there still."""
        return self.modules.get(self.adapter) is self.module and self.tensors.get("weight") is tensor


@dataclass(frozen=True, slots=True)
class PreparedPass:
    """The summands of a forward pass, for inputs like the one that it was decided for.

    Attributes:
        active: the active adapters.
        dtype: of the input.
        device: of the input.
        numbers: in the input.
        places: where the coefficients (and stored streams) behind the terms lie.
        snapshot: what they held.
        terms: what is added to the result of the base layer.
    """

    active: list[str]
    dtype: torch.dtype
    device: torch.device
    numbers: int
    places: Sequence[Place]
    snapshot: Snapshot
    terms: Sequence[Term]

    def fits(self, x: Tensor, active: list[str], *, rows_first: bool) -> bool:
        """Whether deciding anew would lead to the same terms.

        Args:
            x: the input of the layer.
            active: the active adapters.
            rows_first: whether the layer is known to see ``[rows, tokens, in]``; see :func:`decodes`.
        """
        return (
            x.numel() == self.numbers
            and (self.snapshot.by_value or decodes(x, rows_first=rows_first))
            and x.dtype == self.dtype
            and x.device == self.device
            and active == self.active
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(x.device.type)
            and not torch.compiler.is_compiling()
            and not traced()
            and all(place.holds(seen.tensor) for place, seen in zip(self.places, self.snapshot.seen, strict=True))
            and self.snapshot.stands()
        )

    def add_to(self, result: Tensor, x: Tensor) -> Tensor:
        """The result of the base layer plus all terms."""
        for term in self.terms:
            result = result + term(x)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """None: the copy of a layer decides for itself."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

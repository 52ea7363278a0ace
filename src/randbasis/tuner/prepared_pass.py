"""What one layer does in evaluation, decided once: decoding a token must not pay for decisions that do not change."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from randbasis.tuner.coefficients import Coefficients, Streams
from randbasis.tuner.factor_cache import Stamps, stamps_of

Holder = Coefficients | Streams

Term = Callable[[Tensor], Tensor]
"""From the input of the layer to a summand of its output."""


@dataclass(frozen=True, slots=True)
class PreparedPass:
    """The summands of a forward pass, for inputs like the one that it was decided for.

    Attributes:
        active: the active adapters.
        dtype: of the input.
        numbers: in the input.
        holders: the modules of the coefficients (and stored streams) behind the terms.
        sources: their tensors then.
        stamps: the state of these then.
        terms: what is added to the result of the base layer.
    """

    active: list[str]
    dtype: torch.dtype
    numbers: int
    holders: Sequence[Holder]
    sources: Sequence[Tensor]
    stamps: Stamps
    terms: Sequence[Term]

    @classmethod
    def of(cls, x: Tensor, active: list[str], holders: Sequence[Holder], terms: Sequence[Term]) -> "PreparedPass":
        """The pass for inputs like ``x``, as the holders are now."""
        sources = [holder.weight for holder in holders]
        return cls(list(active), x.dtype, x.numel(), holders, sources, stamps_of(sources), terms)

    def fits(self, x: Tensor, active: list[str]) -> bool:
        """Whether deciding anew would lead to the same terms."""
        return (
            x.numel() == self.numbers
            and x.dtype == self.dtype
            and active == self.active
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(x.device.type)
            and not torch.compiler.is_compiling()
            and stamps_of(self.sources) == self.stamps
            and all(holder.weight is source for holder, source in zip(self.holders, self.sources, strict=True))
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


def may_be_kept(holders: Sequence[Holder]) -> bool:
    """Whether a pass made of these can tell when they change: not while a compiler traces, nor in inference mode."""
    return not torch.compiler.is_compiling() and not any(holder.weight.is_inference() for holder in holders)

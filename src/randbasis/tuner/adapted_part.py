"""One adapter on one part of a layer."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from randbasis.contraction import OrderChoice
from randbasis.methods import Bound
from randbasis.rounding import RoundingChoice
from randbasis.tuner.targets import Part


@dataclass
class AdaptedPart:
    """One adapter on one part of a layer.

    Attributes:
        part: which output rows.
        bound: the method there.
        attributes: coefficient name → name of the attribute that holds it, of the layer or of the owner.
        owner: the layer that holds the coefficients where matrices share them, math (26), for all but the first; None
            where this layer does. Not a module of this layer: a model has each parameter once.
    """

    part: Part
    bound: Bound[Any]
    attributes: dict[str, str]
    owner: nn.Module | None = field(default=None, repr=False, compare=False)

    @property
    def count(self) -> int:
        """Coefficients that are saved for it: none where another matrix has them."""
        return 0 if self.owner is not None else self.bound.method.count(self.bound.out_features, self.bound.in_features)

    def holder(self, layer: nn.Module) -> nn.Module:
        """The layer that has the coefficients, for the layer that the part is on."""
        return layer if self.owner is None else self.owner


@dataclass(frozen=True)
class AdapterOptions:
    """What an adapter asks of every layer beside its method."""

    dropout: float
    contraction: OrderChoice
    init_weights: bool
    quantize_coefficients: int | None = None
    fuse_rounding: RoundingChoice = "none"

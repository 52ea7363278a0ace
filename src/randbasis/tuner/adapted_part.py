"""One adapter on one part of a layer."""

from dataclasses import dataclass
from typing import Any

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
        attributes: coefficient name → name of the layer's attribute that holds it.
    """

    part: Part
    bound: Bound[Any]
    attributes: dict[str, str]


@dataclass(frozen=True)
class AdapterOptions:
    """What an adapter asks of every layer beside its method."""

    dropout: float
    contraction: OrderChoice
    init_weights: bool
    quantize_coefficients: int | None = None
    fuse_rounding: RoundingChoice = "none"

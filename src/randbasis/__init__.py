"""randbasis: a fine-tune of a large model as a seed and a handful of coefficients.

The flow, one line a stage:

    SEED → BASIS                    :mod:`randbasis.basis`: Philox, laws, streams
    BASIS + COEFFICIENTS → FACTORS  :mod:`randbasis.methods`: NOLA, VeRA, RandLoRA, PRANC, over :mod:`randbasis.ops`
    FACTORS → h                     :mod:`randbasis.contraction`: token order or weight order, by cost
    h inside a model                :mod:`randbasis.tuner`: PEFT configurations, layers, merging, mixed batches
    an adapter at rest              :mod:`randbasis.adapters`: folder, packed file, URL, store entry; put on a model
    data → coefficients             :mod:`randbasis.train`, and the command ``randbasis``

Importing the package registers its methods with PEFT.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from randbasis.basis import Basis, Law, basis_entries, parse_law, stream_of
from randbasis.errors import RandbasisError
from randbasis.methods import METHODS, Method, Nola, Pranc, RandLora, Vera
from randbasis.tuner import (
    NolaConfig,
    PrancConfig,
    RandbasisConfig,
    RandbasisLinear,
    RandbasisModel,
    RandLoraConfig,
    VeraConfig,
)

if TYPE_CHECKING:
    from randbasis.adapters import open_adapter, put

__version__ = "0.1.0.dev0"

__all__ = [
    "METHODS",
    "Basis",
    "Law",
    "Method",
    "Nola",
    "NolaConfig",
    "Pranc",
    "PrancConfig",
    "RandLora",
    "RandLoraConfig",
    "RandbasisConfig",
    "RandbasisError",
    "RandbasisLinear",
    "RandbasisModel",
    "Vera",
    "VeraConfig",
    "basis_entries",
    "open_adapter",
    "parse_law",
    "put",
    "stream_of",
]

_LATER = {"open_adapter": "randbasis.adapters", "put": "randbasis.adapters"}
"""Name → module that is imported when the name is asked for."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)

"""randbasis: a fine-tune of a large model as a seed and a handful of coefficients.

The flow, one line a stage:

    SEED → BASIS                    :mod:`randbasis.basis`: Philox, laws, streams
    BASIS + COEFFICIENTS → FACTORS  :mod:`randbasis.methods`: NOLA, VeRA, RandLoRA, PRANC, over :mod:`randbasis.ops`
    FACTORS → h                     :mod:`randbasis.contraction`: token order or weight order, by cost
    h inside a model                :mod:`randbasis.tuner`: PEFT configurations, layers, merging, mixed batches
    data → coefficients             :mod:`randbasis.train`, and the command ``randbasis``

Importing the package registers its methods with PEFT.
"""

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
    "parse_law",
    "stream_of",
]

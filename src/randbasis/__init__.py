"""randbasis: a fine-tune of a large model as a seed and a handful of coefficients.

The flow, one line a stage:

    SEED → BASIS                    :mod:`randbasis.basis`: Philox, laws, streams
    BASIS + COEFFICIENTS → ΔW       :mod:`randbasis.methods`, one file each, over :mod:`randbasis.ops`
    ΔW → h                          :mod:`randbasis.contraction`: token order or weight order, by cost
    COEFFICIENTS → FILE → STORE     :mod:`randbasis.adapter_file`, :mod:`randbasis.store`, over :mod:`randbasis.files`
    STORE → ONE BATCH               :mod:`randbasis.bank`: rows of one table a kind of adapter, shared products; no PEFT
    h inside a model                :mod:`randbasis.tuner`: PEFT configurations, layers, merging, mixed batches
    an adapter at rest              :mod:`randbasis.adapters`: folder, packed file, URL, store entry; put on a model
    leaving, coming, comparing      :mod:`randbasis.export`, ``importing``, ``arithmetic``, ``hub``
    data → coefficients → answers   :mod:`randbasis.train`, :mod:`randbasis.use`, and the command ``randbasis``

Importing the package registers its methods with PEFT: at once where PEFT is imported, else as soon as it is
(:mod:`randbasis.peft_import`). Nothing heavy is loaded before a name that needs it is asked for.
"""

from typing import TYPE_CHECKING

from randbasis.errors import RandbasisError
from randbasis.lazy import lazy_names
from randbasis.peft_import import register_with_peft

if TYPE_CHECKING:
    from randbasis.adapters import load_packed, open_adapter, put
    from randbasis.bank import AdapterBank
    from randbasis.basis import Basis, basis_entries
    from randbasis.laws import Law, parse_law, stream_of
    from randbasis.methods import METHODS, LoraXs, Method, Nola, Pranc, RandLora, Vera
    from randbasis.tuner import (
        LoraXsConfig,
        NolaConfig,
        PrancConfig,
        RandbasisConfig,
        RandbasisLinear,
        RandbasisModel,
        RandLoraConfig,
        VeraConfig,
    )
    from randbasis.use import load
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "randbasis.adapters": "load_packed open_adapter put",
            "randbasis.bank": "AdapterBank",
            "randbasis.basis": "Basis basis_entries",
            "randbasis.laws": "Law parse_law stream_of",
            "randbasis.methods": "METHODS LoraXs Method Nola Pranc RandLora Vera",
            "randbasis.tuner.config": "LoraXsConfig NolaConfig PrancConfig RandLoraConfig RandbasisConfig VeraConfig",
            "randbasis.tuner.layer": "RandbasisLinear",
            "randbasis.tuner.model": "RandbasisModel",
            "randbasis.use.loading": "load",
        },
    )

__version__ = "0.1.0.dev0"

__all__ = [
    "METHODS",
    "AdapterBank",
    "Basis",
    "Law",
    "LoraXs",
    "LoraXsConfig",
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
    "load",
    "load_packed",
    "open_adapter",
    "parse_law",
    "put",
    "stream_of",
]

register_with_peft()

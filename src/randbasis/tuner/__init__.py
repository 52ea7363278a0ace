"""ΔW INSIDE A MODEL: adapters as PEFT knows them. Importing this registers the methods with PEFT."""

# ruff: noqa: E402  # the names that the imports below rely on are checked first, so that a missing one is named

from randbasis.tuner.host_names import PEFT_NAMES, TRANSFORMERS_NAMES, check_names, name_pair

check_names((*PEFT_NAMES, *TRANSFORMERS_NAMES))
name_pair()

from randbasis.tuner.config import (
    CONFIGS,
    LoraXsConfig,
    NolaConfig,
    PrancConfig,
    RandbasisConfig,
    RandLoraConfig,
    VeraConfig,
    config_class,
)
from randbasis.tuner.layer import RandbasisLinear
from randbasis.tuner.model import RandbasisModel, register

register()

__all__ = [
    "CONFIGS",
    "LoraXsConfig",
    "NolaConfig",
    "PrancConfig",
    "RandLoraConfig",
    "RandbasisConfig",
    "RandbasisLinear",
    "RandbasisModel",
    "VeraConfig",
    "config_class",
]

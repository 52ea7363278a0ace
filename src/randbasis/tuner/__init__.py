"""h inside a model: adapters as PEFT knows them. Importing this registers the methods with PEFT."""

from randbasis.tuner.config import (
    CONFIGS,
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
    "NolaConfig",
    "PrancConfig",
    "RandLoraConfig",
    "RandbasisConfig",
    "RandbasisLinear",
    "RandbasisModel",
    "VeraConfig",
    "config_class",
]

"""DATA → COEFFICIENTS: ``train`` makes a whole run from settings; ``fit`` trains any PEFT configuration."""

from typing import TYPE_CHECKING

from randbasis.lazy import lazy_names

if TYPE_CHECKING:
    from randbasis.train.allotment import allot
    from randbasis.train.causal_lm import CausalLanguage
    from randbasis.train.classification import TextClassification
    from randbasis.train.images import ImageClassification, read_images
    from randbasis.train.loop import FitResult, fit
    from randbasis.train.loop_settings import LoopSettings
    from randbasis.train.method_table import METHOD_NAMES, peft_config
    from randbasis.train.pooled import PooledClassifier
    from randbasis.train.projection import refinement
    from randbasis.train.run import Prepared, TrainOutcome, prepare, train
    from randbasis.train.seed_trials import SeedTrials, try_seeds
    from randbasis.train.settings import (
        AdapterSettings,
        DataSettings,
        GenerationSettings,
        TrainSettings,
    )
    from randbasis.train.tabular import Table, read_table
    from randbasis.train.task import Task
    from randbasis.train.trained_parameters import load_adapter
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "randbasis.train.method_table": "METHOD_NAMES peft_config",
            "randbasis.train.allotment": "allot",
            "randbasis.train.causal_lm": "CausalLanguage",
            "randbasis.train.classification": "TextClassification",
            "randbasis.train.images": "ImageClassification read_images",
            "randbasis.train.loop": "FitResult fit",
            "randbasis.train.loop_settings": "LoopSettings",
            "randbasis.train.pooled": "PooledClassifier",
            "randbasis.train.projection": "refinement",
            "randbasis.train.run": "Prepared TrainOutcome prepare train",
            "randbasis.train.seed_trials": "SeedTrials try_seeds",
            "randbasis.train.settings": "AdapterSettings DataSettings GenerationSettings TrainSettings",
            "randbasis.train.tabular": "Table read_table",
            "randbasis.train.task": "Task",
            "randbasis.train.trained_parameters": "load_adapter",
        },
    )

__all__ = [
    "METHOD_NAMES",
    "AdapterSettings",
    "CausalLanguage",
    "DataSettings",
    "FitResult",
    "GenerationSettings",
    "ImageClassification",
    "LoopSettings",
    "PooledClassifier",
    "Prepared",
    "SeedTrials",
    "Table",
    "Task",
    "TextClassification",
    "TrainOutcome",
    "TrainSettings",
    "allot",
    "fit",
    "load_adapter",
    "peft_config",
    "prepare",
    "read_images",
    "read_table",
    "refinement",
    "train",
    "try_seeds",
]

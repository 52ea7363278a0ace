"""Data to coefficients.

``train`` makes a whole run from settings; ``fit`` trains any PEFT configuration on any model and examples;
``evaluate``, ``predict`` and ``generate`` use what a run left.
"""

from randbasis.train.adapter import METHOD_NAMES, peft_config
from randbasis.train.adapter_folder import load_adapter, read_folder
from randbasis.train.causal_lm import CausalLanguage
from randbasis.train.classification import TextClassification
from randbasis.train.evaluation import Found, UseSettings, evaluate, find, generate, predict, write_lines
from randbasis.train.generation import GenerationSettings
from randbasis.train.images import ImageClassification, read_images
from randbasis.train.loop import FitResult, fit
from randbasis.train.pooled import PooledClassifier
from randbasis.train.run import Prepared, TrainOutcome, prepare, train
from randbasis.train.settings import AdapterSettings, DataSettings, LoopSettings, TrainSettings
from randbasis.train.tabular import Table, read_table
from randbasis.train.task import Task

__all__ = [
    "METHOD_NAMES",
    "AdapterSettings",
    "CausalLanguage",
    "DataSettings",
    "FitResult",
    "Found",
    "GenerationSettings",
    "ImageClassification",
    "LoopSettings",
    "PooledClassifier",
    "Prepared",
    "Table",
    "Task",
    "TextClassification",
    "TrainOutcome",
    "TrainSettings",
    "UseSettings",
    "evaluate",
    "find",
    "fit",
    "generate",
    "load_adapter",
    "peft_config",
    "predict",
    "prepare",
    "read_folder",
    "read_images",
    "read_table",
    "train",
    "write_lines",
]

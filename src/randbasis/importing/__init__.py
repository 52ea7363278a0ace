"""FOREIGN ADAPTERS → OURS, LoRA or a merged model: PEFT's LoRA, VeRA and RandLoRA directories.

A ΔW becomes the nearest NOLA, VeRA or PRANC of a seed, by least squares, and the residual is told. VeRA and RandLoRA
checkpoints that carry their random matrices become LoRA pairs or merged weights.
"""

from randbasis.importing.least_squares import Fit, Stop, nearest
from randbasis.importing.lora_pairs import import_as_lora
from randbasis.importing.merged import import_as_merged
from randbasis.importing.nearest_adapter import ImportedAdapter, ImportedMatrix, import_as_nearest
from randbasis.importing.peft_adapter import PeftAdapter, read_peft_adapter

__all__ = [
    "Fit",
    "ImportedAdapter",
    "ImportedMatrix",
    "PeftAdapter",
    "Stop",
    "import_as_lora",
    "import_as_merged",
    "import_as_nearest",
    "nearest",
    "read_peft_adapter",
]

"""What ``randbasis plan --budget`` says that a step costs, beside the steps that were timed.

``plan`` counts multiply-adds above those of the adapted layers. Here they are set beside all of a model's: its linear
layers, its head, and attention. What else a step does (norms, activations, the loss, memory, calls) is not counted.
"""

import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from benchmarks.adapters import FLOOR, Adapter
from benchmarks.bases import LENGTH, RANDOM_WEIGHTS, Base
from benchmarks.rows import Run
from benchmarks.training_step import usual_bases
from randbasis.adapters.budget import lora_step_cost, step_cost
from randbasis.adapters.plan import AdaptedBase, adapted_base
from randbasis.tuner.config import RandbasisConfig

HEADS = ("model", "tokens", "adapter", "counted, × LoRA r=1", "timed, × LoRA r=1", "p20–p80")


def lines(runs: Sequence[Run]) -> Iterator[list[str]]:
    """A line for each side of a timed step that ``plan`` tells of.

    Args:
        runs: of any family.
    """
    for run in runs:
        base = _bases().get(str(run.parameters.get("model"))) if run.family == "step" else None
        if base is None:
            continue
        tokens = int(run.parameters["tokens"])
        floor = counted(base, FLOOR, tokens)
        for row in run.rows:
            side = row["side"]
            if side == FLOOR or not is_planned(side):
                continue
            ratio, low, high = (f"{float(row[name]):.2f}" for name in ("ratio", "ratio_p20", "ratio_p80"))
            predicted = f"{counted(base, side, tokens) / floor:.2f}"
            yield [str(run.parameters["model"]), f"{tokens:,}", side, predicted, ratio, f"{low}–{high}"]


@cache
def _bases() -> dict[str, Base]:
    """By name, of random weights: shapes are all that is counted."""
    return {base.name.removesuffix(RANDOM_WEIGHTS): base for base in usual_bases(real=False)}


def is_planned(side: str) -> bool:
    """Whether ``plan`` tells of it: a method of this package, or PEFT's LoRA."""
    adapter = Adapter.named(side)
    return adapter.is_ours or adapter.kind == "PEFT LoRA"


@cache
def counted(base: Base, side: str, tokens: int) -> float:
    """Multiply-adds of a training step.

    Args:
        base: the model.
        side: name of the adapter.
        tokens: in all rows of the batch.
    """
    planned, whole = _looked_at(base)
    adapter = Adapter.named(side)
    config = adapter.config(base)
    if isinstance(config, RandbasisConfig):
        share = step_cost(planned.bounds(config), tokens)
    else:
        share = lora_step_cost(planned, adapter.r)
    own = 2 * tokens * planned.entries
    return tokens * whole + share * own


@cache
def _looked_at(base: Base) -> tuple[AdaptedBase, float]:
    """What is adapted, and the multiply-adds of a token without an adapter: forward, and the gradient of the input."""
    with torch.device("meta"):
        model = base.make(base.layers, base.vocabulary)
    config = cast("Any", model).config
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        planned = adapted_base(folder, base.targets if isinstance(base.targets, str) else list(base.targets))
    linear: list[Any] = [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]
    layers = sum(one.weight.numel() for one in linear)
    attention = 2 * LENGTH * config.hidden_size * config.num_hidden_layers  # scores and their sums, of each token
    return planned, 2.0 * layers + 3.0 * attention  # both operands of attention have gradients

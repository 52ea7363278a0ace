"""One training step of a whole model of the 7B shape on a GPU, 2 to 32 layers, with and without checkpointing.

What is done once a step for all layers, and not once a layer, shows here alone: the ratio of a single layer says
nothing of it. The base has random weights in bfloat16; the rest is as in :mod:`benchmarks.gpu_step`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from torch import nn

from benchmarks import bases
from benchmarks.adapters import put
from benchmarks.bases import Base
from benchmarks.case import Built, Case, Side
from benchmarks.gpu import device, wall_seconds
from benchmarks.gpu_step import batch_of, check_kernels, frozen_model, llama, step_of

SIDES = ("PEFT LoRA r=16", "NOLA r=16 k=128", "VeRA r=256", "RandLoRA r=32")
SIZES = ((2, 4096, False), (8, 4096, False), (8, 4096, True), (8, 16384, False), (32, 4096, True))
"""Layers, tokens, and whether layers are run again for the backward pass."""


def cases(*, tiny: bool = False, everything: bool = False) -> Iterator[Case]:
    """From 2 to 32 layers at 4,096 tokens, and 8 layers at 16,384."""
    del everything
    for layers, tokens, checkpointing in ((2, 32, False), (2, 32, True)) if tiny else SIZES:
        base = llama(layers, 64, 160) if tiny else llama(layers, 4096, 11008)
        sides = SIDES[:2] if tiny else SIDES
        yield Case(
            family="gpu model",
            name=f"step of {base.name}, {tokens:,} tokens" + (", checkpointing" if checkpointing else ""),
            sides=sides,
            build=partial(_build, base, tokens, checkpointing),
            parameters={"model": base.name, "layers": layers, "tokens": tokens, "checkpointing": str(checkpointing)},
            work=tokens,
            unit="tokens/s",
            measure=wall_seconds,
            seconds=8,
            device=str(device()),
        )


def _build(base: Base, tokens: int, checkpointing: bool, sides: Sequence[str]) -> Built:
    frozen, batch = frozen_model(base), batch_of(base, tokens)
    models = {name: put(name, bases.twin(frozen), base) for name in sides}
    if checkpointing:
        for model in models.values():
            _checkpoint(model)
    made = {name: Side(step_of(model, batch)) for name, model in models.items()}
    return Built(made, partial(check_kernels, replace(base, layers=1), sides))


def _checkpoint(model: nn.Module) -> None:
    options = {"use_reentrant": False}
    cast("Any", model).get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

"""One training step (forward, backward, AdamW) under every method of ours, under PEFT's, and under NOLA as published.

The base is frozen, in float32, without dropout, the same tensors for all sides. All sides use torch's fused AdamW.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks import bases
from benchmarks.adapters import FLOOR, put
from benchmarks.bases import Base
from benchmarks.case import Built, Case, Side
from benchmarks.reference_run import check_training

SIDES = (
    *(FLOOR, "PEFT LoRA r=4", "PEFT LoRA r=8", "PEFT LoRA r=16"),
    *("NOLA r=8 k=64", "NOLA r=8 k=256", "NOLA r=8 k=1000", "NOLA r=8 k=256 unique"),
    *("published NOLA r=8 k=64", "published NOLA r=8 k=1000"),
    *("VeRA r=256", "PEFT VeRA r=256", "VeRA r=1024", "PEFT VeRA r=1024"),
    *("RandLoRA r=32", "PEFT RandLoRA r=32"),
)
FEW = (
    *(FLOOR, "PEFT LoRA r=8", "PEFT LoRA r=16", "NOLA r=8 k=64", "NOLA r=8 k=256"),
    *("VeRA r=256", "PEFT VeRA r=256", "RandLoRA r=32", "PEFT RandLoRA r=32"),
)
FEWER = (FLOOR, "PEFT LoRA r=8", "NOLA r=8 k=256", "RandLoRA r=32", "PEFT RandLoRA r=32")
TOKENS = (512, 2048, 8192)
FEW_WORDS = 8192
"""Vocabulary of the model for the longest batch: a large head adds the same to all sides, and its noise."""


def cases(*, tiny: bool = False, everything: bool = False) -> Iterator[Case]:
    """Steps of every base at every size.

    Args:
        tiny: at sizes that say nothing about speed.
        everything: all sides everywhere, and every size.
    """
    if tiny:
        yield case(bases.gpt2(2, 64, 512), 64, SIDES)
        yield case(bases.llama(2, 64, 512), 64, FEW)
        return
    small, few_words, large, llama, minilm = usual_bases()
    usual: dict[tuple[str, int], tuple[tuple[str, ...], float]] = {
        (small.name, 512): (SIDES, 60),
        (small.name, 2048): (SIDES, 240),
        (few_words.name, 8192): (FEWER, 150),
        (large.name, 2048): (FEWER, 120),
        (llama.name, 2048): (FEW, 60),
        (minilm.name, 2048): (FEW, 40),
    }
    for base in (small, few_words, large, llama, minilm):
        for tokens in TOKENS:
            sides, seconds = usual.get((base.name, tokens), (SIDES, 120))
            is_usual = (base.name, tokens) in usual
            yield case(base, tokens, SIDES if everything else sides, usual=is_usual, seconds=seconds)


def usual_bases(*, real: bool = True) -> tuple[Base, Base, Base, Base, Base]:
    """The models whose steps are timed.

    Args:
        real: with pretrained weights where there are any.
    """
    return (
        bases.gpt2(6, 512),
        bases.gpt2(6, 512, FEW_WORDS),
        bases.gpt2(12, 768),
        bases.llama(6, 512),
        bases.minilm(real=real),
    )


def case(base: Base, tokens: int, sides: Sequence[str], **options: Any) -> Case:
    """One step of a base at a size.

    Args:
        base: the model.
        tokens: in all rows of the batch.
        sides: names of adapters.
        options: more of the case.
    """
    return Case(
        family="step",
        name=f"step of {base.name}, {tokens:,} tokens",
        sides=tuple(sides),
        build=partial(build, base, tokens),
        parameters={"model": base.name, "tokens": tokens},
        work=tokens,
        unit="tokens/s",
        **options,
    )


def build(base: Base, tokens: int, sides: Sequence[str]) -> Built:
    """Models of all sides around the same frozen tensors."""
    frozen, batch = base.model(), base.batch(tokens)
    steps = {name: Side(step(put(name, bases.twin(frozen), base), batch)) for name in sides}
    return Built(steps, lambda: check_training(base, sides, tokens))


def step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    """A call that trains a model by one step."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def call() -> None:
        optimizer.zero_grad()
        cast("Any", model)(**batch).loss.backward()
        optimizer.step()

    return call

"""One training step (forward, backward, AdamW) of layers of the 7B shape on a GPU, base in bfloat16, and its memory.

Under autocast to bfloat16, as a trainer runs it: else PEFT's LoRA would multiply in the float32 of its coefficients,
and ours in bfloat16. Whole layers, so that attention and norms take their share; a small vocabulary, because a large
head adds the same to all sides. Memory is the most that tensors took on the device in two steps, with the base and all
that the side keeps.
"""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import bases
from benchmarks.adapters import FLOOR, Adapter, put
from benchmarks.bases import Base
from benchmarks.case import Built, Case, CheckFailed, Side
from benchmarks.gpu import device, peak_megabytes, wall_seconds
from benchmarks.reference_run import plain_torch
from randbasis.ops.backends import ENVIRONMENT

SIDES = (
    *(FLOOR, "PEFT LoRA r=16", "NOLA r=16 k=128", "NOLA r=16 k=512", "NOLA r=16 k=128 unique"),
    *("VeRA r=256", "PEFT VeRA r=256", "RandLoRA r=32", "PEFT RandLoRA r=32"),
)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LENGTH = 2048
LOSS, GRADIENT = 1e-4, 1e-3
"""Largest relative differences allowed between kernels and reference, both in float32."""


def cases(*, tiny: bool = False, everything: bool = False) -> Iterator[Case]:
    """Steps at 4,096 and 16,384 tokens, then their memory."""
    base = llama(1, 64, 160) if tiny else llama(2 if everything else 1, 4096, 11008)
    tokens = (32,) if tiny else (4096, 16384)
    sides = (FLOOR, "NOLA r=16 k=128", "RandLoRA r=32") if tiny else SIDES
    for count in tokens:
        yield _case("gpu step", base, count, sides, _build, measure=wall_seconds, seconds=12)
    for count in tokens:
        options = {"measure": _value, "quantity": "MB", "rounds": 1, "warms_up": False}
        yield _case("gpu memory", base, count, sides, _build_memory, **options)


def _case(family: str, base: Base, tokens: int, sides: Sequence[str], build: Any, **options: Any) -> Case:
    is_step = family == "gpu step"
    return Case(
        family=family,
        name=f"{'step' if is_step else 'memory of a step'} of {base.name}, {tokens:,} tokens",
        sides=tuple(sides),
        build=partial(build, base, tokens),
        parameters={"model": base.name, "tokens": tokens},
        work=tokens if is_step else 1.0,
        unit="tokens/s" if is_step else "",
        device=str(device()),
        **options,
    )


def llama(layers: int, width: int, inner: int) -> Base:
    return Base(f"Llama {layers}×{width}, bfloat16", partial(_model, width, inner), layers, 1024, TARGETS)


def _model(width: int, inner: int, layers: int, vocabulary: int) -> nn.Module:
    heads = max(2, width // 128)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
    )
    with torch.device(device()):
        return LlamaForCausalLM(config)


def frozen_model(base: Base, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return base.model().to(device(), dtype)


def batch_of(base: Base, tokens: int) -> dict[str, Tensor]:
    return {name: value.to(device()) for name, value in base.batch(tokens, length=LENGTH).items()}


def _build(base: Base, tokens: int, sides: Sequence[str]) -> Built:
    frozen, batch = frozen_model(base), batch_of(base, tokens)
    steps = {name: Side(step_of(put(name, bases.twin(frozen), base), batch)) for name in sides}
    return Built(steps, partial(check_kernels, base, sides))


def _build_memory(base: Base, tokens: int, sides: Sequence[str]) -> Built:
    peaks = {name: Side(partial(_peak, name, base, tokens)) for name in sides}
    return Built(peaks, partial(check_kernels, base, sides))


def step_of(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def call() -> None:
        optimizer.zero_grad()
        with torch.autocast(device().type, torch.bfloat16):
            loss = cast("Any", model)(**batch).loss
        loss.backward()
        optimizer.step()

    return call


def _value(call: Callable[[], object]) -> float:
    return float(str(call()))


def _peak(name: str, base: Base, tokens: int) -> float:
    """Peak of two steps of a model that is made for this and let go."""

    def run() -> None:
        call = step_of(put(name, frozen_model(base), base), batch_of(base, tokens))
        call()
        call()

    gc.collect()
    peak = peak_megabytes(run)
    gc.collect()
    return peak


def check_kernels(base: Base, sides: Sequence[str]) -> str:
    """Loss and gradients of the adapters of ours by kernels and by the torch reference, both in float32, few tokens."""
    batch = batch_of(base, 64)
    frozen = frozen_model(base, torch.float32)
    worst: dict[str, float] = {"loss": 0.0, "gradient": 0.0}
    for name in sides:
        if not Adapter.named(name).is_ours:
            continue
        model = put(name, bases.twin(frozen), base, started=True).train()
        own = _loss_and_gradients(model, batch)
        with plain_torch():
            wanted = _loss_and_gradients(model, batch)
        for what, limit, got, expected in zip(("loss", "gradient"), (LOSS, GRADIENT), own, wanted, strict=True):
            error = float((got - expected).norm() / expected.norm())
            if not error <= limit:
                raise CheckFailed(f"{name}: {what} differs from the reference by {error:.1e}, allowed {limit:.0e}")
            worst[what] = max(worst[what], error)
    backend = os.environ.get(ENVIRONMENT, "auto")
    return f"torch reference ({backend}): " + ", ".join(f"{what} within {error:.1e}" for what, error in worst.items())


def _loss_and_gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    loss = cast("Any", model)(**batch).loss
    loss.backward()
    gradients = [p.grad.detach().reshape(-1).double() for p in model.parameters() if p.grad is not None]
    return loss.detach().double(), torch.cat(gradients)

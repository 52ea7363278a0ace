"""What a small layer pays before any arithmetic: a pass of 64 tokens through 64 × 64, many times in a row."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import peft
import torch
from torch import Tensor, nn

from benchmarks.case import Built, Case, CheckFailed, Side
from randbasis import NolaConfig, PrancConfig, RandLoraConfig, VeraConfig

LORA = "PEFT LoRA r=8"
CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    LORA: lambda: peft.LoraConfig(r=8, target_modules=["0"], init_lora_weights=False),
    "NOLA r=8 k=64": lambda: NolaConfig(r=8, num_basis=64, alpha=8.0, target_modules=["0"], init_weights=False),
    "VeRA r=64": lambda: VeraConfig(r=64, target_modules=["0"], init_weights=False),
    "RandLoRA r=8": lambda: RandLoraConfig(r=8, target_modules=["0"], init_weights=False),
    "PRANC k=64": lambda: PrancConfig(num_basis=64, target_modules=["0"], init_weights=False),
}
WIDTH = TOKENS = 64
PASSES = 200
FORWARD, STEP = "forward", "forward and back"
TOLERANCE = 1e-4


def cases(*, tiny: bool = False, everything: bool = False) -> Iterator[Case]:
    """A forward pass in training, and one with the way back.

    Args:
        tiny: few passes, which say nothing about speed.
        everything: no more cases.
    """
    del everything
    passes = 2 if tiny else PASSES
    for what in (FORWARD, STEP):
        yield Case(
            family="host",
            name=f"{passes} × {what} of one layer of {WIDTH}×{WIDTH}, {TOKENS} tokens",
            sides=tuple(CONFIGS),
            build=partial(_build, what, passes),
            parameters={"what": what, "tokens": TOKENS},
            seconds=15,
        )


def _build(what: str, passes: int, sides: Sequence[str]) -> Built:
    drawn = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDTH, WIDTH, generator=drawn) / WIDTH**0.5
    x = torch.randn(TOKENS, WIDTH, generator=drawn).requires_grad_()
    gradient = torch.randn(TOKENS, WIDTH, generator=drawn)
    layers = {name: _adapted(name, weight) for name in sides}

    def forward(layer: nn.Module) -> None:
        for _ in range(passes):
            layer(x)

    def step(layer: nn.Module) -> None:
        for _ in range(passes):
            layer(x).backward(gradient)

    run = forward if what == FORWARD else step
    return Built({name: Side(partial(run, layer)) for name, layer in layers.items()}, partial(_check, layers, x))


def _adapted(name: str, weight: Tensor) -> nn.Module:
    """The layer by itself, in training: no model around it takes time."""
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    base[0].load_state_dict({"weight": weight, "bias": torch.zeros(WIDTH)})
    model = peft.get_peft_model(cast("Any", base), CONFIGS[name]())
    return model.train().get_base_model().get_submodule("0")


def _check(layers: dict[str, nn.Module], x: Tensor) -> str:
    """Each side against its own ΔW, formed by itself and added in float64."""
    worst = 0.0
    for name, layer in layers.items():
        there = cast("Any", layer)
        total = there.get_base_layer().weight.double() + there.get_delta_weight("default").double()
        wanted = x.double() @ total.T
        worst = max(worst, float((layer(x).double() - wanted).abs().max() / wanted.abs().max()))
        if not worst <= TOLERANCE:
            raise CheckFailed(f"{name} is off by {worst:.1e} of the largest value, allowed is {TOLERANCE:.0e}")
    return f"W0 + ΔW in float64: within {worst:.1e}"

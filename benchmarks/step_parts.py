"""What a training step of RandLoRA is made of: the products of one layer by themselves, and both orders as a whole."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.case import Built, Case, CheckFailed, Side
from randbasis.contraction import fused_weight_order, token_order
from randbasis.methods import Matrix, RandLora

SHAPES = ((1536, 512), (2048, 512), (3072, 768))
TOKENS = (2048, 8192)
SIDES = (
    "the frozen layer, forward and back",
    "forming ΔW",
    "gradient of ΔW",
    "gradient of λ and γ from it",
    "the layer in weight order",
    "the layer in token order",
)
TOLERANCE = 1e-4


def cases(*, tiny: bool = False, everything: bool = False) -> Iterator[Case]:
    """Layers of ``out × in`` of the models of the training step.

    Args:
        tiny: at sizes that say nothing about speed.
        everything: no more cases.
    """
    del everything
    for out, in_ in ((48, 32),) if tiny else SHAPES:
        for tokens in (16,) if tiny else TOKENS:
            yield Case(
                family="parts",
                name=f"RandLoRA r=32 on one layer of {out}×{in_}, {tokens:,} tokens",
                sides=SIDES,
                build=partial(build, out, in_, tokens),
                parameters={"out": out, "in": in_, "tokens": tokens},
                seconds=10,
            )


@dataclass(frozen=True)
class _Layer:
    """One layer, its input and the gradient of its output."""

    method: RandLora
    matrix: Matrix
    weight: Tensor
    x: Tensor
    gradient: Tensor
    coefficients: dict[str, Tensor]

    @classmethod
    def of(cls, out: int, in_: int, tokens: int) -> "_Layer":
        drawn = torch.Generator().manual_seed(0)
        method = RandLora(r=32)
        shapes = method.coefficient_shapes(out, in_)
        return cls(
            method,
            Matrix(out, in_, method.streams()),
            torch.randn(out, in_, generator=drawn) / in_**0.5,
            torch.randn(tokens, in_, generator=drawn).requires_grad_(),
            torch.randn(tokens, out, generator=drawn),
            {name: torch.randn(shape, generator=drawn).mul_(0.01).requires_grad_() for name, shape in shapes.items()},
        )

    def by_weight(self) -> list[Tensor]:
        delta = self.method.delta(self.coefficients, self.matrix)
        return self._results(fused_weight_order(self.x, self.weight, None, delta))

    def by_token(self) -> list[Tensor]:
        prepared = self.method.prepare(self.coefficients, self.matrix)
        change = token_order(self.x, prepared, self.method, self.matrix)
        return self._results(functional.linear(self.x, self.weight) + change)

    def frozen(self) -> None:
        h = functional.linear(self.x, self.weight)
        torch.autograd.grad(h, [self.x], self.gradient)

    def _results(self, h: Tensor) -> list[Tensor]:
        wanted = [self.x, *self.coefficients.values()]
        return [h.detach(), *torch.autograd.grad(h, wanted, self.gradient)]


def build(out: int, in_: int, tokens: int, sides: Sequence[str]) -> Built:
    """The parts of one layer, and the whole in both orders."""
    layer = _Layer.of(out, in_, tokens)
    held = layer.method.hold(layer.matrix)
    formed = layer.method.delta(layer.coefficients, layer.matrix)
    of_delta = (layer.x.detach().T @ layer.gradient).T
    coefficients = list(layer.coefficients.values())

    def form() -> Tensor:
        with torch.no_grad():
            return layer.method.delta(layer.coefficients, layer.matrix)

    calls: dict[str, Callable[[], object]] = {
        SIDES[0]: layer.frozen,
        SIDES[1]: form,
        SIDES[2]: lambda: (layer.x.detach().T @ layer.gradient).T,
        SIDES[3]: lambda: torch.autograd.grad(formed, coefficients, of_delta, retain_graph=True),
        SIDES[4]: layer.by_weight,
        SIDES[5]: layer.by_token,
    }

    def check() -> str:
        pairs = zip(layer.by_weight(), layer.by_token(), strict=True)
        worst = max(float((one - two).abs().max() / two.abs().max()) for one, two in pairs)
        if not held or not worst <= TOLERANCE:
            raise CheckFailed(f"the two orders differ by {worst:.1e} of the largest value, allowed is {TOLERANCE:.0e}")
        return f"both orders within {worst:.1e}"

    return Built({name: Side(calls[name]) for name in sides}, check)

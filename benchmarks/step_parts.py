"""What a training step of RandLoRA is made of: the products of one layer by themselves, and both orders as a whole."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.case import Built, Case, CheckFailed, Side
from randbasis.contraction import fused_weight_order
from randbasis.methods import Delta, RandLora, Site

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

    delta: Delta
    weight: Tensor
    x: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, out: int, in_: int, tokens: int) -> "_Layer":
        drawn = torch.Generator().manual_seed(0)
        method = RandLora(r=32)
        shapes = method.coefficient_shapes(out, in_)
        weight = torch.randn(out, in_, generator=drawn) / in_**0.5
        x, gradient = (torch.randn(tokens, width, generator=drawn) for width in (in_, out))
        coefficients = {
            name: torch.randn(shape, generator=drawn).mul_(0.01).requires_grad_() for name, shape in shapes.items()
        }
        return cls(
            method.bind(Site(out, in_, method.streams())).delta(coefficients),
            weight,
            x.requires_grad_(),
            gradient,
        )

    def by_weight(self) -> list[Tensor]:
        return self._results(fused_weight_order(self.x, self.weight, None, self.delta.matrix()))

    def by_token(self) -> list[Tensor]:
        return self._results(functional.linear(self.x, self.weight) + self.delta.apply(self.x))

    def frozen(self) -> None:
        h = functional.linear(self.x, self.weight)
        torch.autograd.grad(h, [self.x], self.gradient)

    def _results(self, h: Tensor) -> list[Tensor]:
        wanted = [self.x, *self.delta.coefficients.values()]
        return [h.detach(), *torch.autograd.grad(h, wanted, self.gradient)]


def build(out: int, in_: int, tokens: int, sides: Sequence[str]) -> Built:
    """The parts of one layer, and the whole in both orders."""
    layer = _Layer.of(out, in_, tokens)
    formed = layer.delta.matrix()
    of_delta = (layer.x.detach().T @ layer.gradient).T
    coefficients = list(layer.delta.coefficients.values())

    def form() -> Tensor:
        with torch.no_grad():
            return layer.delta.matrix()

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
        if not worst <= TOLERANCE:
            raise CheckFailed(f"the two orders differ by {worst:.1e} of the largest value, allowed is {TOLERANCE:.0e}")
        return f"both orders within {worst:.1e}"

    return Built({name: Side(calls[name]) for name in sides}, check)

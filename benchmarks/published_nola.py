"""NOLA as its authors released it for language models: every basis is drawn anew in each forward and backward pass.

Written from a description of that algorithm, as the side to be measured against. A factor is
``W = W⁰ + (1/√k) Σᵢ cᵢ Uᵢ``, the ``Uᵢ`` drawn from U(−1, 1) by the framework's own generator from a seed of the factor:
the pass draws a fresh seed, sets the factor's, draws all k matrices, scales them, contracts them with the
coefficients, and sets the fresh seed. The backward pass draws them again. It moves torch's global random state, as
the released code does.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

ALPHA = 8.0
STARTED = 0.1
"""Standard deviation of coefficients that do not start at 0."""
_FRESH = 10**10


def draw(seed: int, count: int, out_features: int, in_features: int, like: Tensor) -> Tensor:
    """The scaled basis of a factor, ``[count, out, in]``; the global generator goes on from a fresh seed."""
    fresh = int(torch.randint(_FRESH, ()))
    torch.manual_seed(seed)
    basis = torch.zeros(count, out_features, in_features, device=like.device, dtype=like.dtype)
    basis.uniform_(-1, 1)
    basis *= 1 / math.sqrt(count)
    torch.manual_seed(fresh)
    return basis


class _Combine(torch.autograd.Function):
    """Σᵢ cᵢ Uᵢ, keeping the coefficients and the seed alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, seed: int, out_features: int, in_features: int) -> Tensor:
        ctx.save_for_backward(coefficients)
        ctx.drawn = (seed, coefficients.numel(), out_features, in_features)
        return torch.einsum("b,boi->oi", coefficients, draw(*ctx.drawn, coefficients))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (coefficients,) = ctx.saved_tensors
        basis = draw(*ctx.drawn, coefficients).permute(1, 2, 0).reshape(-1, coefficients.numel())
        return torch.einsum("d,dl->l", gradients[0].reshape(-1), basis), None, None, None


class PublishedFactor(nn.Module):
    """One factor: a frozen offset plus a combination of random matrices.

    Args:
        in_features: of the factor.
        out_features: of the factor.
        count: ``k``.
        seed: of its basis.
        offset: the frozen ``W⁰``.
        start: what its coefficients start at.
    """

    def __init__(
        self, in_features: int, out_features: int, count: int, seed: int, offset: Tensor, start: Tensor
    ) -> None:
        super().__init__()
        self.shape = (out_features, in_features)
        self.seed, self.count = seed, count
        self.register_buffer("offset", offset, persistent=False)
        self.coefficients = nn.Parameter(start)

    def weight(self) -> Tensor:
        """``W``, ``[out, in]``."""
        return cast("Tensor", self.offset) + _Combine.apply(self.coefficients, self.seed, *self.shape)

    def reference(self, coefficients: Tensor) -> Tensor:
        """``W`` by plain products in the dtype of some coefficients."""
        basis = draw(self.seed, self.count, *self.shape, cast("Tensor", self.offset)).to(coefficients.dtype)
        return cast("Tensor", self.offset).to(coefficients.dtype) + torch.tensordot(coefficients, basis, 1)


class PublishedNolaLinear(nn.Module):
    """``y = W x + (alpha / r) W_B W_A x`` around a frozen layer.

    Args:
        base_layer: linear, or transformers' Conv1D.
        rank: ``r``.
        count: ``k``.
        seed: of its two bases and of its offset.
        started: random coefficients instead of 0.
    """

    def __init__(self, base_layer: nn.Module, rank: int, count: int, seed: int, *, started: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        weight = cast("Tensor", base_layer.weight)
        out, in_ = weight.shape[::-1] if isinstance(base_layer, Conv1D) else weight.shape
        generator = torch.Generator().manual_seed(seed)
        offset = (2 * torch.rand(rank, in_, generator=generator) - 1) / math.sqrt(in_)
        starts = STARTED * float(started) * torch.randn(2, count, generator=generator)
        self.lora_A = PublishedFactor(in_, rank, count, 2 * seed, offset, starts[0])
        self.lora_B = PublishedFactor(rank, out, count, 2 * seed + 1, torch.zeros(out, rank), starts[1])
        self.scale = ALPHA / rank

    def forward(self, x: Tensor) -> Tensor:
        """As a LoRA layer's."""
        change = functional.linear(functional.linear(x, self.lora_A.weight()), self.lora_B.weight())
        return self.base_layer(x) + self.scale * change


def put_published_nola(
    model: nn.Module, matches: Callable[[str], bool], *, rank: int, count: int, started: bool = False
) -> nn.Module:
    """Replace the matching layers of a model, each with seeds of its own.

    Args:
        model: it is changed, and frozen but for the coefficients.
        matches: says by its path whether a layer is adapted.
        rank: ``r``.
        count: ``k``.
        started: random coefficients instead of 0.
    """
    model.requires_grad_(False)
    for number, path in enumerate([path for path, _ in model.named_modules() if matches(path)]):
        parent, _, name = path.rpartition(".")
        layer = model.get_submodule(path)
        setattr(model.get_submodule(parent), name, PublishedNolaLinear(layer, rank, count, number + 1, started=started))
    return model

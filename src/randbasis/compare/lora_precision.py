"""A LoRA that is trained at few bits, as NOLA and its kin are by their own option ``quantize_coefficients``.

PEFT's LoRA has no such option; its A and B are given the same straight-through estimator as a parametrization of torch
for the length of a run.
"""

from collections.abc import Iterator

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from randbasis.tuner.coefficients import straight_through


class StraightThrough(nn.Module):
    """The parametrization of a matrix by math (11), one scale a vector, straight through.

    Args:
        bits: 8, 4, 3 or 2.
        dim: that the vectors are counted along: 0 for the rows of A, 1 for the columns of B.
    """

    def __init__(self, bits: int, dim: int) -> None:
        super().__init__()
        self.bits = bits
        self.dim = dim

    def forward(self, values: Tensor) -> Tensor:
        """The values of so many bits."""
        return torch.stack([straight_through(one, self.bits) for one in values.unbind(self.dim)], self.dim)


def train_at_bits(model: nn.Module, bits: int) -> None:
    """Let A and B of every LoRA layer of a model compute with so many bits, and train in full precision."""
    for module, dim in _pairs(model):
        parametrize.register_parametrization(module, "weight", StraightThrough(bits, dim))


def settle(model: nn.Module) -> None:
    """End what :func:`train_at_bits` began: the weights are the quantized ones."""
    for module, _ in _pairs(model):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def _pairs(model: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            yield module.lora_A["default"], 0
            yield module.lora_B["default"], 1

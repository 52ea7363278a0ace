"""Coefficients of few bits in the runs of a study: in training, and of what was trained.

NOLA and its kin are trained at few bits by their own option ``quantize_coefficients``. PEFT's LoRA has none; here its A
and B are given the same straight-through estimator as a parametrization of torch for the length of a run.
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from randbasis.adapters.quantization import quantize_tensors
from randbasis.train.trainer import parameter_groups
from randbasis.tuner.coefficients import straight_through


class StraightThrough(nn.Module):
    """The parametrization of a tensor by math (11), one scale for all of it, straight through.

    Args:
        bits: 8, 4, 3 or 2.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, values: Tensor) -> Tensor:
        """The values of so many bits."""
        return straight_through(values, self.bits)


def quantize_lora(model: nn.Module, bits: int) -> None:
    """Let A and B of every LoRA layer of a model compute with so many bits, and train in full precision."""
    for module in _pairs(model):
        parametrize.register_parametrization(module, "weight", StraightThrough(bits))


def settle_lora(model: nn.Module) -> None:
    """End what :func:`quantize_lora` began: the weights are the quantized ones."""
    for module in _pairs(model):
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


@contextmanager
def quantized(model: nn.Module, bits: int) -> Generator[None]:
    """The coefficients of the trained adapter at so many bits within the block, one scale a tensor."""
    parameters = parameter_groups(model)["adapter"]
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    _set(parameters, quantize_tensors(kept, bits))
    try:
        yield
    finally:
        _set(parameters, kept)


@torch.no_grad()
def _set(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _pairs(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            yield from (module.lora_A["default"], module.lora_B["default"])

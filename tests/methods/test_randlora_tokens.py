"""RandLoRA in token order: by scaled copies of the tokens where they are few, by its factors where they are many."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from randbasis.methods import RandLora, Site

SHAPES = [(48, 32), (32, 48), (40, 40)]
RANK = 4


class Largest(TorchDispatchMode):
    """The most numbers of one tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.untyped_storage().nbytes() // out.element_size())
        return out


def drawn(shape: tuple[int, int]) -> tuple[object, dict[str, Tensor]]:
    method = RandLora(r=RANK, seed=3)
    generator = torch.Generator().manual_seed(1)
    shapes = method.coefficient_shapes(*shape)
    coefficients = {name: torch.randn(one, generator=generator, dtype=torch.float64) for name, one in shapes.items()}
    coefficients["randlora_gamma"] = coefficients["randlora_gamma"] / max(shape)
    return method.bind(Site(*shape, method.streams())), coefficients


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, RANK, RANK + 1, 64])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)], ids=str
)
def test_both_ways_are_the_product_with_the_matrix(shape, tokens: int, dtype: torch.dtype, tolerance: float):
    bound, coefficients = drawn(shape)
    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = x @ bound.matrix(coefficients).T
    leaves = {name: one.to(dtype).requires_grad_() for name, one in coefficients.items()}
    found = bound.apply(x.to(dtype)[None], {name: one[None] for name, one in leaves.items()})[0]
    assert found.dtype == dtype
    assert float((found.detach().double() - wanted).abs().max() / wanted.abs().max()) <= tolerance
    gradients = torch.autograd.grad(found.sum(), list(leaves.values()))
    exact = {name: one.clone().requires_grad_() for name, one in coefficients.items()}
    expected = torch.autograd.grad((x @ bound.matrix(exact).T).sum(), list(exact.values()))
    for one, other in zip(gradients, expected, strict=True):
        assert float((one.double() - other).abs().max() / other.abs().max()) <= 4 * tolerance


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_many_tokens_are_not_copied_for_each_term(shape: tuple[int, int]):
    bound, coefficients = drawn(shape)
    x = torch.zeros(1, 512, shape[1], dtype=torch.float64)
    with Largest() as watched:
        bound.apply(x, {name: one[None] for name, one in coefficients.items()})
    assert watched.numbers == 512 * max(shape)

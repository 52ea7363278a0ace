"""What the tests of all fast paths share."""

from typing import Any

import pytest
import torch
from torch import Tensor

from randbasis.ops import backends, cpu, triton


class PoisoningTorch:
    """torch, but fresh memory holds NaN, or a large integer.

    It stands in for torch in the modules under test alone: torch itself remembers its constructors, and a model made on
    the meta device later on would miss the real one.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: Any, **options: Any) -> Tensor:
        out = torch.empty(*shape, **options)
        return out.fill_(float("nan") if out.is_floating_point() else 0x5EADBEEF)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that a kernel leaves out cannot look right."""
    for module in (backends, cpu, triton):
        monkeypatch.setattr(module, "torch", PoisoningTorch())
        assert bool(module.torch.empty(2).isnan().all())

"""Adapters put on a model that is on a GPU: nothing but the host works, and each coefficient is copied."""

from collections.abc import Iterator

from benchmarks import adding
from benchmarks.adding import ADD, SWITCH
from benchmarks.case import Case
from benchmarks.gpu import device

ADAPTERS = 16
"""Half of what is put on elsewhere: PEFT's LoRA takes four times as long for twice as many."""


def cases(*, tiny: bool = False, everything: bool = False) -> Iterator[Case]:
    """Put on and switched to, beside PEFT's LoRA."""
    del everything
    for what in (ADD, SWITCH):
        yield adding.case_on(device(), "gpu add", what, 3 if tiny else ADAPTERS, tiny=tiny)

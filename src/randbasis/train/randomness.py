"""Third parties draw from the process-wide generators; here that is confined to a block."""

import random
import threading
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch

_ALONE = threading.RLock()
"""Two blocks at once would draw from one stream, and put back each other's states."""


@contextmanager
def confined_randomness(seed: int) -> Generator[None]:
    """Seed every process-wide generator inside the block and put each back as it was after it.

    Head initialisation, dropout and sampling of transformers use these generators; the caller's streams stay as they
    were. Threads wait for each other here.

    Args:
        seed: below 2**32.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with _ALONE, torch.random.fork_rng(devices=devices):
        python_state, numpy_state = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)

"""Third parties draw from the process-wide generators; here that is confined to a block."""

import random
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def confined_randomness(seed: int) -> Generator[None]:
    """Seed every process-wide generator inside the block and put each back as it was after it.

    Head initialisation, dropout and sampling of transformers use these generators; the caller's streams stay as they
    were.

    Args:
        seed: below 2**32.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)

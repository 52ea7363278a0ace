"""What the cases for a GPU share: the device, seconds on it, and memory of it.

Without a CUDA device the same cases run on the CPU where Triton interprets its kernels (``TRITON_INTERPRET=1``), at
tiny sizes: so that their code is tested. What they measure there says nothing.
"""

import time
from collections.abc import Callable

import torch

from benchmarks.case import Call

L2_BYTES = 128 << 20
"""More than any level-two cache: writing so much leaves nothing of an earlier call in it."""


def device() -> torch.device:
    """Where the cases run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_seconds(call: Call) -> float:
    """Seconds of one call on the device alone, from a cold cache; of the clock where there is no such device."""
    if not torch.cuda.is_available():
        return _seconds(call)
    torch.empty(L2_BYTES, dtype=torch.int8, device="cuda").zero_()
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # The device is busy until all of the call is queued: what python takes to launch it is not counted.
    torch.cuda._sleep(20_000_000)
    began.record()
    call()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1000


def wall_seconds(call: Call) -> float:
    """Seconds of the clock from the call until the device has done all of it: with what python takes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return _seconds(call)


def host_seconds(call: Call) -> float:
    """Seconds until the host has handed all of a call over to the device, which was idle: what python takes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    taken = time.perf_counter() - began
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return taken


def _seconds(call: Call) -> float:
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_megabytes(call: Callable[[], object]) -> float:
    """Largest memory that tensors took on the device while something ran, with all that was there before."""
    if not torch.cuda.is_available():
        call()
        return 1.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() / 1e6

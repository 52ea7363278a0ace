"""The processes of one run, as torchrun starts them: all compute, the first one writes, prints and cleans.

What one process finds out is shared as JSON, never as a pickle. An error of one process becomes the error of all, so
that every process exits with the same code and none waits for another that is gone; the first one tells it.
"""

import atexit
import json
import os
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers.utils import logging

from randbasis import errors
from randbasis.errors import RandbasisError

T = TypeVar("T")
_DEVICE = "ACCELERATE_TORCH_DEVICE"
"""Where accelerate looks for its device."""


@dataclass(frozen=True)
class Ranks:
    """One process among those of a run.

    Args:
        index: its number, from 0.
        count: how many there are.
        device: where tensors must lie to be exchanged.
    """

    index: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.index == 0

    def agreed(self, work: Callable[[], T]) -> T:
        """Do the same work in every process; where it fails in one, it fails in all.

        Raises:
            RandbasisError: what the first process that failed raised.
            OSError: the same.
        """
        if self.count == 1:
            return work()
        failed: RandbasisError | OSError | None = None
        result: T | None = None
        try:
            result = work()
        except (RandbasisError, OSError) as error:
            failed = error
        places = torch.full((1,), self.count if failed is None else self.index, device=self.device)
        dist.all_reduce(places, dist.ReduceOp.MIN)
        place = int(places)
        if place < self.count:
            told = self._text_of(place, _error_text(failed) if failed is not None else "")
            raise self._error(failed if place == self.index else None, told) from failed
        return cast("T", result)

    def by_first(self, work: Callable[[], T]) -> T:
        """Do work in the first process alone, while the others wait; its result, or its error, is that of all.

        Args:
            work: returns what JSON can say.

        Raises:
            RandbasisError: what the first process raised.
            OSError: the same.
        """
        if self.count == 1:
            return work()
        failed: RandbasisError | OSError | None = None
        message = ""
        if self.first:
            try:
                message = json.dumps({"result": work()})
            except (RandbasisError, OSError) as error:
                failed, message = error, _error_text(error)
        message = self._text_of(0, message)
        content = json.loads(message)
        if "result" not in content:
            raise self._error(failed, message) from failed
        return content["result"]

    def of_first(self, value: T) -> T:
        """The value that the first process has, so that no process decides otherwise than another.

        Args:
            value: what JSON can say.
        """
        return value if self.count == 1 else json.loads(self._text_of(0, json.dumps(value)))

    def total(self, number: int) -> int:
        """The sum of a number over all processes."""
        if self.count == 1:
            return number
        sums = torch.tensor(number, device=self.device)
        dist.all_reduce(sums)
        return int(sums)

    def _text_of(self, index: int, text: str) -> str:
        """The text that process ``index`` has."""
        encoded = text.encode()
        length = torch.tensor(len(encoded), device=self.device)
        dist.broadcast(length, index)
        content = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.index == index:
            content.copy_(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
        dist.broadcast(content, index)
        return bytes(cast("list[int]", cast("Any", content).tolist())).decode()

    def _error(self, own: RandbasisError | OSError | None, text: str) -> RandbasisError | OSError:
        """The error to raise here: this process's own, or that of another as its text says it."""
        if own is None:
            content = json.loads(text)
            kind = getattr(errors, content["class"], OSError)
            own = cast("RandbasisError | OSError", kind(content["message"]))
        if isinstance(own, RandbasisError):
            own.told_elsewhere = not self.first
        return own


@contextmanager
def joined(*, on_cpu: bool) -> Generator[Ranks]:
    """Meet the other processes where torchrun started several; else this process is the only one.

    Those behind the first are quiet meanwhile: what they would warn of, the first one says.

    Args:
        on_cpu: whether the run is on the CPU.
    """
    started = dist.is_available() and dist.is_initialized()
    if not started and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    # Its own choice is cpu:0, which torch.load cannot map a checkpoint to.
    with accelerate_device("cpu" if on_cpu else None):
        state = cast("Any", PartialState(cpu=on_cpu))
        if not started:  # the processes part when the program ends: torchrun's meeting point serves one meeting
            atexit.register(dist.destroy_process_group)
        ranks = Ranks(state.process_index, state.num_processes, state.device)
        verbosity = logging.get_verbosity()
        try:
            with warnings.catch_warnings():
                if not ranks.first:
                    warnings.simplefilter("ignore")
                    logging.set_verbosity_error()
                yield ranks
        finally:
            logging.set_verbosity(verbosity)


@contextmanager
def accelerate_device(name: str | None) -> Generator[None]:
    """Let accelerate take a device meanwhile; ``None`` leaves it the choice that it has."""
    before = os.environ.get(_DEVICE)
    if name is not None:
        os.environ[_DEVICE] = name
    try:
        yield
    finally:
        os.environ.pop(_DEVICE, None)
        os.environ.update({} if before is None else {_DEVICE: before})


def _error_text(error: RandbasisError | OSError) -> str:
    return json.dumps({"class": type(error).__name__, "message": str(error)})

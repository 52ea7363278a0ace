"""Ctrl-C and the signal to terminate: one line that says what was kept, and the exit code that a shell expects."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer

from randbasis.cli.console import complain


class Stopped(KeyboardInterrupt):
    """A signal that ends the run; it passes where an interruption passes."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextmanager
def interruptible(output: Path, as_json: bool) -> Generator[None]:
    """Around a training run: it is undone as after an error, and what is kept is told.

    A second signal is ignored, so that what was begun to be written is put in order.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def stop(number: int, frame: FrameType | None) -> None:
        for one in numbers:
            signal.signal(one, signal.SIG_IGN)
        raise Stopped(number)

    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    except Stopped as error:
        told = _told(output, error.number)
        complain("Interrupted", told, told if as_json else None)
        raise typer.Exit(128 + error.number) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _told(output: Path, number: int) -> str:
    from randbasis.train.resuming import CHECKPOINTS
    from randbasis.train.trainer import last_checkpoint

    kept = last_checkpoint(output / CHECKPOINTS)
    name = signal.Signals(number).name
    if kept is None:
        return f"stopped by {name}: there was no checkpoint yet, so that nothing of this run is kept"
    return f"stopped by {name}: {kept} is kept; the same command with --resume goes on from there"

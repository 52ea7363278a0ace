"""What others say during a command, and how our own warnings look: the one place where a message is left out.

A person who runs a command cannot act on what the packages below tell the programmers above them; each such message is
named here with why it says nothing. Whoever calls the library from Python sees everything as usual.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

import typer


@dataclass(frozen=True)
class Noise:
    """A message that is left out.

    Args:
        source: the logger that has it, or the category of the warning.
        text: how it begins.
        reason: why it tells the one who runs a command nothing.
    """

    source: str | type[Warning]
    text: str
    reason: str


NOISE = (
    Noise(
        "bitsandbytes.backends.cpu.ops",
        "Failed to load CPU gemm_4bit_forward",
        "PEFT imports bitsandbytes, which looks for a faster kernel of 4-bit weights and works without it",
    ),
    Noise(
        "transformers.trainer_utils",
        "mtime may not be reliable",
        "checkpoints of one second are put in order by their steps instead, which is the same order",
    ),
    Noise(
        FutureWarning,
        "`is_gradient_checkpointing` is deprecated",
        "PEFT asks transformers by the old name, which still answers",
    ),
)


def no_bars_in_a_pipe() -> None:
    """Bars of others (loading, downloading) are for a terminal; both packages read this when they are imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@contextmanager
def readable_messages(in_words: Callable[[str], str]) -> Generator[None]:
    """Without the noise, and with each warning told once: ``warning: …`` on the error stream, no source line.

    Args:
        in_words: puts a message in the words of the command.
    """
    with warnings.catch_warnings():
        loggers = _make_readable(in_words)
        try:
            yield
        finally:
            for name, unwanted in loggers.items():
                logging.getLogger(name).removeFilter(unwanted)


def readable_worker(in_words: Callable[[str], str]) -> None:
    """:func:`readable_messages` in a process that a command has made, until it ends."""
    _make_readable(in_words)


def _make_readable(in_words: Callable[[str], str]) -> dict[str, Callable[[logging.LogRecord], bool]]:
    """What is left out of each logger, in place as the treatment of warnings is."""
    told: set[str] = set()

    def tell(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = in_words(str(message))
        if text not in told:
            told.add(text)
            typer.echo(f"warning: {text}", err=True)

    loggers = {one.source: _without(one.source) for one in NOISE if isinstance(one.source, str)}
    for name, unwanted in loggers.items():
        logging.getLogger(name).addFilter(unwanted)
    for one in NOISE:
        if not isinstance(one.source, str):
            warnings.filterwarnings("ignore", message=one.text, category=one.source)
    warnings.showwarning = tell
    return loggers


def _without(source: str) -> Callable[[logging.LogRecord], bool]:
    texts = tuple(one.text for one in NOISE if one.source == source)
    return lambda record: not record.getMessage().startswith(texts)

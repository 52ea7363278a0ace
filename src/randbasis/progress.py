"""What a person sees while work goes on: one kind of bar for all of it, on the error stream."""

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

Track = Callable[[Sequence[Any]], Iterable[Any]]
"""Wraps a sequence to show how far the work has come."""


def progress_bar(console: "Console", **options: Any) -> "Progress":
    """How much of how much is done, and the time it took and will take; ``options`` as rich has them."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeLeft())
    return Progress(*columns, console=console, **options)


def passing_bar(**options: Any) -> "Progress":
    """A bar that goes away when the work is done, and that a pipe or a file never sees."""
    from rich.console import Console

    console = Console(stderr=True)
    return progress_bar(console, transient=True, disable=not console.is_terminal, **options)


def tracking(what: str) -> Track:
    """A bar over a sequence; ``what`` its members are."""

    def track(items: Sequence[Any]) -> Generator[Any]:
        with passing_bar() as bar:
            yield from bar.track(items, description=what)

    return track

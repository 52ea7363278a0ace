"""A case: what is measured, against what, and what must hold before the clock starts."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from benchmarks import machine

LEAST_ROUNDS = 5
MOST_ROUNDS = 101

Call = Callable[[], object]


class CheckFailed(AssertionError):
    """The sides of a case do not do the work that they are timed for."""


@dataclass(frozen=True)
class Side:
    """One way to do the work.

    Attributes:
        call: the work, once; this is timed.
        reset: what makes the next call possible; not timed.
    """

    call: Call
    reset: Call | None = None


@dataclass(frozen=True)
class Built:
    """The sides of a case, ready to run.

    Attributes:
        sides: by name.
        check: raises :class:`CheckFailed` unless they are right, and says what it compared.
    """

    sides: dict[str, Side]
    check: Callable[[], str]


def seconds(call: Call) -> float:
    """Wall-clock seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@dataclass(frozen=True)
class Case:
    """Sides that do the same work, measured in turn in one process.

    Attributes:
        family: which table it belongs to.
        name: what is done, and its size.
        sides: names; the first is what the others are compared with.
        build: makes some of the sides; called only when the case runs.
        parameters: the size again, for selecting and plotting.
        work: units of work in one call.
        unit: what a unit of work a second is called.
        measure: value of one call; seconds by default.
        quantity: unit of that value.
        usual: whether it runs unless all are asked for.
        seconds: how long its rounds may take together; there are at least :data:`LEAST_ROUNDS`.
        rounds: a fixed number instead, whatever is asked for.
        warms_up: whether every side is called once before the rounds.
        device: torch device that it needs.
    """

    family: str
    name: str
    sides: tuple[str, ...]
    build: Callable[[Sequence[str]], Built]
    parameters: dict[str, int | str] = field(default_factory=dict[str, int | str])
    work: float = 1.0
    unit: str = ""
    measure: Callable[[Call], float] = seconds
    quantity: str = "s"
    usual: bool = True
    seconds: float = 30.0
    rounds: int | None = None
    warms_up: bool = True
    device: str = "cpu"


@dataclass(frozen=True)
class Timing:
    """The values of one side, one a round, beside those of the first side in the same rounds.

    Attributes:
        side: its name.
        values: in the order of the rounds.
        first: those of the first side.
    """

    side: str
    values: list[float]
    first: list[float]

    @property
    def ratios(self) -> list[float]:
        """By round, to the first side; nothing where that took no measurable time."""
        return [own / base for own, base in zip(self.values, self.first, strict=True) if base]

    @property
    def overheads(self) -> list[float]:
        """By round, above the first side."""
        return [own - base for own, base in zip(self.values, self.first, strict=True)]


@dataclass(frozen=True)
class Outcome:
    """What a case gave.

    Attributes:
        timings: by side.
        checked: what was compared before.
        others: cores that other processes kept busy meanwhile, on average.
    """

    timings: list[Timing]
    checked: str
    others: float


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the values that a fifth and four fifths are below."""
    if len(values) < 2:
        return (values[0],) * 3
    p20, *_, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), p20, p80


def chosen_sides(case: Case, wanted: Sequence[str]) -> list[str]:
    """The sides whose names contain one of some words, and always the first; all when there are no words."""
    return [side for side in case.sides if side == case.sides[0] or not wanted or any(w in side for w in wanted)]


def run(
    case: Case, sides: Sequence[str] = (), rounds: int | None = None, progress: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Check a case, warm every side up, then measure the sides in turn, round by round, every other round backwards.

    Args:
        case: which.
        sides: which of its sides; all by default.
        rounds: instead of what fits the case's time.
        progress: is told what is being done.

    Raises:
        CheckFailed: before any side was measured.
    """
    names = list(sides or case.sides)
    progress("build")
    built = case.build(names)
    progress("check")
    checked = built.check()
    began = time.perf_counter()
    values: dict[str, list[float]] = {name: [] for name in names}
    for name in names if case.warms_up else ():
        progress(f"warm up {name}")
        _measure(case, built, name, values)
    count = case.rounds or rounds or _rounds_in(case.seconds, time.perf_counter() - began)
    values = {name: [] for name in values}
    with _no_collections_inside():
        watch = machine.Watch()
        for number in range(count):
            progress(f"round {number + 1} of {count}")
            gc.collect()
            for name in list(values) if number % 2 == 0 else list(reversed(values)):
                _measure(case, built, name, values)
        others = watch.others()
    if lost := [name for name in names if name not in values]:
        checked += f"; out of memory, and left out: {', '.join(lost)}"
    first = values[names[0]]
    return Outcome([Timing(name, own, first) for name, own in values.items()], checked, others)


def _measure(case: Case, built: Built, name: str, values: dict[str, list[float]]) -> None:
    """Add a value of a side; one that does not fit into memory is taken out, unless the others are held against it."""
    try:
        values[name].append(_once(case, built.sides[name]))
    except torch.OutOfMemoryError:
        if name == case.sides[0]:
            raise
        del values[name]
    else:
        return
    gc.collect()  # only now is what the call had made let go
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _once(case: Case, side: Side) -> float:
    value = case.measure(side.call)
    if side.reset is not None:
        side.reset()
    return value


@contextmanager
def _no_collections_inside() -> Iterator[None]:
    """Garbage is collected between rounds alone, and what was there before is left out, so that this is quick."""
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def _rounds_in(budget: float, one: float) -> int:
    return max(LEAST_ROUNDS, min(MOST_ROUNDS, int(budget / max(one, 1e-9))))

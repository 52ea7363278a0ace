"""A case: what is timed, against what, and what must hold before the clock starts."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """Sides that do the same work, timed in turn in one process.

    Attributes:
        name: the case and its size.
        sides: name → one call of the work; the first is what the others are compared with.
        check: raises unless the sides agree.
        work: units of work in one call.
        unit: what a unit of work a second is called.
    """

    name: str
    sides: dict[str, Callable[[], object]]
    check: Callable[[], None]
    work: float
    unit: str


@dataclass(frozen=True)
class Timing:
    """Seconds of one side.

    Attributes:
        side: its name.
        median: of all rounds.
        p20: a fifth of the rounds was faster.
        p80: a fifth of the rounds was slower.
        ratio: median over the rounds of its seconds divided by those of the first side in the same round.
    """

    side: str
    median: float
    p20: float
    p80: float
    ratio: float


def run(case: Case, rounds: int) -> list[Timing]:
    """Check a case, warm every side up, then time the sides in turn, round by round."""
    case.check()
    for call in case.sides.values():
        call()
    seconds: dict[str, list[float]] = {side: [] for side in case.sides}
    for _ in range(rounds):
        for side, call in case.sides.items():
            began = time.perf_counter()
            call()
            seconds[side].append(time.perf_counter() - began)
    first = seconds[next(iter(seconds))]
    timings: list[Timing] = []
    for side, values in seconds.items():
        p20, *_, p80 = statistics.quantiles(values, n=5)
        ratio = statistics.median(own / base for own, base in zip(values, first, strict=True))
        timings.append(Timing(side, statistics.median(values), p20, p80, ratio))
    return timings

"""Runs with values given by hand."""

from collections.abc import Mapping, Sequence

from benchmarks.case import Built, Case, Outcome, Timing
from benchmarks.rows import Run, rows_of


def run_of(family: str, sides: Mapping[str, Sequence[float]], *, name: str = "", **options: object) -> Run:
    """A run whose sides took so long in each round."""
    case = Case(family, name or family, tuple(sides), lambda _: Built({}, str), **options)  # pyright: ignore[reportArgumentType]
    first = list(next(iter(sides.values())))
    outcome = Outcome([Timing(side, list(values), first) for side, values in sides.items()], "checked", 0.0)
    return Run(rows_of(case, outcome, load=0.5))

"""The rows of the sweep, taken together: what each rate of a method is worth on a set, over its seeds."""

import csv
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from pathlib import Path

Row = Mapping[str, str]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of the csv, none when it does not exist."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["date"]]


@dataclass(frozen=True)
class Point:
    """One rate of one method on one set.

    Args:
        metric: what was scored.
        scores: seed → score; not finite where the run diverged.
        before: of the untrained model, the first seed's.
        earlier: whether no row says which revision made it: before the first step of a warm-up was above rate 0.
    """

    metric: str
    scores: Mapping[int, float]
    before: float
    earlier: bool

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.scores.values())

    @property
    def error(self) -> float | None:
        """Standard error of the mean; ``None`` with one seed."""
        return _error(list(self.scores.values()))

    @property
    def worth(self) -> float:
        """Greater is better; a run that diverged is worth nothing."""
        mean = -self.mean if self.metric == "loss" else self.mean
        return mean if isfinite(mean) else -inf

    def over(self, other: "Point") -> tuple[float, float | None]:
        """How much more it is worth than another on the seeds of both, with the standard error of that."""
        if not (isfinite(self.mean) and isfinite(other.mean)):
            return (0.0 if self.worth == other.worth else self.worth - other.worth), None
        sign = -1 if self.metric == "loss" else 1
        shared = sorted(self.scores.keys() & other.scores.keys())
        gaps = [sign * (self.scores[seed] - other.scores[seed]) for seed in shared]
        return (statistics.fmean(gaps) if gaps else self.worth - other.worth), _error(gaps)


def best_of(points: Mapping[float, Point], taken: float) -> float:
    """The rate that is worth most, each compared with the one taken on the seeds of both; it is that one at a tie."""
    if taken not in points:
        return max(points, key=lambda rate: points[rate].worth)
    return max(points, key=lambda rate: (points[rate].over(points[taken])[0], rate == taken, points[rate].worth))


Points = dict[tuple[str, str], dict[float, Point]]
"""Set and method → rate → what it is worth."""


def points_of(rows: Iterable[Row]) -> Points:
    """Rows that differ in set, method, rate and seed alone, taken together."""
    found: dict[tuple[str, str], dict[float, list[Row]]] = {}
    for row in rows:
        found.setdefault((row["set"], row["method"]), {}).setdefault(float(row["rate"]), []).append(row)
    return {key: {rate: _point(own[rate]) for rate in sorted(own)} for key, own in found.items()}


def _point(rows: list[Row]) -> Point:
    scores = {int(row["seed"]): float(row["after"] or "nan") for row in rows}
    first = next((row["before"] for row in rows if row["before"]), "nan")
    return Point(rows[0]["metric"], scores, float(first), not any(row["revision"] for row in rows))


def _error(values: list[float]) -> float | None:
    return statistics.stdev(values) / sqrt(len(values)) if len(values) > 1 else None

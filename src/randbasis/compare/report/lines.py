"""RECORDS → LINES: the final runs of a row taken together, a line each way to store them, and what is missing."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any

from randbasis.compare.record import Point, Record, finals
from randbasis.compare.report.measures import CurvePoint, Interval, at_bytes, interval, paired
from randbasis.compare.study import NO_ADAPTER, Data, Row, Study
from randbasis.train.task import LOWER_IS_BETTER

LORA = "lora"


@dataclass(frozen=True)
class Line:
    """The final runs of a row, stored in one way.

    Attributes:
        row: which.
        point: how its runs are stored; the bytes are those of the first run.
        as_trained: whether it is the first of its row.
        configuration: hyper-parameters of the adapter.
        coefficients: trained numbers of the adapter.
        bytes: of the whole file, on average over the runs.
        rate: learning rate that the trials chose; None where nothing is trained.
        trials: learning rates that were tried.
        at_edge: whether the chosen one is the smallest or largest of them, so that a better one may lie outside.
        scores: metric → seed → value, of the runs that ended.
        diverged: runs whose loss stopped being finite.
        step_seconds: wall time of a step, the median over the runs.
        peak_bytes: growth of the process in training, the median over the runs that know it; 0 where none does.
        expand_seconds: of making the factors once, the median over the runs.
        forgetting: seed → perplexity of the base's own text, to that before training.
    """

    row: Row
    point: Point
    as_trained: bool
    configuration: dict[str, Any]
    coefficients: int
    bytes: float
    rate: float | None
    trials: int
    at_edge: bool
    scores: dict[str, dict[int, float]]
    diverged: int
    step_seconds: float
    peak_bytes: int
    expand_seconds: float | None
    forgetting: dict[int, float]

    @property
    def name(self) -> str:
        """For people."""
        return self.row.name if self.as_trained else f"{self.row.name}, {self.point.name}"

    def score(self, metric: str) -> Interval | None:
        """The mean over the seeds with its interval."""
        return interval([value for _, value in sorted(self.scores.get(metric, {}).items())])


@dataclass(frozen=True)
class Results:
    """What has come out on one data set.

    Attributes:
        data: which.
        lines: in the order of the study's rows.
        anchor: name of the curve that others are compared with; None for none.
        gain_of: name of the row whose gain is the whole; None for none.
    """

    data: Data
    lines: tuple[Line, ...]
    anchor: str | None
    gain_of: str | None

    @property
    def metric(self) -> str:
        """The one that is plotted."""
        return self.data.metric

    @property
    def higher(self) -> bool:
        """Whether a greater value of the metric is better."""
        return self.metric not in LOWER_IS_BETTER

    @property
    def base(self) -> Line | None:
        """The untouched base, or its head alone."""
        return next((line for line in self.lines if line.row.method == NO_ADAPTER), None)

    def of_row(self, name: str | None) -> Line | None:
        """The runs of a row as they were trained."""
        return next((line for line in self.lines if line.as_trained and line.row.name == name), None)

    def anchored(self) -> Line | None:
        """The anchor as trained, of its rows the one with most coefficients."""
        own = [line for line in self.lines if line.as_trained and line.row.curve == self.anchor]
        return max(own, key=lambda line: line.coefficients, default=None)

    def lora(self) -> Line | None:
        """The first LoRA, that steps are timed against."""
        return next((line for line in self.lines if line.as_trained and line.row.method == LORA), None)

    def curves(self) -> dict[str, list[Line]]:
        """The lines of each curve that has bytes to compare, in the order of the rows; a line without scores is out."""
        found: dict[str, list[Line]] = {}
        for line in self.lines:
            if line.row.adapted and line.scores.get(self.metric):
                found.setdefault(line.row.curve, []).append(line)
        return found

    def points(self, curve: str) -> list[CurvePoint]:
        """Mean scores of a curve against mean bytes."""
        return [CurvePoint(line.bytes, _mean(line, self.metric)) for line in self.curves().get(curve, [])]

    def to_anchor(self, line: Line) -> Interval | None:
        """The metric less that of the anchor as trained, paired by seed."""
        anchor = self.anchored()
        if anchor is None or line is anchor or not line.row.adapted:
            return None
        return paired(line.scores.get(self.metric, {}), anchor.scores.get(self.metric, {}))

    def over_base(self, line: Line) -> Interval | None:
        """How much better than the base alone, paired by seed."""
        base, ours = self.base, line.scores.get(self.metric, {})
        theirs = base.scores.get(self.metric, {}) if base else {}
        if line is base or not theirs:
            return None
        # An untrained base has one run, which is the same for every seed.
        theirs = theirs if self.data.has_head else dict.fromkeys(ours, next(iter(theirs.values())))
        return paired(ours, theirs) if self.higher else paired(theirs, ours)

    def behind_base(self) -> list[Line]:
        """Rows that end behind the base alone by more than the interval, paired by seed: training did them harm."""
        return [
            line
            for line in self.lines
            if line.as_trained and (gain := self.over_base(line)) and gain.half is not None and gain.mean < -gain.half
        ]

    def at_equal_bytes(self, line: Line) -> Interval | None:
        """The metric less that of the anchor's curve at as many bytes, paired by seed; None outside of the curve."""
        if line.row.curve == self.anchor or not line.row.adapted:
            return None
        theirs: dict[int, float] = {}
        for seed in line.scores.get(self.metric, {}):
            others = [one for one in self.curves().get(self.anchor or "", []) if seed in one.scores[self.metric]]
            found = at_bytes([CurvePoint(one.bytes, one.scores[self.metric][seed]) for one in others], line.bytes)
            theirs |= {} if found is None else {seed: found}
        return paired(line.scores.get(self.metric, {}), theirs)

    def step_ratio(self, line: Line) -> float | None:
        """Wall time of a step to that of the first LoRA."""
        lora = self.lora()
        return line.step_seconds / lora.step_seconds if lora and lora.step_seconds and line.step_seconds else None


def results_of(study: Study, data: Data, records: Sequence[Record]) -> Results:
    """What has come out on a data set.

    Args:
        study: which.
        data: one of its data sets.
        records: usable ones.
    """
    lines = [line for row in study.rows_on(data) for line in _lines(row, data.name, records)]
    return Results(data, tuple(lines), study.anchor, study.gain_of)


def missing(study: Study, records: Sequence[Record]) -> list[str]:
    """A sentence for each row of each data set that has fewer runs than it should."""
    return [told for data in study.data for row in study.rows_on(data) if (told := _lacking(study, data, row, records))]


def _lacking(study: Study, data: Data, row: Row, records: Sequence[Record]) -> str:
    trials = _trials(row, data.name, records)
    untrained = row.method == NO_ADAPTER and not data.has_head
    tried, asked = len(trials), 0 if untrained or study.trials == 1 else study.trials
    runs = _finals(row, data.name, records)
    ended, due = len(runs), 1 if untrained else study.seeds
    if not tried and not ended:
        return f"{data.name}, {row.name}: no run yet, or no configuration of the method fits"
    if not ended and tried >= asked and all(loss == float("inf") for loss in trials.values()):
        return f"{data.name}, {row.name}: every one of {tried} learning rates diverged"
    if ended and not any(run.points for run in runs):
        return f"{data.name}, {row.name}: every one of {ended} final runs diverged"
    lacks = [f"{tried} of {asked} learning rates were tried"] if tried < asked else []
    lacks += [f"{ended} of {due} final runs are there"] if ended < due else []
    return f"{data.name}, {row.name}: {', '.join(lacks)}" if lacks else ""


def _lines(row: Row, data: str, records: Sequence[Record]) -> list[Line]:
    runs = _finals(row, data, records)
    points = next((run.points for run in runs if run.points), ())
    rates = sorted(_trials(row, data, records))
    return [_line(row, i, point, runs, rates) for i, point in enumerate(points)]


def _line(row: Row, index: int, point: Point, runs: Sequence[Record], rates: Sequence[float]) -> Line:
    stored = {run.seed: one for run in runs for one in run.points if one.name == point.name and one.scores}
    chosen = runs[0].rate
    perplexities = {run.seed: run.base_perplexity for run in runs}
    return Line(
        row=row,
        point=point,
        as_trained=index == 0,
        configuration=runs[0].configuration,
        coefficients=max(run.coefficients for run in runs),
        bytes=statistics.fmean(one.bytes for one in stored.values()) if stored else point.bytes,
        rate=chosen or None,
        trials=len(rates),
        at_edge=len(rates) > 1 and chosen in (rates[0], rates[-1]),
        scores={
            metric: {s: value for s, one in sorted(stored.items()) if isfinite(value := one.scores.get(metric, nan))}
            for metric in sorted({metric for one in stored.values() for metric in one.scores})
        },
        diverged=len(runs) - len(stored),
        step_seconds=statistics.median(run.step_seconds for run in runs),
        peak_bytes=round(_median([run.peak_bytes or None for run in runs]) or 0),
        expand_seconds=_median([run.expand_seconds for run in runs]),
        forgetting={
            seed: one.forgetting / before
            for seed, one in sorted(stored.items())
            if one.forgetting is not None and (before := perplexities[seed]) and isfinite(one.forgetting / before)
        },
    )


def _finals(row: Row, data: str, records: Sequence[Record]) -> list[Record]:
    """By seed, at one learning rate: if an earlier choice has left others, that of most runs, then of lowest loss."""
    found = finals(records, data, row.name)
    counts, losses = Counter(run.rate for run in found), _trials(row, data, records)

    def order(rate: float) -> tuple[int, float, float]:
        return -counts[rate], losses.get(rate, float("inf")), rate

    return [run for run in found if run.rate == min(counts, key=order)]


def _trials(row: Row, data: str, records: Sequence[Record]) -> dict[float, float]:
    """Learning rate → loss on the held-out rows, infinite where the run diverged."""
    tried = [run for run in records if (run.data, run.row, run.phase) == (data, row.name, "trial")]
    losses = {run.rate: run.points[0].scores.get("loss", float("inf")) if run.points else float("inf") for run in tried}
    return {rate: loss if loss == loss else float("inf") for rate, loss in losses.items()}


def _mean(line: Line, metric: str) -> float:
    return statistics.fmean(line.scores[metric].values())


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None

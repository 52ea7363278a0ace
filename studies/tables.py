"""Records to tables: mean ± standard deviation over the final runs of each row, as Markdown."""

import math
import statistics
from dataclasses import dataclass

from benchmarks.tables import table
from randbasis.precision import CODED
from studies.study import Record, Row, Setting, Study, chosen_rate

PERCENT = ("accuracy",)


@dataclass(frozen=True)
class Line:
    """One row of one table, its final runs taken together.

    Args:
        row: which.
        configuration: hyper-parameters, for people.
        coefficients: trained numbers of the adapter.
        file_bytes: of the saved adapter with its head.
        rate: learning rate that the sweep chose; ``None`` where nothing is trained.
        at_edge: whether it is the smallest or the largest of those tried, so that a better one may lie outside.
        scores: metric → one value a finished run, in the order of the seeds.
        runs: finished ones.
        diverged: runs whose loss stopped being finite.
        seconds: mean processor time of training.
        bits: of a coefficient.
        name: of the line.
        stored: bytes of the coefficients at these bits, with their scales.
    """

    row: Row
    configuration: str
    coefficients: int
    file_bytes: int
    rate: float | None
    at_edge: bool
    scores: dict[str, list[float]]
    runs: int
    diverged: int
    seconds: float
    bits: int
    name: str
    stored: int

    def mean(self, metric: str) -> float:
        """Of the finished runs; NaN when there is none."""
        return statistics.fmean(self.scores[metric]) if self.scores.get(metric) else float("nan")

    def deviation(self, metric: str) -> float:
        """Sample standard deviation, 0 for a single run."""
        values = self.scores.get(metric, [])
        return statistics.stdev(values) if len(values) > 1 else 0.0


def lines_of(study: Study, setting: Setting, records: list[Record]) -> list[Line]:
    """The rows of a table that have final runs, each followed by what quantizing made of its runs.

    Args:
        records: usable ones.
    """
    lines: list[Line] = []
    for row in study.rows:
        rate = chosen_rate(study, setting, row, records) if setting.rates_for(row) else None
        runs = {
            r.job.seed: r
            for r in records
            if (r.job.setting, r.job.row, r.job.phase) == (setting.name, row.name, "final")
            and (rate is None or r.job.rate == rate)
        }
        if runs:
            ordered = [runs[seed] for seed in sorted(runs)]
            at_edge = rate in _edges(setting.rates_for(row))
            lines += [_line(row, rate, at_edge, ordered, bits) for bits in (None, *row.afterwards)]
    return lines


def line_names(study: Study) -> list[str]:
    """The names of all lines of a table, in their order."""
    return [_name(row, bits) for row in study.rows for bits in (None, *row.afterwards)]


def table_of(study: Study, setting: Setting, records: list[Record]) -> str:
    """A table in Markdown; the best mean of each metric is bold.

    Args:
        records: usable ones.
    """
    lines = lines_of(study, setting, records)
    metrics = [metric for metric in study.metrics if any(line.scores.get(metric) for line in lines)]
    quantized = any(row.afterwards for row in study.rows)
    size = ["bits", "stored, bytes"] if quantized else ["file, bytes"]
    heads = ["row", "configuration", "coefficients", *size, "rate", *(_head(m) for m in metrics), "s", "runs"]
    best = {metric: _best(lines, metric) for metric in metrics}
    cells = [
        [
            line.name,
            line.configuration,
            f"{line.coefficients:,}",
            *_sizes(line, quantized=quantized),
            "" if line.rate is None else f"{line.rate:g}" + ("*" if line.at_edge else ""),
            *(_cell(line, metric, line is best[metric]) for metric in metrics),
            f"{line.seconds:.0f}",
            str(line.runs) + (f" (+{line.diverged} diverged)" if line.diverged else ""),
        ]
        for line in lines
    ]
    return table(heads, cells, left=2)


def _line(row: Row, rate: float | None, at_edge: bool, runs: list[Record], bits: int | None) -> Line:
    """The runs of a row, or what quantizing their coefficients to so many bits made of them."""
    scored = [run.scores if bits is None else run.afterwards.get(str(bits), {}) for run in runs]
    finished = [scores for scores in scored if scores]
    metrics = finished[0] if finished else {}
    first, stored_bits = runs[0], bits or row.bits or 32
    return Line(
        row,
        _words(first),
        first.coefficients,
        first.file_bytes,
        rate,
        at_edge,
        {metric: [scores[metric] for scores in finished] for metric in metrics},
        len(finished),
        len(runs) - len(finished),
        statistics.fmean(run.seconds for run in runs),
        stored_bits,
        _name(row, bits),
        math.ceil(first.coefficients * stored_bits / 8) + (4 * first.vectors if stored_bits in CODED else 0),
    )


def _name(row: Row, bits: int | None) -> str:
    return row.name if bits is None else f"{row.name}, PTQ {bits} bits"


def _edges(rates: tuple[float, ...]) -> tuple[float, ...]:
    """The smallest and the largest rate of a sweep."""
    return (min(rates), max(rates)) if len(rates) > 1 else ()


def _sizes(line: Line, *, quantized: bool) -> list[str]:
    """What the adapter takes: bits and bytes of its coefficients alone, or the file of the runs."""
    if quantized:
        return [str(line.bits), f"{line.stored:,}"] if line.coefficients else ["", ""]
    return [f"{line.file_bytes:,}" if line.file_bytes else ""]


def _words(record: Record) -> str:
    names = {"rank": "r", "basis": "k = l", "alpha": "alpha"}
    values = record.configuration
    return ", ".join(f"{names[key]} = {values[key]:g}" for key in names if key in values)


def _best(lines: list[Line], metric: str) -> Line | None:
    scored = [line for line in lines if line.scores.get(metric)]
    sign = -1 if metric == "loss" else 1
    return max(scored, key=lambda line: sign * line.mean(metric), default=None)


def _head(metric: str) -> str:
    return {"accuracy": "accuracy, %", "bleu": "BLEU", "chrf": "chrF"}.get(metric, metric)


def _cell(line: Line, metric: str, bold: bool) -> str:
    if not line.scores.get(metric):
        return ""
    factor = 100 if metric in PERCENT else 1
    digits = 3 if metric == "loss" else 1
    text = f"{factor * line.mean(metric):.{digits}f}"
    if len(line.scores[metric]) > 1:
        text += f" ± {factor * line.deviation(metric):.{digits}f}"
    return f"**{text}**" if bold else text

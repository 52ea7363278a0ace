"""Results as rows of a csv: one row a side of a case that was run."""

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks import machine
from benchmarks.case import Case, Outcome, Timing, spread

RESULTS = Path(__file__).parent / "results"
TIMINGS = RESULTS / "timings.csv"
BUSY = 0.25
"""Cores kept busy by others from which a row says so."""

COLUMNS = [
    *machine.COLUMNS,
    *("cores", "load", "others", "note"),
    *("family", "case", "parameters", "side", "baseline", "quantity", "rounds"),
    *("median", "p20", "p80", "ratio", "ratio_p20", "ratio_p80", "over", "over_p20", "over_p80"),
    *("rate", "unit", "checked", "values"),
]


@dataclass(frozen=True)
class Run:
    """The rows of one case that were measured together.

    Attributes:
        rows: the first is that of the side that the others are compared with.
    """

    rows: list[dict[str, str]]

    @property
    def family(self) -> str:
        """Which table it belongs to."""
        return self.rows[0]["family"]

    @property
    def case(self) -> str:
        """Name of the case."""
        return self.rows[0]["case"]

    @cached_property
    def parameters(self) -> dict[str, int | str]:
        """Size of the case."""
        return json.loads(self.rows[0]["parameters"])

    @cached_property
    def timings(self) -> dict[str, Timing]:
        """By side."""
        values = {row["side"]: [float(value) for value in row["values"].split()] for row in self.rows}
        first = values[self.rows[0]["side"]]
        return {side: Timing(side, own, first) for side, own in values.items()}

    @property
    def device(self) -> str:
        """What it ran on."""
        return self.rows[0]["device"]

    @property
    def threads(self) -> int:
        """Of torch."""
        return int(self.rows[0]["threads"])


def rows_of(case: Case, outcome: Outcome, load: float) -> list[dict[str, str]]:
    """The rows of a case that was just run.

    Args:
        case: which.
        outcome: what it gave.
        load: load average before it began.
    """
    shared = {
        **machine.about(case.device),
        "cores": str(os.cpu_count()),
        "load": f"{load:.2f}",
        "others": f"{outcome.others:.2f}",
        "note": f"busy: others used {outcome.others:.1f} cores" if outcome.others > BUSY else "",
        "family": case.family,
        "case": case.name,
        "parameters": json.dumps(case.parameters, ensure_ascii=False),
        "baseline": outcome.timings[0].side,
        "quantity": case.quantity,
        "checked": outcome.checked,
    }
    return [{**shared, **_of_side(case, timing)} for timing in outcome.timings]


def _of_side(case: Case, timing: Timing) -> dict[str, str]:
    row = {"side": timing.side, "rounds": str(len(timing.values)), "unit": case.unit}
    for prefix, values in (("", timing.values), ("ratio", timing.ratios), ("over", timing.overheads)):
        if not values:
            continue
        for suffix, value in zip(("median", "p20", "p80"), spread(values), strict=True):
            row[_column(prefix, suffix)] = f"{value:.5g}"
    row["rate"] = f"{case.work / spread(timing.values)[0]:.4g}" if case.unit else ""
    row["values"] = " ".join(f"{value:.7g}" for value in timing.values)
    return row


def _column(prefix: str, suffix: str) -> str:
    if not prefix:
        return suffix
    return prefix if suffix == "median" else f"{prefix}_{suffix}"


def append(path: Path, rows: Iterable[Mapping[str, object]], columns: Sequence[str] = COLUMNS) -> None:
    """Add rows to a csv, which is made with its header when it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def rows_in(path: Path, columns: Sequence[str] = COLUMNS) -> list[dict[str, str]]:
    """Everything in a csv, in the order in which it was measured; nothing where there is none.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != [*columns]:
            raise ValueError(f"{path} must have the columns {[*columns]}, got {reader.fieldnames}; move it away")
        return list(reader)


def read(path: Path) -> list[Run]:
    """Everything in a csv of cases, by run.

    Raises:
        ValueError: the file has other columns.
    """
    runs: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows_in(path):
        runs.setdefault(tuple(row[name] for name in ("date", "device", "family", "case")), []).append(row)
    return [Run(rows) for rows in runs.values()]


def newest(runs: Iterable[Run]) -> list[Run]:
    """The last run of each case on each device with each number of threads, in the order of the first runs."""
    last: dict[tuple[str, str, str, int], Run] = {}
    for run in runs:
        last[run.family, run.case, run.device, run.threads] = run
    return list(last.values())


def is_measured(case: Case, runs: Iterable[Run], sides: Sequence[str]) -> bool:
    """Whether some sides of a case were already measured together on this device, revision and number of threads."""
    about = machine.about(case.device)
    wanted = {name: about[name] for name in ("device", "threads", "versions", "revision")}
    return any(
        (run.family, run.case) == (case.family, case.name)
        and all(run.rows[0][name] == value for name, value in wanted.items())
        and set(sides) <= set(run.timings)
        for run in runs
    )

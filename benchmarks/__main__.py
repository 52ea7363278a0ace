"""``python -m benchmarks [CASE ...]``: run cases, append to the csv, print and draw what it holds."""

import argparse
import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import basis_rate, machine, training_step
from benchmarks.case import Case, run

CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "basis_rate": basis_rate.cases,
    "training_step": training_step.cases,
}
RESULTS = Path(__file__).parent / "results"
COLUMNS = [*machine.COLUMNS, "case", "side", "median", "p20", "p80", "ratio", "rate"]


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="which; all when none is named")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of every side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--output", type=Path, default=RESULTS / "timings.csv", help="csv to append to")
    arguments = parser.parse_args()
    console = Console()
    if arguments.list:
        console.print("\n".join(CASES))
        return
    torch.set_num_threads(arguments.threads)
    for name in arguments.cases or CASES:
        for case in CASES[name]():
            rows = _rows(case, arguments.rounds)
            _append(arguments.output, rows)
            console.print(_table(case, rows))
    plot(arguments.output)


def _rows(case: Case, rounds: int) -> list[dict[str, str]]:
    return [
        {
            **machine.about(),
            "case": case.name,
            "side": timing.side,
            "median": f"{timing.median:.6g}",
            "p20": f"{timing.p20:.6g}",
            "p80": f"{timing.p80:.6g}",
            "ratio": f"{timing.ratio:.4g}",
            "rate": f"{case.work / timing.median:.4g} {case.unit}",
        }
        for timing in run(case, rounds)
    ]


def _append(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def _table(case: Case, rows: list[dict[str, str]]) -> Table:
    table = Table(title=case.name)
    for column in ("side", "median s", "p20-p80", f"ratio to {rows[0]['side']}", "rate"):
        table.add_column(column)
    for row in rows:
        table.add_row(row["side"], row["median"], f"{row['p20']}-{row['p80']}", row["ratio"], row["rate"])
    return table


def plot(path: Path) -> None:
    """Draw the newest rows of every case as bars of the ratio to its first side, beside the csv."""
    from matplotlib.figure import Figure

    with path.open(newline="", encoding="utf-8") as file:
        newest = {(row["case"], row["side"]): row for row in csv.DictReader(file)}
    cases = list(dict.fromkeys(case for case, _ in newest))
    figure = Figure(figsize=(9, 2.6 * len(cases)), layout="constrained")
    for index, case in enumerate(cases):
        rows = [row for (name, _), row in newest.items() if name == case]
        axes = figure.add_subplot(len(cases), 1, index + 1)
        axes.barh([row["side"] for row in rows], [float(row["ratio"]) for row in rows])
        axes.invert_yaxis()
        axes.set_title(case, fontsize=9)
        axes.set_xlabel(f"seconds, relative to {rows[0]['side']}", fontsize=8)
        axes.tick_params(labelsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()

"""The figures of docs/store.md, from the csv files of the store and its kills: its table and its picture."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import plots, rows
from benchmarks.crash import COLUMNS as KILL_COLUMNS
from benchmarks.crash import KILLS
from benchmarks.store import ADDITIONS, COLUMNS, FOLDERS, GROWTH, STORE, TENTH
from benchmarks.tables import number, table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "store.md"
PLOT = PAGE.with_name("store") / "growth.png"
MEASURES = {
    "add, batched": "add, in batches",
    "add, by processor time": "add, by processor time",
    "add one p50": "add one, median",
    "add": "add",
    "get p50, warm": "get, median",
    "get p99, warm": "get, 99th of 100",
    "get p99, first": "get for the first time, 99th of 100",
    "list page p50": "list 100 names, median",
    "list page by tag p50": "list 100 names by tag, median",
    "memory added": "memory of the process for it",
    "disk an adapter": "disk for an adapter",
    "file": "disk for all",
    "verify": "verify",
}
"""Measure of the csv → row of the page, in its order."""

Row = dict[str, str]


def newest(measured: list[Row]) -> dict[tuple[str, str], Row]:
    """Side and measure → row, of the last run of the largest store."""
    most = max(int(row["adapters"]) for row in measured)
    return {(row["side"], row["measure"]): row for row in measured if int(row["adapters"]) == most}


def block() -> str:
    """What stands on the page."""
    measured = rows.rows_in(ADDITIONS, COLUMNS)
    kills = max(rows.rows_in(KILLS, KILL_COLUMNS), key=lambda row: int(row["kills"]))
    found = newest(measured)
    one = next(iter(found.values()))
    runs = [row for row in measured if row["measure"] == "add, batched" and row["adapters"] == one["adapters"]]
    told = [f"{_value(row)} ({row['disk'].partition(',')[0]})" for row in runs]
    parts = [
        f"{int(one['adapters']):,} adapters; {one['device']}, one thread; {one['disk']}; {one['date']}; "
        f"{one['versions']}; revision {one['revision']}.",
        table(["", STORE, FOLDERS, ""], [*_lines(found)], left=4),
        f"Additions in every run of this size, beside what else the machine did: {'; '.join(told)}.",
        "![Rate of additions and memory as the store grows](store/growth.png)",
        f"Kills: {int(kills['kills']):,} (seed {kills['seed']}, {kills['date']}, revision {kills['revision']}), "
        f"{int(kills['acknowledged']):,} calls acknowledged, {kills['lost']} lost, {kills['torn']} torn. "
        f"They hit: {kills['within']}.",
    ]
    return "\n\n".join(parts)


def _lines(found: dict[tuple[str, str], Row]) -> Iterator[list[str]]:
    """A line a measure that there is a value for, on either side."""
    for measure, label in MEASURES.items():
        cells = [found.get((side, measure)) for side in (STORE, FOLDERS)]
        if any(cells):
            notes = dict.fromkeys(cell["note"] for cell in cells if cell is not None and cell["note"])
            yield [label, *("" if cell is None else _value(cell) for cell in cells), "; ".join(notes)]


def _value(row: Row) -> str:
    return f"{number(float(row['value']))} {row['unit']}"


def draw(pages: Sequence[Path]) -> list[Path]:
    """Make the picture, where its page is among those that are written."""
    if PAGE not in pages:
        return []
    plot(newest(rows.rows_in(ADDITIONS, COLUMNS)), PLOT)
    return [PLOT]


def plot(found: dict[tuple[str, str], Row], path: Path) -> None:
    """Additions a second and memory over the number of adapters there are."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6), layout="constrained")
    for index, (start, label) in enumerate(((TENTH, "added a second"), (GROWTH, "memory added, MB"))):
        points = {
            int(name.removeprefix(start)): float(row["value"])
            for (_, name), row in found.items()
            if name.startswith(start)
        }
        axes = figure.add_subplot(1, 2, index + 1)
        axes.plot(
            [number / 1e6 for number in sorted(points)], [points[number] for number in sorted(points)], marker="o"
        )
        axes.set_ylim(0, 1.15 * max(points.values()))
        axes.set_xlabel("adapters in the store, millions", fontsize=8)
        axes.set_title(label, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    plots.write(figure, path)

"""``python -m benchmarks.store_page``: the figures of docs/store.md, from the csv files of the store and its kills."""

import csv
from pathlib import Path

from benchmarks.store import FOLDERS, GROWTH, RESULTS, STORE, TENTH

PAGE = Path(__file__).resolve().parent.parent / "docs" / "store.md"
PLOT = PAGE.with_name("store") / "growth.png"
BEGIN, END = "<!-- table: store -->\n", "<!-- end of table -->"
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


def rows_of(path: Path) -> list[Row]:
    """The rows of a csv."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def newest(rows: list[Row]) -> dict[tuple[str, str], Row]:
    """Side and measure → row, of the last run of the largest store."""
    most = max(int(row["adapters"]) for row in rows)
    return {(row["side"], row["measure"]): row for row in rows if int(row["adapters"]) == most}


def block(rows: list[Row], crashes: list[Row]) -> str:
    """What stands on the page."""
    found = newest(rows)
    one, kills = next(iter(found.values())), max(crashes, key=lambda row: int(row["kills"]))
    lines = [
        f"{int(one['adapters']):,} adapters; {one['device']}, one thread; {one['disk']}; {one['date']}; "
        f"{one['versions']}; revision {one['revision']}.",
        "",
        f"| | store | {FOLDERS} | |",
        "|---|---|---|---|",
    ]
    for measure, label in MEASURES.items():
        cells = [found.get((side, measure)) for side in (STORE, FOLDERS)]
        if any(cells):
            values = " | ".join("" if cell is None else f"{_number(cell)} {cell['unit']}" for cell in cells)
            notes = dict.fromkeys(cell["note"] for cell in cells if cell is not None and cell["note"])
            lines.append(f"| {label} | {values} | {'; '.join(notes)} |")
    runs = [row for row in rows if row["measure"] == "add, batched" and row["adapters"] == one["adapters"]]
    told = [f"{_number(row)} {row['unit']} ({row['disk'].partition(',')[0]})" for row in runs]
    lines += [
        "",
        f"Additions in every run of this size, beside what else the machine did: {'; '.join(told)}.",
        "",
        "![Rate of additions and memory as the store grows](store/growth.png)",
        "",
        f"Kills: {int(kills['kills']):,} (seed {kills['seed']}, {kills['date']}, revision {kills['revision']}), "
        f"{int(kills['acknowledged']):,} calls acknowledged, {kills['lost']} lost, {kills['torn']} torn. "
        f"They hit: {kills['within']}.",
        "",
    ]
    return "\n".join(lines)


def with_block(page: str, text: str) -> str:
    """The page with another text between its marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}{text}{END}{rest.partition(END)[2]}"


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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Write the page and the plot."""
    rows = rows_of(RESULTS / "store.csv")
    PAGE.write_text(
        with_block(PAGE.read_text(encoding="utf-8"), block(rows, rows_of(RESULTS / "crash.csv"))), encoding="utf-8"
    )
    plot(newest(rows), PLOT)
    print(f"wrote {PAGE} and {PLOT}")


def _number(row: Row) -> str:
    value = float(row["value"])
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()

"""The rows of the study of ``fuse_rounding`` to its page: what a rounded sum changes, beside what the last bits do."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from math import sqrt
from pathlib import Path

from benchmarks.tables import span, table
from studies.rounding import BATCH, LAST, STEPS, TARGETS, TRAINED
from studies.sweep_rows import Row

INTRODUCTION = """\
# Rounded sums

Written by `python -m studies rounding` from the rows in `benchmarks/results/rounding.csv`, four lines a cell, which it
makes where they are missing if it is given `--data`. Do not edit this page.

`fuse_rounding` of a configuration says whether training may make `W0 + ΔW` one matrix where the base weight is in
bfloat16 or float16 ([performance](performance.md) has the price and the gain). Evaluation and merging are exact
whatever it says, and so is every row of this page evaluated. The rows differ in the product of training alone:

| row | `contraction` | `fuse_rounding` | |
|---|---|---|---|
| exact | `"weight"` | `"none"` | ΔW has a product of its own |
| token order | `"token"` | `"none"` | as exact, summed in another order: how far runs part by their last bits |
| nearest | `"weight"` | `"nearest"` | one matrix; what is below half of the last bit of W0 has no effect |
| stochastic | `"weight"` | `"stochastic"` | one matrix, each entry rounded to a neighbour at random |
"""
CANNOT = """\
## What this cannot show

Runs of {steps} steps with {batch} rows each, on models of 0.26 and 22.7 million parameters: whether a ΔW that grows
over thousands of steps, or the smaller ΔW of a fine-tuning of a large model, is lost to `"nearest"` is not seen here;
nor is anything in float16. On E2E runs that differ by nothing but their last bits part by more than half of ΔW: there
the distance tells nothing of a rounding, only the losses do. No texts were generated, so there is no BLEU. Differences
below twice their error decide nothing, and with {seeds} seeds an error is
itself known to a factor of about two.
"""
Cells = Mapping[tuple[str, str], Mapping[str, Mapping[int, Row]]]
"""Set and method → product → seed → row."""


def write_rounding(rows: Sequence[Row], page: Path) -> None:
    """Write the page.

    Args:
        rows: of the study.
        page: the Markdown file.
    """
    cells = cells_of(rows)
    parts = [INTRODUCTION, *_measured(rows, cells), "## The default\n", verdict(cells) + "\n"]
    steps = " or ".join(sorted({row["steps"] for row in rows})) or "no"
    parts.append(CANNOT.format(steps=steps, batch=BATCH, seeds=len({row["seed"] for row in rows})))
    page.write_text("\n".join(parts), encoding="utf-8")


def cells_of(rows: Sequence[Row]) -> Cells:
    """The rows by what they are of."""
    found: dict[tuple[str, str], dict[str, dict[int, Row]]] = {}
    for row in rows:
        own = found.setdefault((row["set"], row["method"]), {})
        own.setdefault(row["product"], {})[int(row["seed"])] = row
    return found


def _measured(rows: Sequence[Row], cells: Cells) -> Iterator[str]:
    yield "## What was measured\n"
    if not rows:
        yield "No rows yet.\n"
        return
    yield (
        f"{span(row['date'] for row in rows)}, revision {', '.join(sorted({row['revision'] for row in rows}))}; base "
        "weights in bfloat16 under autocast on a CPU, default size and rate of each method, "
        f"mean ± standard error over seeds. *Train loss*: of the last {LAST} steps. *Loss above exact*: that of the "
        "held-out rows, seed by seed. *Distance*: of ΔW to that of the exact run of the seed, relative to it.\n"
    )
    for name in STEPS:
        heads = ["method", "product", "seeds", "score", "loss", "train loss", "loss above exact", "distance of ΔW"]
        lines: list[list[str]] = []
        metric = ""
        for method in TRAINED:
            for product, by_seed in cells.get((name, method), {}).items():
                metric = next(iter(by_seed.values()))["metric"]
                columns = [_mean([float(row[key]) for row in by_seed.values()])
                           for key in ("score", "eval_loss", "train_loss")]  # fmt: skip
                above = "" if product == "exact" else _told(*gap(cells[name, method], product))
                distance = "" if product == "exact" else _mean([float(row["distance"]) for row in by_seed.values()])
                lines.append([method, product, f"{len(by_seed)}", *columns, above, distance])
        yield f"**{name}**, {', '.join(TARGETS[name])}, {STEPS[name]} steps of {BATCH}; score: {metric}\n"
        yield table(heads, lines, left=2) + "\n"


def gap(cell: Mapping[str, Mapping[int, Row]], product: str) -> tuple[float, float]:
    """How much higher than the exact run's its loss on held-out rows is, and the standard error of that."""
    shared = sorted(cell[product].keys() & cell["exact"].keys())
    gaps = [float(cell[product][seed]["eval_loss"]) - float(cell["exact"][seed]["eval_loss"]) for seed in shared]
    return statistics.fmean(gaps), statistics.stdev(gaps) / sqrt(len(gaps)) if len(gaps) > 1 else float("nan")


def verdict(cells: Cells) -> str:
    """What the rows say of each rounding, and the default that follows."""
    lines: list[str] = []
    for product in ("nearest", "stochastic"):
        lost: list[str] = []
        further: list[float] = []
        for (name, method), cell in cells.items():
            mean, error = gap(cell, product)
            if mean > 2 * error:
                lost.append(f"{name}, {method} ({_told(mean, error)})")
            parted = [statistics.fmean(float(row["distance"]) for row in cell[one].values())
                      for one in (product, "token order")]  # fmt: skip
            further.append(parted[0] / parted[1])
        told = f"more than twice its error above exact in {'; '.join(lost)}" if lost else "nowhere above exact by twice"
        told += "" if lost else " its error"
        lines.append(
            f'- `"{product}"`: the loss is {told}; ΔW parts from that of the exact run '
            f"{min(further, default=0):.2f} to {max(further, default=0):.2f} times as far as token order's does."
        )
    lines.append(
        '\nThe default is `"none"`: a default must lose nothing on models and lengths that nobody watches, and rows of '
        "runs this short do not say so, whatever they show. Who trains in half precision on tensor cores and counts "
        'steps by the hour may take `"stochastic"`, which is right in the mean, and compare a short run of both.'
    )
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    error = statistics.stdev(values) / sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values):.4f} ± {error:.4f}"


def _told(mean: float, error: float) -> str:
    return f"{mean:+.4f} ± {error:.4f}"

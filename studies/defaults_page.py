"""The rows of the sweep to the page of defaults: what each method takes, and how far that is from its best."""

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path

from benchmarks.tables import span, table
from randbasis.train.default_choices import HEAD_RATES, METHODS, SIZED_BY, SWEPT, choose
from studies.plots import plot_sweep
from studies.sweep import CONTROLS, HEAD_RATE, SETS, default_rate, grid_points, task_of
from studies.sweep_rows import Point, Row, best_of, points_of

SMALL = 0.01
"""The criterion: within a point of the best, or 5 % of what the best takes off the loss."""
OF_THE_GAIN = 0.05
LEARNED = 0.075
"""What a metric has to gain for a set to tell rates apart: three standard errors of 400 answers by chance."""
INTRODUCTION = """\
# Defaults

Written by `make sweep-defaults` from the rows in `benchmarks/results/defaults.csv`, one line a run, which it makes
where they are missing. Do not edit this page.

Where `randbasis train` is given no learning rate, rank, basis, alpha, warmup or schedule, it takes those of
`randbasis.train.default_choices`, and says so with the reasons in its summary. A rate
that is given is taken as it is, and so is `--head-learning-rate`; `auto` asks for the default by its name.
"""
BETWEEN = """\
A rate falls with the width of the base: `rate = table · (swept width / width) ^ falls`, rounded to one digit. Widths
64, 192 and 384 were measured, each with a task of its own; larger ones are extrapolated, with a power by which the
rates that were published for widths of 768 to 4,096 ([methods](methods.md)) come out within a factor of about three.

It rises where rank or basis matrices are few ([one learning rate](results/rates.md)): below the size in the column
*few*, with the square root of what is lacking, by half a decade at most.
"""


MISSES = """\
The aim was a point of the metric, or 5 % of what the best rate takes off the loss for E2E. A gap is that of the seeds
which both rates were run with. What the held-out rows add to its error (400 of them, 240 of flowers12, the same for all
rates) is about a point. A gap below twice its error decides nothing, nor does a row with one rate.
"""
PEFT_RECIPE = ("32", "0.001")
"""Alpha and learning rate."""
SIZES_OF = ("e2e", "nola")
"""The set and the method that the number of basis matrices was chosen by."""
PICTURE = "defaults/rates.png"
"""Beside the page."""


def write_page(rows: Sequence[Row], page: Path) -> None:
    """Write the page and its picture.

    Args:
        rows: of the sweep.
        page: the Markdown file.
    """
    points = {key: rates for key, rates in grid_points(rows).items() if key[0] not in CONTROLS}
    plot_sweep(points, default_rate, page.parent / PICTURE)
    parts = [INTRODUCTION, "## What is taken\n", _table_of_defaults() + "\n", BETWEEN, *_measured(rows)]
    page.write_text("\n".join(parts), encoding="utf-8")


def _table_of_defaults() -> str:
    lines = [
        [
            method,
            "" if own.rank is None else f"{own.rank}",
            ", ".join(["" if own.basis is None else f"{own.basis}", *(f"{t} {n}" for t, n in own.basis_for.items())]),
            "" if own.scale is None else f"{own.scale:g}",
            *(f"{own.rates[task]:g}" for task in SWEPT),
            f"{own.falls:g}",
            "" if own.few is None else f"{SIZED_BY[method]} {own.few}",
        ]
        for method, own in METHODS.items()
    ]
    heads = [
        "method",
        "rank",
        "basis",
        "alpha / rank",
        *(f"{t}, width {w}" for t, (_, w) in SWEPT.items()),
        "falls",
        "few",
    ]
    head = "; ".join(f"{task} {rate:g}" for task, rate in HEAD_RATES.items())
    return f"{table(heads, lines)}\n\nLearning rate of a head beside an adapter: {head}, at any width."


def _measured(rows: Sequence[Row]) -> Iterator[str]:
    points = grid_points(rows)
    revisions = ", ".join(sorted({row["revision"] for row in rows if row["revision"]}))
    yield "## What was measured\n"
    yield (
        f"{span(row['date'] for row in rows)}, revision {revisions}; float32, linear schedule, batches of 16, all "
        f"linear layers, head at {HEAD_RATE:g}; scored on rows held out from training. Where several seeds were run it "
        "is their mean ± its standard error, over order of rows, head and basis. ° marks rows of an earlier revision, "
        "whose warm-up began at a rate of 0. Bold: the default; star: the best.\n"
    )
    yield f"![score against learning rate]({PICTURE})\n"
    misses: list[str] = []
    for name in SETS:
        own = {method: points[name, method] for method in METHODS if (name, method) in points}
        if own:
            about = next(row for row in rows if row["set"] == name)
            text, missed = _of_set(name, own, about)
            misses += missed
            yield text
    yield "## Where the default misses\n"
    yield MISSES
    yield "\n".join(misses or ["- Nowhere, of what was measured."]) + "\n"
    yield from _sizes(rows)
    yield from _beside_peft(rows)


def _of_set(name: str, own: Mapping[str, Mapping[float, Point]], about: Row) -> tuple[str, list[str]]:
    """The table of a set, and a line for each method whose default misses."""
    rates = sorted({rate for points in own.values() for rate in points})
    lines: list[list[str]] = []
    misses: list[str] = []
    for method, points in own.items():
        taken = default_rate(name, method)
        best = best_of(points, taken)
        cells = [_cell(points.get(rate), rate == taken, rate == best) for rate in rates]
        lines.append([method, *cells, _gap(points, taken, best)])
        if taken not in points:
            misses.append(f"- {name}, {method}: {taken:g} was not run.")
        elif _misses(points, taken, best):
            misses.append(f"- {name}, {method}: {taken:g} is at {_gap(points, taken, best)} against {best:g}.")
    text = f"{about['metric']} after {about['steps']} steps (before: {about['before']})"
    if about["metric"] != "loss" and max(map(_highest, own.values())) < float(about["before"]) + LEARNED:
        text = f"{text}. No rate gains what three standard errors of chance are ({LEARNED}): none is chosen by this set"
        misses = [f"- {name}: nothing to choose by."]
    heads = ["method", *(f"{rate:g}" for rate in rates), "default − best"]
    return f"### {name}\n\n{text}.\n\n{table(heads, lines)}\n", misses


def _highest(points: Mapping[float, Point]) -> float:
    return max(point.worth for point in points.values())


def _misses(points: Mapping[float, Point], taken: float, best: float) -> bool:
    return -points[taken].over(points[best])[0] > _allowed(points[best])


def _allowed(best: Point) -> float:
    return OF_THE_GAIN * (best.before - best.mean) if best.metric == "loss" else SMALL


def _gap(points: Mapping[float, Point], taken: float, best: float) -> str:
    if taken not in points:
        return "?"
    if taken == best:
        return "0"
    gap, error = points[taken].over(points[best])
    per_cent = points[best].metric == "loss"
    unit = 100 / (points[best].before - points[best].mean) if per_cent else 100
    return _with_error(unit * gap, None if error is None else unit * error, 1) + (" % of the gain" if per_cent else "")


def _cell(point: Point | None, taken: bool, best: bool) -> str:
    if point is None:
        return ""
    text = _with_error(point.mean, point.error, 3) if isfinite(point.mean) else "diverged"
    text += "°" * point.earlier + "*" * best
    return f"**{text}**" if taken else text


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _beside_peft(rows: Sequence[Row]) -> Iterator[str]:
    """LoRA as it is trained here and with scale and rate of PEFT's quick tour."""
    found = [row for row in rows if row["method"] == "lora" and (row["alpha"], row["rate"]) == PEFT_RECIPE]
    lines: list[list[str]] = []
    for (name, method), rates in points_of(found).items():
        (theirs,), ours = rates.values(), grid_points(rows)[name, method][default_rate(name, method)]
        lines.append([name, _cell(ours, True, False), _cell(theirs, False, False)])
    if not lines:
        return
    yield "## LoRA of rank 8 beside PEFT's recipe\n"
    yield "alpha 32 and a rate of 0.001 are those of PEFT's quick tour, in the loop and on the layers of the sweep.\n"
    yield table(["set", "default", "alpha 32, 0.001"], lines) + "\n"


def _sizes(rows: Sequence[Row]) -> Iterator[str]:
    """What more basis matrices are worth at the default rate, beside the size of LoRA of rank one."""
    taken, usual = default_rate(*SIZES_OF), METHODS[SIZES_OF[1]].basis or 0
    lora = next(row for row in rows if (row["set"], row["method"], row["rank"]) == (SIZES_OF[0], "lora", ""))
    rank_one = int(lora["coefficients"]) / (METHODS["lora"].rank or 1)
    chosen = choose(SIZES_OF[1], task_of(SIZES_OF[0]), None)["basis"].value
    own = [row for row in rows if (row["set"], row["method"]) == SIZES_OF and float(row["rate"]) == taken]
    lines: list[list[str]] = []
    for basis in sorted({int(row["basis"] or usual) for row in own}):
        same = [row for row in own if int(row["basis"] or usual) == basis]
        count = int(same[0]["coefficients"])
        score = _cell(points_of(same)[SIZES_OF][taken], basis == chosen, False)
        lines.append([f"{basis}", f"{count:,}", f"{4 * count / 1000:.0f}", f"{count / rank_one:.2g}", score])
    yield "## How many basis matrices\n"
    yield f"{SIZES_OF[1]} on {SIZES_OF[0]} at {taken:g}; the size is also given in units of LoRA of rank one.\n"
    yield table(["basis", "coefficients", "kB, 32 bits", "LoRA r=1", "loss"], lines, left=0) + "\n"

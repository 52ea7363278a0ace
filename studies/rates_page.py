"""The trials of all comparisons to the page that says where one learning rate carries over, and a picture."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.plots import write
from benchmarks.tables import table
from randbasis.train.default_choices import METHODS, RISE, SIZED_BY
from studies.plots import COLOURS
from studies.rates import DECIDES, Trials

PICTURE = "rates.png"
"""Beside the page."""
INTRODUCTION = """\
# Does one learning rate carry over?

Written by `make study-rates` from the trials of all comparisons (`benchmarks/results/*.jsonl`). Do not edit this page.

Every row of a study tries learning rates half a decade apart around `train`'s for the usual size of its method, by the
loss on held-out rows. *Usual* is that rate, *auto* is what `randbasis train` takes for the size of the row: below a
number of terms it rises with the square root of what is lacking, by {rise:.3g} at most. What a rate costs is the share
of the row's gain over the base alone that it leaves behind, read between two rates that were tried on a straight line
over the logarithm, which makes a rate between them look worse than it is. *Noise* is twice the standard deviation over
the seeds of the final runs, in the same share. A star: the best of those tried is the smallest or largest, so that a
better one may lie beyond. Rows that gain less than {decides:.0%} of the loss in a trial are left out: there is nothing
to choose by. So are rows with shared coefficients or another start, and runs that another study has, too. *Steps* are
those of a trial; one of few steps wants a higher rate than the whole run.
"""


def write_rates(found: Sequence[Trials], page: Path) -> None:
    """Write the page and its picture.

    Args:
        found: rows with all their trials.
        page: the Markdown file.
    """
    decisive = [one for one in found if one.decides]
    parts = [INTRODUCTION.format(rise=RISE, decides=DECIDES), "## By method\n"]
    if not decisive:
        parts.append("No rows yet.\n")
    else:
        plot_rates(decisive, page.parent / PICTURE)
        parts += [by_method(decisive) + "\n", f"![best rate against size]({PICTURE})\n", "## Every row\n"]
        parts.append(every_row(decisive) + "\n")
    parts.append(f"Rows with nothing to choose by: {len(found) - len(decisive)}.\n")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(parts), encoding="utf-8")


def by_method(found: Sequence[Trials]) -> str:
    """What the usual rate and the rule cost over the rows of a method, and how often the rule is within the noise."""
    lines: list[list[str]] = []
    for method in METHODS:
        own = [one for one in found if one.method == method]
        if not own:
            continue
        few = METHODS[method].few
        known = [one for one in own if one.noise_share is not None]
        within = sum(one.cost(one.auto) <= (one.noise_share or 0.0) for one in known)
        costs = [one.cost(one.usual) for one in own], [one.cost(one.auto) for one in own]
        lines.append(
            [
                method,
                "" if few is None else f"{SIZED_BY[method]} below {few}",
                f"{len(own)}",
                *(f"{_percent(statistics.fmean(values))}, {_percent(max(values))}" for values in costs),
                f"{within} of {len(known)}" if known else "",
            ]
        )
    heads = ["method", "rises", "rows", "usual: mean, worst", "auto: mean, worst", "auto within noise"]
    return table(heads, lines, left=2)


def every_row(found: Sequence[Trials]) -> str:
    """The best rate of each, and what the two rules cost."""
    lines = [
        [
            one.study, one.data, one.row, f"{one.steps}", f"{one.size}",
            f"{one.best / one.usual:.2g}{'*' if one.at_edge else ''}", f"{one.auto / one.usual:.2g}",
            _percent(one.cost(one.usual)), _percent(one.cost(one.auto)),
            "" if one.noise_share is None else _percent(one.noise_share),
        ]
        for one in found
    ]  # fmt: skip
    heads = ["study", "data", "row", "steps", "size", "best / usual", "auto / usual", "cost of usual", "cost of auto",
             "noise"]  # fmt: skip
    return table(heads, lines, left=3)


def plot_rates(found: Sequence[Trials], path: Path) -> None:
    """Best rate by the usual one against size, a mark a row and the rule as a line, a panel a method.

    Args:
        found: rows.
        path: the picture.
    """
    from matplotlib.figure import Figure

    methods = [method for method in METHODS if any(one.method == method for one in found)]
    figure = Figure(figsize=(2.6 * len(methods), 2.8), layout="constrained")
    axes: Any = figure.subplots(1, len(methods), squeeze=False, sharey=True).ravel()
    for panel, method in zip(axes, methods, strict=True):
        own = sorted((one for one in found if one.method == method), key=lambda one: one.size)
        for one in own:
            edge = {"fillstyle": "none"} if one.at_edge else {}
            panel.plot([one.size], [one.best / one.usual], "o", color=COLOURS[method], alpha=0.6, **edge)
        panel.plot([one.size for one in own], [one.auto / one.usual for one in own], color="black", linewidth=0.8)
        panel.set(xscale="log", yscale="log", title=method, xlabel=SIZED_BY[method])
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("best rate / usual rate")
    write(figure, path)


def _percent(share: float) -> str:
    return "diverged" if math.isinf(share) else f"{100 * share:.1f} %"

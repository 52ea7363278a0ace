"""Rows to pictures: overhead of a training step by method, growth on logarithmic axes, decoding."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import Run
from benchmarks.tables import method_of

OURS, THEIRS = "#1f6fb2", "#b0b0b0"


def draw(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Make every picture that there are rows for.

    Args:
        runs: the newest of each case.
        folder: where they go.
    """
    drawn: list[Path] = []
    pictures: tuple[tuple[str, Callable[[Sequence[Run]], Any]], ...] = (
        ("step", _bars),
        ("decode", _bars),
        ("memory", _bars),
        ("growth", _growth),
        ("memory growth", _growth),
    )
    for family, picture in pictures:
        chosen = [run for run in runs if run.family == family]
        if chosen:
            drawn.append(folder / f"{family.replace(' ', '_')}.png")
            write(picture(chosen), drawn[-1], dots_an_inch=100)
    return drawn


def write(figure: Any, path: Path, dots_an_inch: int = 110) -> None:
    """Write a figure as a PNG that says nothing of what wrote it, into a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dots_an_inch, metadata={"Software": None})


def _bars(runs: Sequence[Run]) -> Any:
    """The ratio to the first side with p20 to p80, a panel a case."""
    from matplotlib.figure import Figure

    heights = [0.24 * len(run.rows) + 0.7 for run in runs]
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    panels = figure.subplots(len(runs), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, run in zip(panels, runs, strict=True):
        sides = [row["side"] for row in run.rows]
        ratios = [float(row["ratio"]) for row in run.rows]
        below = [max(0.0, ratio - float(row["ratio_p20"])) for ratio, row in zip(ratios, run.rows, strict=True)]
        above = [max(0.0, float(row["ratio_p80"]) - ratio) for ratio, row in zip(ratios, run.rows, strict=True)]
        colours = [THEIRS if side.startswith(("PEFT", "published", "base")) else OURS for side in sides]
        axes.barh(sides, ratios, xerr=[below, above], color=colours, error_kw={"linewidth": 0.8})
        axes.invert_yaxis()
        axes.axvline(1.0, color="black", linewidth=0.6)
        if max(ratios) > 4:
            axes.set_xscale("log")
            _plain_ticks(axes.xaxis, [1, 2, 4, 8])
        axes.set_title(f"{run.case}: ratio to {sides[0]}", fontsize=9)
        axes.tick_params(labelsize=7)
    return figure


def _growth(runs: Sequence[Run]) -> Any:
    """A panel an axis, a line a method, both axes logarithmic."""
    from matplotlib.figure import Figure

    axes_names = list(dict.fromkeys(str(run.parameters["axis"]) for run in runs))
    figure = Figure(figsize=(3.2 * len(axes_names), 3.4), layout="constrained")
    panels = figure.subplots(1, len(axes_names), squeeze=False)[0]
    quantity = runs[0].rows[0]["quantity"]
    for panel, axis in zip(panels, axes_names, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for run in runs:
            if run.parameters["axis"] == axis:
                for side, timing in run.timings.items():
                    point = (float(run.parameters[axis]), statistics.median(timing.values))
                    lines.setdefault(method_of(side), []).append(point)
        for name, points in lines.items():
            panel.loglog(*zip(*sorted(points), strict=True), marker="o", markersize=3, linewidth=1, label=name)
        _plain_ticks(panel.xaxis, sorted({int(x) for points in lines.values() for x, _ in points}))
        _plain_ticks(panel.yaxis)
        panel.set_xlabel(axis, fontsize=8)
        panel.set_ylabel(quantity, fontsize=8)
        panel.tick_params(labelsize=7)
        panel.legend(fontsize=6)
    return figure


def _plain_ticks(axis: Any, places: Sequence[int] | None = None) -> None:
    """Plain numbers instead of powers of ten on a logarithmic axis, at some places or wherever there is room."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(FixedLocator(places) if places else LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())

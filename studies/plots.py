"""Records and rows of the sweep to pictures: a panel a setting, a line a row, the frozen base as a mark to beat."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.plots import write
from studies.study import Record, Study
from studies.sweep_rows import Points
from studies.tables import PERCENT, Line, line_names, lines_of

COLOURS = {"lora": "tab:gray", "nola": "tab:blue", "vera": "tab:green", "randlora": "tab:orange",
           "pranc": "tab:red", "loraxs": "tab:purple"}  # fmt: skip


def plot_study(study: Study, records: list[Record], path: Path) -> None:
    """Write a PNG; error bars are one standard deviation, the dashed line is the frozen base.

    Args:
        study: what was compared.
        records: usable ones.
        path: the picture.
    """
    from matplotlib.figure import Figure

    count, names = len(study.settings), line_names(study)
    figure = Figure(figsize=(2.2 + 2.9 * count, 0.8 + 0.36 * len(names)), layout="constrained")
    axes: Any = figure.subplots(1, count, squeeze=False, sharey=True)[0]
    for panel, setting in zip(axes, study.settings, strict=True):
        lines = lines_of(study, setting, records)
        metric = next((m for m in study.metrics if any(line.scores.get(m) for line in lines)), study.metrics[0])
        _draw(panel, lines, metric, names)
        panel.set_title(setting.name, fontsize=10)
        panel.set_xlabel(metric + (", %" if metric in PERCENT else ""))
    write(figure, path)


def plot_sweep(points: Points, taken: Callable[[str, str], float], path: Path) -> None:
    """Write a PNG: score against learning rate, a line a method, a ring around what is taken.

    Args:
        points: of the sweep.
        taken: set and method → the default.
        path: the picture.
    """
    from matplotlib.figure import Figure

    sets = list(dict.fromkeys(name for name, _ in points))
    figure = Figure(figsize=(11, 3.1 * -(-len(sets) // 3)), layout="constrained")
    axes: Any = figure.subplots(-(-len(sets) // 3), 3, squeeze=False).ravel()
    for panel in axes[len(sets) :]:
        panel.set_visible(False)
    for panel, name in zip(axes, sets, strict=False):
        for method, rates in ((m, found) for (of, m), found in points.items() if of == name):
            colour, at = COLOURS[method], taken(name, method)
            means, errors = [p.mean for p in rates.values()], [p.error or 0.0 for p in rates.values()]
            panel.errorbar(list(rates), means, yerr=errors, marker=".", linewidth=1, color=colour, label=method)
            if at in rates:
                panel.plot([at], [rates[at].mean], "o", markersize=10, fillstyle="none", color=colour)
            panel.axhline(rates[next(iter(rates))].before, color="black", linestyle="--", linewidth=0.6)
            panel.set_ylabel(next(iter(rates.values())).metric)
        panel.set_xscale("log")
        panel.set_title(name, fontsize=10)
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    write(figure, path)


def _draw(panel: Any, lines: list[Line], metric: str, names: list[str]) -> None:
    factor = 100 if metric in PERCENT else 1
    panel.set_yticks(range(len(names)), names, fontsize=9)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.grid(alpha=0.3)
    for line in lines:
        mean, deviation = factor * line.mean(metric), factor * line.deviation(metric)
        colour = COLOURS.get(line.row.method, "black")
        panel.errorbar(mean, names.index(line.name), xerr=deviation, marker="o", capsize=3, color=colour)
        if not line.row.adapted:
            panel.axvline(mean, color="black", linestyle="--", linewidth=1)

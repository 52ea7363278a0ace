"""Rows of the sweep to a picture: a panel a set, a line a method, the untrained base as a mark to beat."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.plots import write
from studies.sweep_rows import Points

COLOURS = {"lora": "tab:gray", "nola": "tab:blue", "vera": "tab:green", "randlora": "tab:orange",
           "pranc": "tab:red", "loraxs": "tab:purple"}  # fmt: skip


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

"""The course of a run as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from randbasis.optional import needing


def plot_losses(history: Sequence[Mapping[str, Any]], metric: str, path: str | Path, title: str = "") -> None:
    """Training loss, held-out loss and, where it is another, the chosen metric over the steps, as PNG.

    Args:
        history: entries with ``step`` and ``loss``, or ``eval_loss`` and ``eval_<metric>``.
        metric: the chosen metric.
        path: the file to write.
        title: above the picture.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    with needing("the loss plot", "matplotlib", "train"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training loss", "-"), ("eval_loss", "held-out loss", "o-")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot([x for x, _ in points], [y for _, y in points], style, label=label, markersize=3)
    lines, names = axes.get_legend_handles_labels()
    points = [(entry["step"], entry[f"eval_{metric}"]) for entry in history if f"eval_{metric}" in entry]
    if metric != "loss" and points:
        other = axes.twinx()
        lines += other.plot([x for x, _ in points], [y for _, y in points], "s--", color="tab:green", markersize=3)
        names.append(f"held-out {metric}")
        other.set_ylabel(metric)
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.legend(lines, names, loc="best", frameon=False)
    figure.savefig(path, dpi=120)

"""Records to a picture: the metric against the number of coefficients, one panel a setting."""

from pathlib import Path
from typing import Any

from randbasis.compare.study import Record, Study
from randbasis.compare.tables import PERCENT, Line, lines_of

COLOURS = {"lora": "tab:gray", "nola": "tab:blue", "vera": "tab:green", "randlora": "tab:orange"}
DOTS_AN_INCH = 110


def plot_study(study: Study, records: list[Record], path: Path) -> None:
    """Write a PNG; error bars are one standard deviation, the dashed line is the frozen base.

    Args:
        study: what was compared.
        records: usable ones.
        path: the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(study.settings)
    figure = Figure(figsize=(1.0 + 3.6 * count, 3.6), layout="constrained")
    axes: Any = figure.subplots(1, count, squeeze=False)[0]
    for panel, setting in zip(axes, study.settings, strict=True):
        _draw(panel, lines_of(study, setting, records), study.metrics[0])
        panel.set_title(setting.name, fontsize=10)
    axes[0].set_ylabel(study.metrics[0] + (", %" if study.metrics[0] in PERCENT else ""))
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(path, dpi=DOTS_AN_INCH, metadata={"Software": None})


def _draw(panel: Any, lines: list[Line], metric: str) -> None:
    factor = 100 if metric in PERCENT else 1
    for line in lines:
        mean, deviation = factor * line.mean(metric), factor * line.deviation(metric)
        if not line.row.adapted:
            panel.axhline(mean, color="black", linestyle="--", linewidth=1)
            continue
        panel.errorbar(
            line.coefficients, mean, yerr=deviation, marker="o", capsize=3, color=COLOURS.get(line.row.method, "black")
        )
        name = line.row.name.split(",")[0]
        panel.annotate(name, (line.coefficients, mean), xytext=(5, 5), textcoords="offset points", fontsize=8)
    panel.set_xscale("log")
    panel.set_xlabel("coefficients")
    panel.grid(alpha=0.3)
    panel.margins(x=0.25)

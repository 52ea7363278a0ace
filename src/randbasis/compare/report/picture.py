"""LINES → PICTURES: a metric against the bytes of the file, a line a curve, in print and for colour-blind readers.

Up is better in every panel. Where no curve has two sizes, bytes tell nothing and each row is a dot with its interval.
A curve is told apart by its marker as well as by its colour: LoRA and its kin are black,
other methods of PEFT grey with hollow markers, ours have the colours of Okabe and Ito's palette.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from randbasis.compare.report import wording
from randbasis.compare.report.lines import Line, Results
from randbasis.compare.report.measures import CurvePoint, envelope
from randbasis.compare.study import NO_ADAPTER, WHOLE, Study
from randbasis.methods import METHODS
from randbasis.optional import needing

OURS = dict(zip(METHODS, ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7"), strict=False))
"""Method → its own colour; grey for those beyond the palette, as for the methods of others."""
LORAS = ("lora", "dora")
BLACK, GREY = "#000000", "#808080"
MARKERS = "osD^vP*X<>dp+1"
DASHES = ("-", "--", "-.", ":")
LEVELS = {NO_ADAPTER: ":", WHOLE: "--"}
"""Rows that are no points of a curve, but heights to compare with."""
INCHES_A_LETTER = 0.06
"""Of the legend."""
PANEL, ALONE = (3.6, 2.9), (6.4, 4.0)
"""Inches of a panel among others, and of one by itself."""
CURVES = (
    "Metric against bytes of the file; up is better. Lines join the points that beat every smaller file, with 95 % "
    "bands over the seeds; pale marks are the other points."
)
DOTS = "The metric of each row with its 95 % interval over the seeds; no curve has more than one size."
DOTS_AN_INCH = 130
ROOM_BELOW = 0.3
"""Of the way from the base to the best point, how far below the base a panel goes; points below are counted."""


@dataclass(frozen=True)
class Style:
    """How a curve is drawn.

    Attributes:
        colour: of line, markers and band.
        marker: one of matplotlib's.
        dash: of the line.
        filled: whether the markers are.
    """

    colour: str
    marker: str
    dash: str
    filled: bool


def styles_of(study: Study) -> dict[str, Style]:
    """Curve → style, the same in all pictures of a study; no two curves share colour, marker and dash."""
    methods = {row.curve: row.method for row in study.rows if row.adapted}
    found: dict[str, Style] = {}
    seen: dict[str, int] = {}
    few = len(methods) <= len(MARKERS)
    for i, (curve, method) in enumerate(methods.items()):
        colour = OURS.get(method, BLACK if method in LORAS else GREY)
        nth = seen[colour] = seen.get(colour, -1) + 1
        marker = MARKERS[(i if few else nth) % len(MARKERS)]
        found[curve] = Style(colour, marker, DASHES[nth % len(DASHES)], filled=colour != GREY)
    return found


def draw(study: Study, all_results: Sequence[Results], folder: Path) -> list[Path]:
    """Write a picture a data set that has runs, and of several data sets one of them all, which comes first.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    styles, shown = styles_of(study), [results for results in all_results if results.curves()]
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    if len(shown) > 1:
        written.append(folder / "all.png")
        _write(shown, styles, written[0])
    for results in shown:
        written.append(folder / f"{results.data.stem}.png")
        _write([results], styles, written[-1])
    return written


def caption(shown: Sequence[Results]) -> str:
    """What a picture of some data sets shows."""
    return CURVES if any(_has_sizes(results) for results in shown) else DOTS


def _plain(name: str) -> str:
    """A name as it is written: dollars would be mathematics."""
    return name.replace("$", r"\$")


def _write(shown: Sequence[Results], styles: Mapping[str, Style], path: Path) -> None:
    with needing("the report of a comparison", "matplotlib", "train"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    flat = caption(shown) == DOTS
    alone = flat or len(shown) == 1
    across, (width, height) = (1, ALONE) if alone else (2, PANEL)
    down = -(-len(shown) // across)
    heights = [0.8 + 0.17 * len(_dotted(results)) for results in shown] if flat else [height] * down
    names = [line.name for results in shown for line in results.lines if line.row.method in LEVELS]
    names = list(dict.fromkeys(([] if flat else [*styles]) + names))
    columns = max(1, int(width * across / (0.55 + INCHES_A_LETTER * max(map(len, (*names, ""))))))
    legend = 0.18 * -(-len(names) // columns)
    figure = Figure(figsize=(width * across, sum(heights) + legend + 0.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(down, across, squeeze=False, height_ratios=heights).ravel()
    handles: dict[str, Any] = {}
    for panel, results in zip(panels, shown, strict=False):
        handles |= _dots(panel, results, styles) if flat else _panel(panel, results, styles)
        panel.set_title(_plain(results.data.name), fontsize=10, loc="left" if flat else "center")
        panel.tick_params(labelsize=7.5)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    names = [name for name in names if name in handles]
    figure.legend([handles[name] for name in names], [_plain(name) for name in names], loc="outside lower center",
                  ncols=columns, fontsize=7.5, frameon=False, handlelength=2.6)  # fmt: skip
    figure.savefig(path, dpi=DOTS_AN_INCH, metadata={"Software": None})


def _has_sizes(results: Results) -> bool:
    """Whether any curve has more than one size."""
    return any(len({line.bytes for line in lines}) > 1 for lines in results.curves().values())


def _dotted(results: Results) -> list[Line]:
    return [line for lines in results.curves().values() for line in lines]


def _dots(panel: Any, results: Results, styles: Mapping[str, Style]) -> dict[str, Any]:
    """A line of the panel each row: its mean with the 95 % interval; what the legend says of the heights."""
    by, lines = wording.factor(results.metric), _dotted(results)
    for i, line in enumerate(lines):
        style, found = styles[line.row.curve], line.score(results.metric)
        if found:
            panel.errorbar(by * found.mean, i, xerr=by * (found.half or 0.0), marker=style.marker, markersize=5,
                           color=style.colour, markerfacecolor=style.colour if style.filled else "white",
                           capsize=2, linewidth=1)  # fmt: skip
    panel.set_yticks(range(len(lines)), [_plain(line.name) for line in lines])
    panel.set_ylim(len(lines) - 0.5, -0.5)
    better = "" if results.higher else " (left is better)"
    panel.set_xlabel(wording.metric_name(results.metric) + better, fontsize=8)
    left, right = panel.get_xlim()
    levels = _levels(panel.axvline, results)
    places = {name: float(handle.get_xdata()[0]) for name, handle in levels.items()}
    near = {name: at for name, at in places.items() if 2 * left - right <= at <= 2 * right - left}
    panel.set_xlim(min(left, *near.values(), right), max(left, *near.values(), right))
    far = [f"{name}: {at:.{wording.digits(results.metric)}f}" for name, at in places.items() if name not in near]
    panel.set_title(_plain("; ".join(far)), loc="right", fontsize=7.5, color=GREY)  # it may not squeeze the dots
    return {name: levels[name] for name in near}


def _levels(drawn: Callable[..., Any], results: Results) -> dict[str, Any]:
    """The rows that are no points of a curve, as lines across."""
    by = wording.factor(results.metric)
    found: dict[str, Any] = {}
    for line in results.lines:
        score = line.score(results.metric)
        if line.row.method in LEVELS and score:
            style = LEVELS[line.row.method]
            found[line.name] = drawn(by * score.mean, color=BLACK, linestyle=style, linewidth=0.9)
    return found


def _panel(panel: Any, results: Results, styles: Mapping[str, Style]) -> dict[str, Any]:
    """One data set; what the legend says of it."""
    metric, handles = results.metric, _levels(panel.axhline, results)
    for curve, lines in results.curves().items():
        handles[curve] = _curve(panel, lines, results, styles[curve])
    panel.set_xscale("log")
    _plain_bytes(panel)
    _limit(panel, results)
    if not results.higher:
        panel.invert_yaxis()
    panel.set_xlabel("bytes of the file", fontsize=8)
    panel.set_ylabel(wording.metric_name(metric) + ("" if results.higher else " (up is lower, better)"), fontsize=8)
    return handles


def _curve(panel: Any, lines: Sequence[Line], results: Results, style: Style) -> Any:
    """The line goes through the envelope with its band; the other points are pale."""
    by, kept = wording.factor(results.metric), _on_envelope(lines, results)
    sizes = [line.bytes for line in kept]
    found = [score for line in kept if (score := line.score(results.metric))]
    means = [by * one.mean for one in found]
    halves = [by * (one.half or 0.0) for one in found]
    face, mark = style.colour if style.filled else "white", {"marker": style.marker, "color": style.colour}
    low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
    if len(kept) > 1:
        panel.fill_between(sizes, low, high, color=style.colour, alpha=0.1, linewidth=0)
    else:
        panel.errorbar(sizes, means, yerr=halves, color=style.colour, capsize=2, linewidth=0.8, alpha=0.5)
    rest = [line for line in lines if line not in kept]
    pale = [by * statistics.fmean(line.scores[results.metric].values()) for line in rest]
    panel.plot(
        [line.bytes for line in rest], pale, linestyle="", markersize=3.5, alpha=0.45, markerfacecolor=face, **mark
    )
    thick = 2.0 if lines[0].row.curve == results.anchor else 1.2
    (handle,) = panel.plot(
        sizes, means, linestyle=style.dash, linewidth=thick, markersize=5, markerfacecolor=face, **mark
    )
    return handle


def _on_envelope(lines: Sequence[Line], results: Results) -> list[Line]:
    """The lines whose points are on the curve's envelope, by bytes."""
    points = [CurvePoint(line.bytes, statistics.fmean(line.scores[results.metric].values())) for line in lines]
    return [lines[points.index(one)] for one in envelope(points, higher=results.higher)]


def _limit(panel: Any, results: Results) -> None:
    """No point far below the base may squeeze the others; how many are out of the panel is said."""
    base = results.base.score(results.metric) if results.base else None
    means = [point.score for curve in results.curves() for point in results.points(curve)]
    if base is None or not means:
        return
    sign = 1 if results.higher else -1
    best = max(sign * mean for mean in means)
    floor = sign * base.mean - ROOM_BELOW * (best - sign * base.mean)
    below = sum(sign * mean < floor for mean in means)
    if best > sign * base.mean and below:
        by = wording.factor(results.metric)
        panel.set_ylim(**{"bottom" if results.higher else "top": by * sign * floor})
        panel.text(0.98, 0.02, f"{below} below", transform=panel.transAxes, fontsize=7, ha="right", color=GREY)


def _plain_bytes(panel: Any) -> None:
    """``200 B``, ``5 kB`` instead of powers of ten; between decades where the axis is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    def told(value: float, _: Any) -> str:
        for unit, name in ((1e6, "MB"), (1e3, "kB")):
            if value >= unit:
                return f"{value / unit:g} {name}"
        return f"{value:g} B"

    low, high = panel.get_xlim()
    if high < 1.5 * low:  # a single size: room on both sides
        panel.set_xlim(low / 2, high * 2)
        low, high = panel.get_xlim()
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 150 else (1,)))
    panel.xaxis.set_major_formatter(FuncFormatter(told))
    panel.xaxis.set_minor_formatter(NullFormatter())

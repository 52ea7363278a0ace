"""Numbers as people read them: metrics in percent, bytes, intervals, learning rates."""

from collections.abc import Mapping
from typing import Any

from randbasis.compare.report.measures import DeltaRate, Interval, Reach
from randbasis.train.task import LOWER_IS_BETTER

_HUNDREDFOLD = {
    "accuracy": "accuracy, %",
    "f1": "F1, %",
    "f1_macro": "macro F1, %",
    "matthews": "Matthews, × 100",
    "pearson": "Pearson, × 100",
    "spearman": "Spearman, × 100",
}
_NAMED = {"bleu": "BLEU", "chrf": "chrF"}
_SHORT = {"rank": "r", "basis": "k = l"}


def factor(metric: str) -> int:
    """By which a metric is multiplied where people read it."""
    return 100 if metric in _HUNDREDFOLD else 1


def metric_name(metric: str) -> str:
    """With its unit."""
    return _HUNDREDFOLD.get(metric, _NAMED.get(metric, metric))


def bare_name(metric: str) -> str:
    """Without its unit."""
    return metric_name(metric).partition(",")[0]


def untagged(text: str) -> str:
    """A name in Markdown: a bracket of its own is no tag."""
    return text.replace("<", "&lt;")


def digits(metric: str) -> int:
    """After the point."""
    return 3 if metric in LOWER_IS_BETTER else 1


def score(found: Interval | None, metric: str, *, signed: bool = False) -> str:
    """Mean ± half the 95 % interval; the mean alone of a single run."""
    if found is None:
        return ""
    places, by = digits(metric), factor(metric)
    text = f"{by * found.mean:{'+' if signed else ''}.{places}f}".replace("-", "−")
    return text if found.half is None else f"{text} ± {by * found.half:.{places}f}"


def size(count: float) -> str:
    """Bytes."""
    return f"{count:,.0f}"


def rate(value: float | None, trials: int, *, at_edge: bool) -> str:
    """A learning rate, how many were tried, and a star where it was the smallest or largest of them."""
    if value is None:
        return ""
    return f"{value:g}{'*' if at_edge else ''}" + (f" ({trials})" if trials else "")


def configuration(found: Mapping[str, Any], method: str) -> str:
    """Hyper-parameters of a method, short."""
    short = _SHORT if method == "nola" else _SHORT | {"basis": "k"}  # PRANC sums one matrix, no two factors
    return ", ".join(f"{short.get(key, key)} = {_value(value)}" for key, value in found.items() if value is not None)


def times(ratio: float | None, places: int = 2) -> str:
    """A ratio."""
    return "" if ratio is None else f"{ratio:.{places}f}"


def milliseconds(seconds: float | None) -> str:
    """A time."""
    return "" if seconds is None else f"{1e3 * seconds:.3g}"


def megabytes(count: int) -> str:
    """Memory; empty where it is not known."""
    return f"{count / 1e6:.1f}" if count else ""


def ratio(found: Interval | None) -> str:
    """A perplexity to that before training."""
    if found is None:
        return ""
    return f"{found.mean:.3f}" + ("" if found.half is None else f" ± {found.half:.3f}")


def delta_rate(found: DeltaRate) -> str:
    """Bytes against the anchor's, or why there is no such number."""
    return f"none: {found.reason}" if found.percent is None else f"{found.percent:+.0f} %".replace("-", "−")


def overlap(found: DeltaRate, metric: str) -> str:
    """The range of the metric that a delta rate is over, the lower end first."""
    if found.overlap is None:
        return ""
    low, high = (f"{factor(metric) * end:.{digits(metric)}f}" for end in found.overlap)
    return f"{low} to {high}".replace("-", "−")


def on_envelope(found: DeltaRate) -> str:
    """How many points of a curve count."""
    return f"{found.used[0]} of {found.given[0]}"


def reach(found: Reach) -> str:
    """Bytes, at most so many bytes, or the share that was reached instead."""
    if found.best is None:
        return "nothing to gain"
    if found.bytes is None:
        return f"not reached ({100 * found.best:.0f} %)".replace("-", "−")
    return ("≤ " if found.at_most else "") + size(found.bytes)


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

"""NUMBERS → MEASURES: intervals over seeds, and curves of a metric against bytes compared at equal metric.

Nothing here knows a study. Where ``higher`` is asked for, it says whether a greater value of the metric is better.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from randbasis.optional import needing

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its interval of confidence.

    Attributes:
        mean: of the values.
        half: half the width of the 95 % interval of Student's t; None for a single value.
        count: how many values.
    """

    mean: float
    half: float | None
    count: int


@dataclass(frozen=True)
class CurvePoint:
    """Bytes of a file and what it scores."""

    bytes: float
    score: float


@dataclass(frozen=True)
class DeltaRate:
    """Bytes of a curve against those of an anchor at equal metric.

    Attributes:
        percent: negative where the curve needs fewer; None where the two cannot be compared.
        reason: why they cannot; else empty.
        overlap: the range of the metric that the average is over; None where there is none.
        used: points of the curve and of the anchor that lie on their envelopes.
        given: points of either.
    """

    percent: float | None
    reason: str
    overlap: tuple[float, float] | None
    used: tuple[int, int]
    given: tuple[int, int]


@dataclass(frozen=True)
class Reach:
    """The bytes at which a curve has a share of a gain.

    Attributes:
        bytes: interpolated; None where the curve does not get there.
        at_most: whether even the smallest file of the curve gets there, so that fewer bytes may do.
        best: the largest share that the curve reaches; None where there is nothing to gain.
    """

    bytes: float | None
    at_most: bool
    best: float | None


def interval(values: Sequence[float]) -> Interval | None:
    """The mean of some values and its 95 % interval; None without values."""
    count = len(values)
    if not count:
        return None
    mean = statistics.fmean(values)
    if count < 2:
        return Interval(mean, None, count)
    quantile = float(_scipy("stats").t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(count), count)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """``ours - theirs`` over the seeds that both have; None where there is no such seed."""
    return interval([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


def envelope(points: Sequence[CurvePoint], *, higher: bool) -> list[CurvePoint]:
    """The points that beat every smaller file, by bytes: a curve on which more bytes are strictly better.

    Of noisy points it keeps the lucky ones; a comparison of envelopes favours the curve with more points.
    """
    sign = 1 if higher else -1
    kept: list[CurvePoint] = []
    for point in sorted(points, key=lambda one: (one.bytes, -sign * one.score)):
        if not kept or sign * point.score > sign * kept[-1].score:
            kept.append(point)
    return kept


def delta_rate(curve: Sequence[CurvePoint], anchor: Sequence[CurvePoint], *, higher: bool) -> DeltaRate:
    """Bjøntegaard's delta rate of a curve against an anchor.

    The average difference of log10 bytes over the range of the metric that both reach, each curve being the piecewise
    cubic Hermite interpolation (PCHIP) of log10 bytes as a function of the metric through the points of its envelope
    (VCEG-M33 with the interpolation of JCTVC-L1100).
    """
    ours, theirs = envelope(curve, higher=higher), envelope(anchor, higher=higher)
    used, given = (len(ours), len(theirs)), (len(curve), len(anchor))
    for kept, whose in ((ours, "the curve"), (theirs, "the anchor")):
        if len(kept) < 2:
            told = "no point" if not kept else "a single point on its envelope"
            return DeltaRate(None, f"{whose} has {told}", None, used, given)
    low = max(min(one.score for one in kept) for kept in (ours, theirs))
    high = min(max(one.score for one in kept) for kept in (ours, theirs))
    if not low < high:
        above = (ours[0].score >= theirs[-1].score) if higher else (ours[0].score <= theirs[-1].score)
        reason = f"no metric that both reach: the curve is wholly {'better' if above else 'worse'}"
        return DeltaRate(None, reason, None, used, given)
    mean = (_log_bytes(ours).integrate(low, high) - _log_bytes(theirs).integrate(low, high)) / (high - low)
    return DeltaRate(100 * (10 ** float(mean) - 1), "", (low, high), used, given)


def bytes_to(points: Sequence[CurvePoint], base: float, whole: float, share: float, *, higher: bool) -> Reach:
    """The bytes at which a curve has ``share`` of the gain from ``base`` to ``whole``.

    Args:
        points: of the curve.
        base: metric without an adapter.
        whole: metric whose distance from ``base`` is the whole gain.
        share: of the gain, such as 0.95.
        higher: whether a greater metric is better.
    """
    kept, sign = envelope(points, higher=higher), 1 if higher else -1
    gain = sign * (whole - base)
    if not kept or not gain > 0:
        return Reach(None, False, None)
    best = sign * (kept[-1].score - base) / gain
    target = base + share * (whole - base)
    if sign * kept[0].score >= sign * target:
        return Reach(kept[0].bytes, True, best)
    if sign * kept[-1].score < sign * target:
        return Reach(None, False, best)
    return Reach(float(10 ** _log_bytes(kept)(target)), False, best)


def at_bytes(points: Sequence[CurvePoint], size: float) -> float | None:
    """The metric of a curve at a size, linear in log bytes between its points; None outside of them.

    All points count, not the envelope alone, so that no luck is chosen; points of equal bytes are averaged.
    """
    found: dict[float, list[float]] = {}
    for point in points:
        found.setdefault(point.bytes, []).append(point.score)
    sizes = sorted(found)
    if not sizes or not sizes[0] <= size <= sizes[-1]:
        return None
    right = next(i for i, one in enumerate(sizes) if one >= size)
    above = statistics.fmean(found[sizes[right]])
    if sizes[right] == size:
        return above
    below, left = statistics.fmean(found[sizes[right - 1]]), sizes[right - 1]
    return below + (above - below) * math.log(size / left) / math.log(sizes[right] / left)


def _log_bytes(kept: Sequence[CurvePoint]) -> Any:
    """Log10 bytes as a function of the metric, through at least two points of an envelope."""
    ordered = sorted(kept, key=lambda one: one.score)
    pchip = _scipy("interpolate").PchipInterpolator
    return pchip([one.score for one in ordered], [math.log10(one.bytes) for one in ordered])


def _scipy(part: str) -> Any:
    with needing("the report of a comparison", "scipy", "train"):
        from importlib import import_module

        return import_module(f"scipy.{part}")

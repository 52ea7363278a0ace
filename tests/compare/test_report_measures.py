"""Measures against hand-computed cases, tables of Student's t, and values of another implementation of BD rates."""

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from randbasis.compare.report.measures import CurvePoint, at_bytes, bytes_to, delta_rate, envelope, interval, paired


def curve(bytes_: Sequence[float], scores: Sequence[float]) -> list[CurvePoint]:
    return [CurvePoint(*one) for one in zip(bytes_, scores, strict=True)]


# --- intervals ---


def test_an_interval_by_hand():
    found = interval([1.0, 2.0, 3.0])
    assert found is not None
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t(0.975, 2), standard deviation 1
    assert interval([]) is None
    assert (single := interval([5.0])) is not None
    assert (single.mean, single.half, single.count) == (5.0, None, 1)


def test_paired_differences_are_by_seed_and_over_common_seeds_alone():
    found = paired({0: 10.0, 1: 20.0, 2: 31.0, 7: 99.0}, {2: 30.0, 1: 19.0, 0: 9.0, 5: -50.0})
    assert found is not None
    assert (found.mean, found.half, found.count) == (1.0, 0.0, 3)  # an unpaired interval would be wide
    assert paired({0: 1.0}, {1: 1.0}) is None


@given(st.lists(st.tuples(*[st.floats(-1e3, 1e3)] * 2), min_size=2, max_size=9))
def test_paired_intervals_against_scipy(pairs: list[tuple[float, float]]):
    ours, theirs = ({seed: pair[i] for seed, pair in enumerate(pairs)} for i in (0, 1))
    found = paired(ours, theirs)
    assert found is not None
    assert found.half is not None
    differences = [a - b for a, b in pairs]
    if found.half > 1e-9:
        low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
        assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high), rel=1e-6, abs=1e-6)


# --- envelopes ---


def test_an_envelope_keeps_what_beats_every_smaller_file():
    points = curve([100, 200, 300, 400, 400], [0.5, 0.7, 0.6, 0.7, 0.9])
    assert envelope(points, higher=True) == curve([100, 200, 400], [0.5, 0.7, 0.9])
    assert envelope(points, higher=False) == curve([100], [0.5])
    assert envelope([], higher=True) == []


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(-20, 20)), min_size=1, max_size=20))
def test_an_envelope_is_what_no_other_point_dominates(pairs: list[tuple[int, int]]):
    points = curve(*zip(*pairs, strict=True))
    for higher in (True, False):
        sign = 1 if higher else -1
        best = {
            one
            for one in points
            if not any(
                other != one and other.bytes <= one.bytes and sign * other.score >= sign * one.score for other in points
            )
        }
        found = envelope(points, higher=higher)
        assert set(found) == best
        assert [one.bytes for one in found] == sorted(one.bytes for one in found)


# --- Bjøntegaard's delta rate ---

#: Bit rates and PSNR of test cases 1 and 3 of FAU-LMS/bjontegaard, and those of VCEG-M33's usual example; the last
#: number is what ``bjontegaard.bd_rate(..., method="pchip", require_matching_points=False)`` of release 1.3.0 returns.
PUBLISHED = [
    (
        ([9487.76, 4593.60, 2486.44, 1358.24], [40.037, 38.615, 36.845, 34.851]),
        ([9787.80, 4469.00, 2451.52, 1356.24], [40.121, 38.651, 36.970, 34.987]),
        -4.417485350589045,
    ),
    (
        ([82472.76, 26875.24, 9487.76, 4593.6, 3600, 2900], [43.825, 41.404, 40.037, 38.615, 36.5, 35.1]),
        ([99896.96, 33952.04, 9787.8, 4469.0, 4040, 3300], [44.731, 41.875, 40.121, 38.651, 37, 36.5]),
        -2.9528024116427964,
    ),
    (
        ([686.76, 309.58, 157.11, 85.95], [40.28, 37.18, 34.24, 31.42]),
        ([893.34, 407.8, 204.93, 112.75], [40.39, 37.21, 34.17, 31.24]),
        31.379878202397627,
    ),
]


@pytest.mark.parametrize(("anchor", "test", "percent"), PUBLISHED)
def test_published_examples_against_another_implementation(anchor: tuple, test: tuple, percent: float):
    found = delta_rate(curve(*test), curve(*anchor), higher=True)
    assert found.percent == pytest.approx(percent, rel=1e-9)
    assert found.reason == ""
    worse = [[-score for score in side[1]] for side in (test, anchor)]
    lower = delta_rate(curve(test[0], worse[0]), curve(anchor[0], worse[1]), higher=False)
    assert lower.percent == pytest.approx(percent, rel=1e-9)


def test_half_the_bytes_at_every_metric_is_minus_fifty_percent():
    sizes, scores = [100, 300, 900, 5000], [0.5, 0.6, 0.8, 0.85]
    found = delta_rate(curve([size / 2 for size in sizes], scores), curve(sizes, scores), higher=True)
    assert found.percent == pytest.approx(-50)
    assert (found.overlap, found.used, found.given) == ((0.5, 0.85), (4, 4), (4, 4))


def test_two_points_a_curve_by_hand():
    # log10 bytes: anchor 2 + 2 m on [0, 1], curve 3 on average over the overlap [0.5, 1], where the anchor has 3.5
    found = delta_rate(curve([10**2.75, 10**3.25], [0.5, 1.0]), curve([100, 10_000], [0.0, 1.0]), higher=True)
    assert found.percent == pytest.approx(100 * (10**-0.5 - 1))
    assert found.overlap == (0.5, 1.0)


def test_the_integral_against_quadrature_of_hermite_cubics():
    """The cubic between two points by its textbook form, with slopes of Fritsch and Butland."""

    def hermite(x: Sequence[float], y: Sequence[float], at: float) -> float:
        h = [b - a for a, b in itertools.pairwise(x)]
        d = [(b - a) / step for a, b, step in zip(y, y[1:], h, strict=False)]
        inner = []
        for i in range(1, len(x) - 1):
            w1, w2 = 2 * h[i] + h[i - 1], h[i] + 2 * h[i - 1]
            inner.append((w1 + w2) / (w1 / d[i - 1] + w2 / d[i]))
        first = ((2 * h[0] + h[1]) * d[0] - h[0] * d[1]) / (h[0] + h[1])
        last = ((2 * h[-1] + h[-2]) * d[-1] - h[-1] * d[-2]) / (h[-1] + h[-2])
        slopes = [max(0.0, min(first, 3 * d[0])), *inner, max(0.0, min(last, 3 * d[-1]))]
        i = max(0, min(len(x) - 2, next((k for k, one in enumerate(x) if one > at), len(x) - 1) - 1))
        t = (at - x[i]) / h[i]
        left = (2 * t**3 - 3 * t**2 + 1) * y[i] + (t**3 - 2 * t**2 + t) * h[i] * slopes[i]
        return left + (3 * t**2 - 2 * t**3) * y[i + 1] + (t**3 - t**2) * h[i] * slopes[i + 1]

    ours = ([0.2, 0.5, 0.6, 0.9], [1.0, 2.0, 3.0, 3.2])
    theirs = ([0.1, 0.4, 0.8, 0.95], [1.5, 1.8, 3.5, 4.4])
    area = integrate.quad(lambda m: hermite(*ours, m) - hermite(*theirs, m), 0.2, 0.9, limit=400)[0]
    sides = [curve([10**size for size in logs], scores) for scores, logs in (ours, theirs)]
    assert delta_rate(*sides, higher=True).percent == pytest.approx(100 * (10 ** (area / 0.7) - 1), rel=1e-6)


def test_a_curve_that_falls_is_compared_by_its_envelope():
    anchor = curve([100, 1000], [0.5, 0.9])
    found = delta_rate(curve([50, 60, 500, 600], [0.5, 0.4, 0.9, 0.7]), anchor, higher=True)
    assert found.percent == pytest.approx(-50)
    assert (found.used, found.given) == ((2, 2), (4, 2))


def test_what_cannot_be_compared_says_why():
    anchor = curve([100, 1000], [0.5, 0.9])
    for points, higher, reason in (
        (curve([10, 20], [0.91, 0.95]), True, "the curve is wholly better"),
        (curve([10, 20], [0.1, 0.5]), True, "the curve is wholly worse"),
        (curve([10], [0.7]), True, "the curve has a single point"),
        (curve([10, 20], [0.7, 0.6]), True, "the curve has a single point"),
        ([], True, "the curve has no point"),
        (curve([10, 20], [0.2, 0.1]), False, "the anchor has a single point"),
    ):
        found = delta_rate(points, anchor, higher=higher)
        assert found.percent is None
        assert found.overlap is None
        assert reason in found.reason
    lower = delta_rate(curve([10, 20], [0.2, 0.1]), curve([100, 1000], [0.9, 0.5]), higher=False)
    assert "wholly better" in lower.reason


# --- bytes to a share of a gain ---


def test_bytes_to_a_share_by_hand():
    points = curve([100, 10_000], [0.5, 1.0])  # two points: linear in log bytes
    assert (found := bytes_to(points, 0.0, 1.0, 0.75, higher=True)).bytes == pytest.approx(1000)
    assert (found.at_most, found.best) == (False, 1.0)
    assert bytes_to(points, 0.0, 1.0, 1.0, higher=True).bytes == pytest.approx(10_000)
    least = bytes_to(points, 0.0, 1.0, 0.5, higher=True)
    assert (least.bytes, least.at_most) == (100, True)


def test_a_share_out_of_reach_tells_the_largest():
    found = bytes_to(curve([100, 1000, 2000], [0.5, 0.8, 0.7]), 0.4, 0.9, 0.95, higher=True)
    assert (found.bytes, found.at_most) == (None, False)
    assert found.best == pytest.approx(0.8)


def test_lower_is_better_for_a_loss():
    found = bytes_to(curve([100, 10_000], [3.0, 1.0]), 4.0, 1.0, 2 / 3, higher=False)
    assert found.bytes == pytest.approx(1000)
    assert found.best == pytest.approx(1.0)


def test_nothing_to_gain_is_no_share():
    points = curve([100, 1000], [0.5, 0.8])
    assert bytes_to(points, 0.7, 0.7, 0.95, higher=True).best is None
    assert bytes_to(points, 0.7, 0.6, 0.95, higher=True).bytes is None
    assert bytes_to([], 0.1, 0.6, 0.95, higher=True).best is None


# --- a curve at a size ---


def test_a_curve_at_a_size_is_linear_in_log_bytes():
    points = curve([10_000, 100, 100], [1.0, 0.4, 0.6])
    assert at_bytes(points, 1000) == pytest.approx(0.75)
    assert at_bytes(points, 100) == pytest.approx(0.5)
    assert at_bytes(points, 10_000) == 1.0
    assert (at_bytes(points, 99), at_bytes(points, 10_001), at_bytes([], 5)) == (None, None, None)

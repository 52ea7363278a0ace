"""The benchmark runner: no timing without a passed check, ratios against the first side of the same round."""

import time

import pytest

from benchmarks.case import Case, run


def test_a_failed_check_stops_before_any_call() -> None:
    calls: list[str] = []

    def check() -> None:
        raise AssertionError("the sides differ")

    case = Case("wrong", {"a": lambda: calls.append("a")}, check, 1.0, "calls/s")
    with pytest.raises(AssertionError, match="the sides differ"):
        run(case, rounds=3)
    assert calls == []


def test_sides_are_timed_in_turn_after_a_warm_up() -> None:
    calls: list[str] = []
    case = Case(
        "in turn",
        {"quick": lambda: calls.append("quick"), "slow": lambda: (calls.append("slow"), time.sleep(0.02))},
        lambda: calls.append("check"),
        1.0,
        "calls/s",
    )
    quick, slow = run(case, rounds=3)
    assert calls == ["check", *["quick", "slow"] * 4]
    assert quick.ratio == 1.0
    assert slow.ratio > 1.0
    assert slow.p20 <= slow.median <= slow.p80

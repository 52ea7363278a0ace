"""Splits: sizes, groups, repeatability."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from randbasis.errors import EmptyDataError, SettingError
from randbasis.train.splits import few_shot, hold_out, sample


@given(st.lists(st.integers(0, 30), min_size=5), st.floats(0.05, 0.6), st.integers(0, 2**32 - 1))
def test_held_out_groups_are_whole_and_apart(groups: list[int], fraction: float, seed: int):
    if round(fraction * len(set(groups))) >= len(set(groups)) or len(set(groups)) < 2:
        return
    kept, held = hold_out(groups, fraction, seed)
    assert sorted(kept + held) == list(range(len(groups)))
    assert {groups[i] for i in kept}.isdisjoint(groups[i] for i in held)
    assert len({groups[i] for i in held}) == max(1, round(fraction * len(set(groups))))
    assert (kept, held) == hold_out(groups, fraction, seed)


def test_another_seed_holds_out_others():
    assert hold_out(range(100), 0.1, 1)[1] != hold_out(range(100), 0.1, 2)[1]


def test_few_shot_takes_as_many_of_each():
    labels = ["a"] * 10 + ["b"] * 7 + ["c"] * 3
    rows = few_shot(labels, 3, 5)
    assert [labels[i] for i in rows] == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    assert rows == few_shot(labels, 3, 5)
    with pytest.raises(EmptyDataError, match="label 'c' has 3 rows; 4 shots"):
        few_shot(labels, 4, 5)
    with pytest.raises(SettingError, match="shots must be at least 1, got 0"):
        few_shot(labels, 0, 5)


def test_sample():
    assert sample(5, 9, 0) == [0, 1, 2, 3, 4]
    assert len(set(sample(100, 10, 3))) == 10
    with pytest.raises(SettingError, match="at least 1, got -1"):
        sample(5, -1, 0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_bad_fractions(fraction: float):
    with pytest.raises(SettingError, match="between 0 and 1"):
        hold_out(range(10), fraction, 0)


def test_too_few_rows():
    with pytest.raises(EmptyDataError, match="cannot hold out"):
        hold_out(["same", "same"], 0.5, 0)

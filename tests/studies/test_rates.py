"""What a rate of a trial costs, and the page of all trials."""

import math
from pathlib import Path

import pytest

from studies.rates import Trials, all_trials
from studies.rates_page import write_rates


def trials(losses: dict[float, float], auto: float = 0.01, noise: float | None = None, base: float = 4.0) -> Trials:
    return Trials("one", "words", "LoRA r=1", "lora", 1, 0.01, auto, losses, base, noise, 60)


def test_a_cost_is_the_share_of_the_gain_that_is_left_behind():
    one = trials({0.001: 3.5, 0.01: 2.0, 0.1: 3.0, 1.0: math.inf})
    assert (one.best, one.gain, one.at_edge) == (0.01, 2.0, False)
    assert [one.cost(rate) for rate in (0.01, 0.1, 0.001, 0.0001)] == [0.0, 0.5, 0.75, 0.75]
    assert one.cost(0.01 * 10**0.5) == pytest.approx(0.25)  # half of the way over the logarithm
    assert math.isinf(one.cost(0.5))


def test_noise_is_twice_the_deviation_in_the_same_share():
    assert trials({0.01: 2.0, 0.1: 3.0}, noise=0.1).noise_share == pytest.approx(0.1)
    assert trials({0.01: 2.0, 0.1: 3.0}).noise_share is None
    assert trials({0.01: 2.0, 0.1: 3.0}).at_edge


def test_the_page_leaves_out_what_decides_nothing(tmp_path: Path):
    page = tmp_path / "results" / "rates.md"
    found = [trials({0.01: 2.5, 0.1: 2.0}, auto=0.1, noise=0.05), trials({0.01: 3.9, 0.1: 3.8})]
    write_rates(found, page)
    text = page.read_text()
    assert "| lora | rank below 8 | 1 | 25.0 %, 25.0 % | 0.0 %, 0.0 % | 1 of 1 |" in text
    assert "| one | words | LoRA r=1 | 60 | 1 | 10* | 10 | 25.0 % | 0.0 % | 5.0 % |" in text
    assert "Rows with nothing to choose by: 1." in text
    assert (page.parent / "rates.png").stat().st_size > 0
    write_rates([], page)
    assert "No rows yet." in page.read_text()


def test_trials_are_those_of_the_shipped_studies(root: Path):
    found = all_trials(root / "studies", root / "benchmarks" / "results")
    assert len({(one.study, one.data, one.row) for one in found}) == len(found)
    assert len({(one.data, *sorted(one.losses.items())) for one in found}) == len(found), (
        "runs of two studies count once"
    )
    assert all(one.usual in one.losses for one in found)
    assert all(one.auto >= one.usual for one in found)

"""The benchmark runner: no timing without a passed check, sides in turn, ratios within a round."""

import gc
import time
from collections.abc import Callable, Sequence

import pytest
import torch

from benchmarks.case import LEAST_ROUNDS, Built, Case, CheckFailed, Side, Timing, chosen_sides, run, spread


def case(calls: list[str], check: Callable[[], str] = lambda: "nothing", **options: object) -> Case:
    """Two sides that write down when they are called and reset."""

    def build(sides: Sequence[str]) -> Built:
        made = {name: Side(lambda name=name: calls.append(name), lambda: calls.append("reset")) for name in sides}
        return Built({name: made[name] for name in sides}, check)

    return Case("family", "name", ("a", "b", "c"), build, **options)  # pyright: ignore[reportArgumentType]


def test_a_failed_check_stops_before_any_call() -> None:
    calls: list[str] = []

    def check() -> str:
        raise CheckFailed("the sides differ")

    with pytest.raises(CheckFailed, match="the sides differ"):
        run(case(calls, check), rounds=3)
    assert calls == []


def test_sides_are_measured_in_turn_after_a_warm_up_every_other_round_backwards() -> None:
    calls: list[str] = []
    outcome = run(case(calls, lambda: calls.append("check") or "checked"), rounds=3)
    in_turn = [call for call in calls if call != "reset"]
    assert in_turn == ["check", *"abc", *"abc", *"cba", *"abc"]
    assert calls.count("reset") == 12
    assert outcome.checked == "checked"
    assert [timing.side for timing in outcome.timings] == ["a", "b", "c"]
    assert all(len(timing.values) == 3 for timing in outcome.timings)


def test_time_of_the_reset_is_not_counted_and_that_of_the_call_is() -> None:
    def build(sides: Sequence[str]) -> Built:
        quick = Side(lambda: None, lambda: time.sleep(0.05))
        return Built({"quick": quick, "slow": Side(lambda: time.sleep(0.02))}, str)

    quick, slow = run(Case("family", "name", ("quick", "slow"), build), rounds=3).timings
    assert max(quick.values) < 0.02 <= min(slow.values)
    assert min(slow.ratios) > 1


def test_a_case_with_its_own_number_of_rounds_keeps_it_and_may_go_without_warm_up() -> None:
    calls: list[str] = []
    run(case(calls, rounds=1, warms_up=False), rounds=7)
    assert [call for call in calls if call != "reset"] == ["a", "b", "c"]


@pytest.mark.parametrize("warms_up", [True, False])
def test_a_side_that_runs_out_of_memory_is_left_out_and_named_and_the_others_are_measured(warms_up: bool) -> None:
    def build(sides: Sequence[str]) -> Built:
        def full() -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        calls = {"a": lambda: None, "b": full, "c": lambda: None}
        return Built({name: Side(calls[name]) for name in sides}, lambda: "checked")

    one = Case("family", "name", ("a", "b", "c"), build, warms_up=warms_up)
    outcome = run(one, rounds=3)
    assert {timing.side: len(timing.values) for timing in outcome.timings} == {"a": 3, "c": 3}
    assert outcome.checked == "checked; out of memory, and left out: b"
    # The others have nothing to be held against without the first.
    with pytest.raises(torch.OutOfMemoryError):
        run(Case("family", "name", ("b", "c"), build, warms_up=warms_up), rounds=3)


def test_rounds_fill_the_time_of_a_case_but_are_never_fewer_than_the_least() -> None:
    slow: list[str] = []
    run(case(slow, seconds=0.0))
    assert len([call for call in slow if call != "reset"]) == 3 * (1 + LEAST_ROUNDS)
    quick: list[str] = []
    run(case(quick, seconds=1.0))
    assert len(quick) > len(slow)


def test_a_measure_of_another_quantity_is_taken_as_it_is() -> None:
    build = lambda _: Built({"a": Side(lambda: 7), "b": Side(lambda: 14)}, str)  # noqa: E731
    first, second = run(Case("f", "n", ("a", "b"), build, measure=lambda call: float(str(call()))), rounds=2).timings
    assert first.values == [7.0, 7.0]
    assert second.ratios == [2.0, 2.0]
    assert second.overheads == [7.0, 7.0]


def test_garbage_is_not_collected_while_a_side_is_timed_and_is_afterwards() -> None:
    seen: list[bool] = []
    build = lambda _: Built({"a": Side(lambda: seen.append(gc.isenabled()))}, str)  # noqa: E731
    run(Case("f", "n", ("a",), build, warms_up=False), rounds=2)
    assert seen == [False, False]
    assert gc.isenabled()


def test_the_first_side_is_always_chosen() -> None:
    some = Case("f", "n", ("PEFT LoRA r=1", "NOLA r=8 k=64", "VeRA r=256"), lambda _: Built({}, str))
    assert chosen_sides(some, ["VeRA"]) == ["PEFT LoRA r=1", "VeRA r=256"]
    assert chosen_sides(some, []) == list(some.sides)


def test_spread_against_hand_computed() -> None:
    assert spread([3.0]) == (3.0, 3.0, 3.0)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx((3.5, 2.0, 5.0))


def test_ratios_and_overheads_are_those_of_the_same_round() -> None:
    timing = Timing("b", [2.0, 9.0], [1.0, 3.0])
    assert timing.ratios == [2.0, 3.0]
    assert timing.overheads == [1.0, 6.0]

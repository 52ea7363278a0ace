"""Lines of a report against numbers that were put into the records."""

import math
from dataclasses import replace

import pytest
from report_records import RATES, ROWS, complete, data_of, point, record, study_of, trials

from randbasis.compare.report.lines import missing, results_of
from randbasis.compare.study import Row, Study

STUDY = study_of(ROWS)
FROZEN, FULL, LORA, NOLA_64, NOLA_256 = ROWS


def only(study: Study, records: list, row: str = "LoRA"):
    return results_of(study, study.data[0], records).of_row(row)


def test_seeds_are_taken_together():
    line = only(STUDY, complete(STUDY))
    assert line is not None
    assert line.scores["accuracy"] == pytest.approx({0: 0.90, 1: 0.91, 2: 0.92})
    assert (found := line.score("accuracy")) is not None
    assert found.mean == pytest.approx(0.91)
    assert found.half == pytest.approx(4.302653 * 0.01 / 3**0.5)
    assert (line.bytes, line.point.head_bytes, line.rate, line.trials, line.at_edge) == (10_000, 40, 0.0316, 3, False)


def test_bytes_that_differ_between_seeds_are_averaged():
    runs = [record(LORA, [point(size, 0.5)], seed) for seed, size in enumerate((100, 102, 107))]
    assert (line := only(STUDY, runs)) is not None
    assert line.bytes == 103


@pytest.mark.parametrize(("rate", "edge"), [(RATES[0], True), (RATES[1], False), (RATES[2], True)])
def test_a_rate_at_the_edge_of_those_tried_is_marked(rate: float, edge: bool):
    runs = [*trials(LORA, dict.fromkeys(RATES, 0.5)), record(LORA, [point(9, 0.5)], rate=rate)]
    assert (line := only(STUDY, runs)) is not None
    assert (line.rate, line.at_edge, line.trials) == (rate, edge, 3)


def test_a_single_rate_has_no_edge():
    assert (line := only(STUDY, [*trials(LORA, {0.0316: 0.5}), record(LORA, [point(9, 0.5)])])) is not None
    assert not line.at_edge


def test_runs_at_a_rate_that_is_no_longer_chosen_do_not_mix():
    old = [record(LORA, [point(9, 0.1)], seed, rate=0.01) for seed in range(2)]
    new = [record(LORA, [point(9, 0.8)], seed, rate=0.1) for seed in range(3)]
    assert (line := only(STUDY, [*old, *new])) is not None
    assert line.scores["accuracy"] == {0: 0.8, 1: 0.8, 2: 0.8}
    equal = [*trials(LORA, {0.01: 0.4, 0.1: 0.6}), *old, *new[:2]]
    assert (line := only(STUDY, equal)) is not None
    assert line.rate == 0.01


def test_a_run_that_diverged_is_counted_and_not_averaged():
    runs = [record(LORA, [point(9, 0.5)], 0), record(LORA, [], 1), record(LORA, [point(9, float("nan"))], 2)]
    assert (line := only(STUDY, runs)) is not None
    assert line.scores["accuracy"] == {0: 0.5}
    assert line.diverged == 1


def test_differences_to_the_anchor_are_paired_by_seed():
    results = results_of(STUDY, STUDY.data[0], complete(STUDY))
    names = {line.name: line for line in results.lines}
    found = results.to_anchor(names["NOLA 64 B"])
    assert found is not None
    assert (found.mean, found.half, found.count) == pytest.approx((-0.1, 0.0, 3), abs=1e-9)
    for name in ("LoRA", "frozen + head", "full fine-tuning"):
        assert results.to_anchor(names[name]) is None


def test_differences_at_equal_bytes_by_hand():
    """LoRA has .8 at 1,000 and .6 at 100 bytes: at 500 bytes .6 + .2 log10(5)."""
    results = results_of(STUDY, STUDY.data[0], complete(STUDY))
    names = {line.name: line for line in results.lines}
    found = results.at_equal_bytes(names["NOLA 64 B"])
    assert found is not None
    assert found.mean == pytest.approx(0.8 - (0.6 + 0.2 * 0.69897), abs=1e-6)
    assert found.half == pytest.approx(0.0, abs=1e-9)
    assert results.at_equal_bytes(names["NOLA 64 B, 4 bits"]) is None  # 50 bytes are fewer than the anchor has
    assert results.at_equal_bytes(names["LoRA, 4 bits"]) is None


def test_steps_are_timed_against_the_lora_of_the_same_data_set():
    results = results_of(STUDY, STUDY.data[0], complete(STUDY))
    assert {line.name: results.step_ratio(line) for line in results.lines if line.as_trained} == {
        "frozen + head": 1, "full fine-tuning": 1, "LoRA": 1, "NOLA 64 B": 2, "NOLA 256 B": 2
    }  # fmt: skip
    without = study_of([FROZEN, NOLA_64], anchor=None, gain_of=None)
    (*_, line) = (results := results_of(without, without.data[0], complete(without))).lines
    assert results.step_ratio(line) is None


def test_forgetting_is_to_the_perplexity_before():
    runs = [
        record(LORA, [point(9, 0.5, forgetting=before * ratio)], seed, base_perplexity=before)
        for seed, (before, ratio) in enumerate(((4.0, 1.5), (8.0, 1.25)))
    ]
    assert (line := only(STUDY, runs)) is not None
    assert line.forgetting == {0: 1.5, 1: 1.25}
    assert (line := only(STUDY, [record(LORA, [point(9, 0.5)])])) is not None
    assert line.forgetting == {}


def test_what_was_forgotten_without_bounds_is_left_out():
    run = record(ROWS[1], [replace(point(90, 0.8), forgetting=math.inf)], 0)
    line = only(study_of([ROWS[1]]), [replace(run, base_perplexity=2.0)], ROWS[1].name)
    assert line.forgetting == {}


def test_memory_and_expansion_are_medians_of_what_is_known():
    runs = [
        record(LORA, [point(9, 0.5)], seed, peak_bytes=peak, expand_seconds=seconds)
        for seed, (peak, seconds) in enumerate(((50, 0.3), (9, 0.1), (7, 0.5), (0, None)))
    ]
    assert (line := only(STUDY, runs)) is not None
    assert (line.peak_bytes, line.expand_seconds) == (9, pytest.approx(0.3))


def test_a_complete_study_lacks_nothing_and_what_lacks_is_named():
    runs = complete(STUDY)
    assert missing(STUDY, runs) == []
    assert missing(STUDY, [one for one in runs if one.row != "LoRA"]) == [
        "words, LoRA: no run yet, or no configuration of the method fits"
    ]
    assert missing(STUDY, [one for one in runs if not (one.row == "LoRA" and one.seed == 2)]) == [
        "words, LoRA: 2 of 3 final runs are there"
    ]
    short = [one for one in runs if one.row != "LoRA"] + trials(LORA, {0.01: 0.5})
    assert missing(STUDY, short) == ["words, LoRA: 1 of 3 learning rates were tried, 0 of 3 final runs are there"]


def test_rows_that_diverged_are_named():
    runs = [one for one in complete(STUDY) if one.row != "LoRA"]
    gone = trials(LORA, {0.01: None, 0.0316: float("nan"), 0.1: None})
    assert missing(STUDY, [*runs, *gone]) == ["words, LoRA: every one of 3 learning rates diverged"]
    ended = [*trials(LORA, dict.fromkeys(RATES, 0.5)), *(record(LORA, [], seed) for seed in range(3))]
    assert missing(STUDY, [*runs, *ended]) == ["words, LoRA: every one of 3 final runs diverged"]
    assert only(STUDY, [*runs, *ended]) is None


def test_a_language_model_that_is_not_trained_needs_one_run_and_no_trial():
    study = study_of([Row("base alone", "base alone", "none"), LORA], [data_of("e2e", "bleu", "causal-lm")])
    base = record(study.rows[0], [point(0, 3.0, metric="bleu")], data="e2e", rate=0.0)
    assert missing(study, [base]) == ["e2e, LoRA: no run yet, or no configuration of the method fits"]
    (line,) = results_of(study, study.data[0], [base]).lines
    assert (line.rate, line.trials) == (None, 0)


def test_one_trial_is_no_sweep():
    study = replace(STUDY, trials=1)
    assert missing(study, [one for one in complete(study) if one.phase == "final"]) == []


def test_a_row_of_another_data_set_is_not_missing():
    study = study_of([FROZEN, replace(LORA, data=("letters",))], [data_of("words"), data_of("letters")])
    told = missing(study, [])
    assert [one.partition(":")[0] for one in told] == [
        "words, frozen + head",
        "letters, frozen + head",
        "letters, LoRA",
    ]

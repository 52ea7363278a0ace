"""Which runs come next, against hand-made records; what a record is worth after a change of the study."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from study_texts import HEAD, ROWS, WriteStudy

from randbasis.compare.record import Point, Record, append_record, finals, read_records
from randbasis.compare.study import Job, Progress, Study, fingerprint, job_of, trial_rates, usable
from randbasis.errors import StudyError

MIDDLES = {("words", "base alone"): 0.05, ("words", "LoRA r=2"): 0.05, ("words", "NOLA 64 coefficients"): 0.05}


def record(study: Study, job: Job, loss: float | None) -> Record:
    data, row = study.data_named(job.data), study.row_named(job.row)
    points = () if loss is None else (Point("as trained", 32, None, 100, 20, {"loss": loss, "accuracy": 1.0}),)
    return Record(study.name, job.data, job.row, row.curve, row.method, job.phase, job.rate, job.head_rate, job.seed,
                  fingerprint(study, data, row), {}, 10, 5, points, 1.0, 0.1, 0, None, None, "", {}, "")  # fmt: skip


def ended(study: Study, loss: Callable[[Job], float | None]) -> list[Record]:
    """All runs of a study; ``loss(job)`` scores them."""
    records: list[Record] = []
    while jobs := Progress(study, MIDDLES, records).ready():
        records += [record(study, job, loss(job)) for job in jobs]
    return records


def test_rates_are_half_a_decade_apart_and_the_odd_one_lies_above():
    assert trial_rates(1e-2, 1) == (1e-2,)
    assert trial_rates(1e-2, 3) == (3.16e-3, 1e-2, 3.16e-2)
    assert trial_rates(1e-2, 4) == (3.16e-3, 1e-2, 3.16e-2, 1e-1)


def test_the_head_is_tried_first_and_finals_come_after_the_trials(study: Study):
    first = Progress(study, MIDDLES, []).ready()
    assert {(job.row, job.phase) for job in first} == {("base alone", "trial")}
    second = Progress(study, MIDDLES, [record(study, job, 0.5) for job in first]).ready()
    assert {(job.row, job.phase) for job in second} == {
        ("base alone", "final"), ("LoRA r=2", "trial"), ("NOLA 64 coefficients", "trial")
    }  # fmt: skip


def test_every_row_is_given_as_many_trials_and_finals(study: Study):
    jobs = [job_of(one) for one in ended(study, lambda job: 0.5)]
    assert len(jobs) == len(set(jobs)) == Progress(study, MIDDLES, []).total() == 3 * (2 + 2)
    for row in study.rows:
        phases = [job.phase for job in jobs if job.row == row.name]
        assert (phases.count("trial"), phases.count("final")) == (2, 2)


def test_the_lowest_held_out_loss_chooses_and_the_head_has_the_rate_of_the_base_alone(study: Study):
    best = {"base alone": 0.158, "LoRA r=2": 0.05, "NOLA 64 coefficients": 0.158}
    for job in map(job_of, ended(study, lambda job: float(job.rate != best[job.row]))):
        if job.row != "base alone":
            assert job.head_rate == 0.158
        if job.phase == "final":
            assert job.rate == best[job.row]


def test_a_rate_that_diverged_is_not_chosen_and_a_row_without_any_is_told_and_stops_no_other(study: Study):
    def loss(job: Job) -> float | None:
        if job.row == "LoRA r=2":
            return None
        return float("nan") if job.rate > 0.1 else 0.7

    records = ended(study, loss)
    now = Progress(study, MIDDLES, records)
    assert {job.row for job in map(job_of, records) if job.phase == "final"} == {"base alone", "NOLA 64 coefficients"}
    assert {job.rate for job in map(job_of, records) if job.phase == "final"} == {0.05}
    (told,) = now.diverged()
    assert told.startswith("words: every learning rate of 'LoRA r=2' diverged")
    assert now.total() - len(records) == 2


def test_a_language_model_has_no_head_to_choose_for(write_study: WriteStudy, letters: str):
    study = write_study(HEAD + letters + ROWS)
    middles = {("letters", name): rate for (_, name), rate in MIDDLES.items()}
    alone = [job for job in Progress(study, middles, []).ready() if job.row == "base alone"]
    assert alone == [Job("letters", "base alone", "final", 0.0, None, 0)]
    assert {job.head_rate for job in Progress(study, middles, []).ready()} == {None}


def test_records_count_only_while_what_they_depend_on_is_unchanged(study: Study):
    records, data, rows = ended(study, lambda job: 0.5), study.data[0], study.rows
    moved = replace(data, folder="/elsewhere", base=replace(data.base, model="/elsewhere/model"))
    study = replace(study, data=(replace(data, folder="/here", base=replace(data.base, model="/here/model")),))
    (data,) = study.data
    records = [replace(one, fingerprint=fingerprint(study, data, study.row_named(one.row))) for one in records]
    for same in (
        replace(study, data=(moved,)),
        replace(study, seeds=9, trials=9, title="Other"),
        replace(study, data=(replace(data, metric="loss"),)),
        replace(study, rows=(*rows[:2], replace(rows[2], curve="Other", rate=1.0))),
    ):
        assert usable(same, records) == records
    longer = replace(data, steps=9, base=replace(data.base, loop=replace(data.base.loop, max_steps=9)))
    assert (
        usable(replace(study, data=(replace(data, base=replace(data.base, model="/here/other/model")),)), records) == []
    )
    for separator in ("x/y", "z/y"):
        assert (
            usable(replace(study, data=(replace(data, base=replace(data.base, separator=separator)),)), records) == []
        )
    assert usable(replace(study, data=(longer,)), records) == []
    other = replace(study, rows=(*rows[:2], replace(rows[2], options=(("rank", 3),))))
    assert {one.row for one in usable(other, records)} == {"base alone", "LoRA r=2"}


def test_of_runs_of_two_sizes_the_newer_ones_count(study: Study):
    old = [replace(one, configuration={"basis": 8}) for one in ended(study, lambda job: 0.5)]
    new = [replace(one, configuration={"basis": 9}) for one in old if one.row == "NOLA 64 coefficients"][:1]
    assert usable(study, [*old, *new]) == [one for one in old if one.row != "NOLA 64 coefficients"] + new


def test_of_runs_on_two_contents_of_the_files_the_newer_ones_count_and_of_equal_runs_the_first(study: Study):
    old = [replace(one, sources="a") for one in ended(study, lambda job: 0.5)]
    new = [replace(one, sources="b") for one in old if one.row == "base alone"]
    assert usable(study, [*old, *new]) == new
    assert usable(study, [*old, *old[:3]]) == old


def test_a_part_of_a_study_keeps_its_first_row(study: Study):
    assert [row.name for row in study.limited(rows=["NOLA*"]).rows] == ["base alone", "NOLA 64 coefficients"]
    assert study.limited(["words"]) == study
    with pytest.raises(StudyError, match="data set 'wards' is unknown; did you mean words"):
        study.limited(["wards"])
    with pytest.raises(StudyError, match="match none; there are: base alone, LoRA r=2"):
        study.limited(rows=["VeRA*"])


def test_a_record_survives_its_line_and_a_torn_line_costs_no_other(study: Study, tmp_path: Path):
    one, two = (record(study, job, 0.25) for job in Progress(study, MIDDLES, []).ready())
    path = tmp_path / "runs.jsonl"
    append_record(path, one)
    with path.open("a", encoding="utf-8") as file:
        file.write(two.line()[:50] + "}")
    assert read_records(path) == [one]
    append_record(path, two)
    assert read_records(path) == [one, two]
    odd = replace(two, row="a\u2028b\x85c")
    append_record(path, odd)
    assert read_records(path) == [one, two, odd]
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(StudyError, match=r"runs.jsonl, line 5, is no run of a comparison"):
        read_records(path)
    assert finals([one, replace(two, phase="final")], "words", "base alone") == [replace(two, phase="final")]

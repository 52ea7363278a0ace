"""Which runs come next, against hand-made records; what a record is worth after a change of the study."""

from dataclasses import replace

import pytest

from randbasis.errors import SettingError
from studies import Job, Record, Row, Setting, Study, chosen_rate, ready_jobs
from studies.study import all_jobs_count, fingerprint, usable


def record(study: Study, job: Job, accuracy: float | None, loss: float = 1.0) -> Record:
    print_ = fingerprint(study.setting(job.setting), study.row(job.row))
    scores = {} if accuracy is None else {"accuracy": accuracy, "loss": loss}
    return Record(job, print_, scores, {"method": "nola"}, 10, 5, 100, 1.0, "2026-01-01", {"torch": "2"})


def ended(study: Study, accuracy) -> list[Record]:
    """All runs of a study; ``accuracy(job)`` scores them."""
    records: list[Record] = []
    while jobs := ready_jobs(study, records):
        records += [record(study, job, accuracy(job)) for job in jobs]
    return records


def test_the_head_is_swept_first_and_finals_come_after_the_sweep(text_study: Study):
    first = ready_jobs(text_study, [])
    assert {(job.row, job.phase) for job in first} == {("frozen + head", "sweep")}
    second = ready_jobs(text_study, [record(text_study, job, 0.5) for job in first])
    assert {(job.row, job.phase) for job in second} == {
        ("frozen + head", "final"), ("LoRA r=1", "sweep"), ("NOLA, half", "sweep")
    }  # fmt: skip


def test_every_row_is_given_as_many_runs(text_study: Study):
    jobs = [r.job for r in ended(text_study, lambda job: 0.5)]
    assert len(jobs) == len(set(jobs)) == all_jobs_count(text_study) == 3 * (2 + 2)
    for row in text_study.rows:
        phases = [job.phase for job in jobs if job.row == row.name]
        assert (phases.count("sweep"), phases.count("final")) == (2, 2)


def test_the_heads_rate_is_the_one_chosen_for_the_frozen_base(text_study: Study):
    best = {"frozen + head": 1e-1, "LoRA r=1": 1e-2, "NOLA, half": 1e-1}
    jobs = [r.job for r in ended(text_study, lambda job: float(job.rate == best[job.row]))]
    for job in jobs:
        if job.row != "frozen + head":
            assert job.head_rate == 1e-1
        if job.phase == "final":
            assert job.rate == best[job.row]


def test_equal_metrics_are_told_apart_by_the_loss(text_study: Study):
    row = text_study.rows[1]
    runs = [
        record(text_study, Job("words", row.name, "sweep", rate, 1e-2, 0), 0.5, loss)
        for rate, loss in zip(row.rates, (0.9, 0.8), strict=True)
    ]
    assert chosen_rate(text_study, text_study.settings[0], row, runs) == row.rates[1]
    assert chosen_rate(text_study, text_study.settings[0], row, runs[:1]) is None


def test_a_rate_that_diverged_is_not_chosen_and_all_of_them_are_an_error(text_study: Study):
    row, setting = text_study.rows[1], text_study.settings[0]
    jobs = [Job("words", row.name, "sweep", rate, 1e-2, 0) for rate in row.rates]
    runs = [record(text_study, job, score) for job, score in zip(jobs, (0.1, None), strict=True)]
    assert chosen_rate(text_study, setting, row, runs) == row.rates[0]
    with pytest.raises(SettingError, match="every learning rate of LoRA r=1 diverged"):
        chosen_rate(text_study, setting, row, [record(text_study, job, None) for job in jobs])


def test_a_setting_may_use_the_rates_of_another(text_study: Study):
    other = replace(text_study.settings[0], name="words, again", rates_of="words")
    study = replace(text_study, settings=(*text_study.settings, other))
    records = ended(study, lambda job: job.rate)
    assert {r.job.phase for r in records if r.job.setting == "words, again"} == {"final"}
    assert {r.job.rate for r in records if r.job.phase == "final"} == {1e-1}


def test_a_language_model_has_no_head_to_sweep(language_study: Study):
    frozen = [job for job in ready_jobs(language_study, []) if job.row == "frozen + head"]
    assert frozen == [Job("letters", "frozen + head", "final", 0.0, None, 0)]


def test_records_count_only_while_what_they_depend_on_is_unchanged(text_study: Study):
    records = ended(text_study, lambda job: 0.5)
    setting = text_study.settings[0]
    moved = replace(setting, base=replace(setting.base, model="/elsewhere/" + setting.base.model.rsplit("/", 1)[1]))
    more = replace(setting, seeds=9)
    for same in (moved, more):
        assert usable(replace(text_study, settings=(same,)), records) == records
    longer = replace(setting, base=replace(setting.base, loop=replace(setting.base.loop, max_steps=9)))
    assert usable(replace(text_study, settings=(longer,)), records) == []
    smaller = replace(text_study.rows[2], share=0.25)
    left = usable(replace(text_study, rows=(*text_study.rows[:2], smaller)), records)
    assert {r.job.row for r in left} == {"frozen + head", "LoRA r=1"}


def test_a_record_survives_its_line(text_study: Study):
    one = record(text_study, ready_jobs(text_study, [])[0], 0.25)
    assert Record.of_line(one.line()) == one


def test_rows_that_are_not_treated_alike_are_refused(text_setting: Setting):
    frozen, lora = Row("frozen", "none", 0.0, (1.0,)), Row("LoRA", "lora", 1.0, (1.0,))
    with pytest.raises(SettingError, match="as many learning rates"):
        Study("s", "S", (frozen, lora, Row("NOLA", "nola", 1.0, (1.0, 2.0))), (text_setting,), ("loss",))
    with pytest.raises(SettingError, match="first row must be the frozen base"):
        Study("s", "S", (lora, frozen), (text_setting,), ("loss",))
    study = Study("s", "S", (frozen, lora), (text_setting,), ("loss",))
    with pytest.raises(SettingError, match="row 'LoRa' is unknown; did you mean LoRA"):
        study.row("LoRa")

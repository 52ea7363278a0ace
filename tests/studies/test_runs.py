"""Tiny studies from rows of data to a page: splits, resuming, processes, tables."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from randbasis.errors import EmptyDataError, NonFiniteLossError
from studies import Job, Setting, Study, read_records, run_job, run_study
from studies.cells import apart_from, read_cell
from studies.report import write_report
from studies.study import usable
from studies.tables import lines_of, table_of


def test_held_out_texts_and_training_texts_share_nothing(text_setting: Setting, tmp_path: Path):
    rows = [f"word{i} goes alone{'' if i % 2 else ' into the night'}" for i in range(40)]
    rows += ["alone into the night", "word0 goes"]
    file = tmp_path / "rows.csv"
    file.write_text("sentence,label\n" + "".join(f"{row},{'pn'[i % 2]}\n" for i, row in enumerate(rows)))
    data = replace(text_setting.base.data, train=file, eval=file, limit=10)
    cell = read_cell(replace(text_setting, base=replace(text_setting.base, data=data), dev_words=6), 0)
    tokenizer = cell.task.tokenizer
    assert (len(cell.train), len(cell.dev)) == (10, 12)
    assert all(len(tokenizer.decode(e["input_ids"]).split()) >= 6 for e in cell.dev)


def test_fragments_of_held_out_texts_are_not_trained_on():
    texts = ["a long good film", "good film", "the book", "so a long good film it is", "a day"]
    assert apart_from(["a long good film"], texts) == [2, 4]


def test_too_few_rows_are_refused(text_setting: Setting):
    data = replace(text_setting.base.data, limit=10_000)
    with pytest.raises(EmptyDataError, match="10000 are asked for"):
        read_cell(replace(text_setting, base=replace(text_setting.base, data=data)), 0)


def test_draws_of_images_differ_and_never_meet_the_held_out_ones(image_setting: Setting):
    cells = [read_cell(image_setting, draw) for draw in (0, 1)]
    pixels = [{e["image"].tobytes() for e in cell.train} for cell in cells]
    held = [{e["image"].tobytes() for e in cell.dev} for cell in cells]
    assert pixels[0] != pixels[1]
    assert held[0] == held[1]
    assert not (pixels[0] | pixels[1]) & held[0]
    assert [sum(e["label"] == label for e in cells[0].train) for label in (0, 1)] == [2, 2]
    assert [sum(e["label"] == label for e in cells[0].dev) for label in (0, 1)] == [3, 3]


def test_a_language_model_is_scored_by_all_references_of_whole_prompts(language_study: Study):
    cell = read_cell(language_study.settings[0], 0)
    prompts = [e["prompt"] for e in cell.test]
    assert len(set(prompts)) == 3
    assert all(prompts.count(prompt) == 2 for prompt in prompts)
    job = Job("letters", "NOLA, half", "final", 1e-2, None, 0)
    record = run_job(language_study, job)
    assert record.scores.keys() >= {"loss", "bleu", "chrf"}
    assert run_job(language_study, replace(job, phase="sweep")).scores.keys() == {"loss", "perplexity"}
    frozen = run_job(language_study, Job("letters", "frozen + head", "final", 0.0, None, 0))
    assert (frozen.coefficients, frozen.head_parameters, frozen.file_bytes) == (0, 0, 0)


def test_a_run_is_a_pure_function_of_its_job(text_study: Study):
    job = Job("words", "NOLA, half", "final", 1e-1, 1e-1, 1)
    first, second = run_job(text_study, job), run_job(text_study, job)
    assert first.scores == second.scores
    assert first.configuration["basis"] == 8  # 4 matrices of 16 x 16: LoRA has 128, half is 64 = 4 (8 + 8)
    assert first.coefficients == 64
    assert first.head_parameters == 2 * 16 + 2
    assert first.scores != run_job(text_study, replace(job, seed=0)).scores


def test_a_loss_that_is_not_finite_is_a_record_without_scores(text_study: Study, monkeypatch: pytest.MonkeyPatch):
    def diverge(*_: Any, **__: Any) -> None:
        raise NonFiniteLossError("the loss at step 1 is nan")

    monkeypatch.setattr("studies.runs.fit", diverge)
    record = run_job(text_study, Job("words", "LoRA r=1", "sweep", 1e-1, 1e-1, 0))
    assert (record.scores, record.file_bytes) == ({}, 0)


def test_processes_and_a_resumed_run_give_what_one_process_gives(text_study: Study, tmp_path: Path):
    here = run_study(text_study, tmp_path / "here.jsonl", workers=0)
    lines = (tmp_path / "here.jsonl").read_text().splitlines()
    half = tmp_path / "half.jsonl"
    half.write_text("\n".join(lines[:5]) + "\n" + lines[5][:40])  # cut by a crash
    there = run_study(text_study, half, workers=2)
    assert len(here) == len(there) == 12
    assert half.read_text().splitlines()[:5] == lines[:5]
    assert {r.job: r.scores for r in here} == {r.job: r.scores for r in there}
    before = half.read_text()
    assert run_study(text_study, half, workers=0) == usable(text_study, read_records(half))
    assert half.read_text() == before


def test_table_and_page_come_from_the_raw_rows(text_study: Study, tmp_path: Path):
    records = run_study(text_study, tmp_path / "words.jsonl", workers=0)
    setting = text_study.settings[0]
    nola = lines_of(text_study, setting, records)[2]
    finals = [r.scores["accuracy"] for r in records if r.job.row == "NOLA, half" and r.job.phase == "final"]
    mean = sum(finals) / 2
    assert nola.mean("accuracy") == pytest.approx(mean)
    assert nola.deviation("accuracy") == pytest.approx(abs(finals[0] - finals[1]) / 2**0.5)
    table = table_of(text_study, setting, records)
    assert f"{100 * mean:.1f} ± {100 * nola.deviation('accuracy'):.1f}" in table.splitlines()[4]
    assert len(table.splitlines()) == 5
    (tmp_path / "words.md").write_text("What we think of it.\n")
    write_report([text_study], tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert table in page
    assert "What we think of it." in page
    assert (tmp_path / "page" / "words.png").read_bytes()[:4] == b"\x89PNG"


def test_raw_rows_hold_what_a_reader_needs(text_study: Study, tmp_path: Path):
    run_study(text_study, tmp_path / "words.jsonl", workers=0)
    row = json.loads((tmp_path / "words.jsonl").read_text().splitlines()[-1])
    assert row.keys() >= {"job", "scores", "coefficients", "file_bytes", "seconds", "date", "versions"}
    assert row["versions"].keys() >= {"randbasis", "torch", "transformers", "peft"}

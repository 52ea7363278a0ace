"""Tiny studies from rows of data to records: splits, methods, processes, kills, what is forgotten."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from study_texts import HEAD, ROWS, WriteStudy
from transformers import AutoTokenizer, LlamaForCausalLM

from randbasis.compare import pool, runs, sources
from randbasis.compare.cells import apart_from, read_cell
from randbasis.compare.forgetting import WINDOW, perplexity
from randbasis.compare.pool import planned, run_study
from randbasis.compare.record import Record, append_record, read_records
from randbasis.compare.rivals import METHODS
from randbasis.compare.runs import run_job, surroundings
from randbasis.compare.study import Job, Study, job_of, usable
from randbasis.errors import EmptyDataError, NonFiniteLossError, StudyError
from randbasis.train import decisions
from randbasis.train.trainer import parameter_groups

SMALLEST: dict[str, str] = {
    "lora": "rank = 1", "nola": "basis = 2", "vera": "rank = 2", "randlora": "rank = 8", "pranc": "basis = 2",
    "loraxs": "rank = 2", "dora": "rank = 1", "vblora": "num_vectors = 4\nr = 1",
    "unilora": "theta_d_length = 16\nr = 1", "fourierft": "n_frequency = 4",
    "tinylora": "u = 2\nr = 2", "peft-vera": "r = 2",
    "peft-randlora": "r = 2\nsave_projection = false", "full": "rate = 0.01", "none": "",
}  # fmt: skip
"""Options of a small configuration of every method."""


def plain(record: Record) -> tuple[Any, ...]:
    """What must be the same in any process."""
    return job_of(record), record.points, record.coefficients, record.configuration


# --- rows of data ---


def test_fragments_of_held_out_texts_are_not_trained_on():
    texts = ["a long good film", "good film", "the book", "so a long good film it is", "a day"]
    assert apart_from(["a long good film"], texts) == [2, 4]


def test_too_few_rows_are_refused(write_study: WriteStudy, words: str):
    study = write_study(HEAD + words.replace("limit = 32", "limit = 10000") + ROWS)
    with pytest.raises(EmptyDataError, match=r"leaves \d+ training rows .* limit = 10000; lower limit or dev_rows"):
        read_cell(study.data[0], 0)
    study = write_study(HEAD + words.replace("dev_rows = 12", "dev_rows = 12\ndev_words = 99") + ROWS)
    with pytest.raises(EmptyDataError, match=r"has 0 texts of 99 words or more, .* dev_rows = 12; lower dev_rows or"):
        read_cell(study.data[0], 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("max_length = 32", "max_length = 2"), r"fit into 2 tokens.*raise max_length"),
        (
            ("dev_rows = 2", "dev_rows = 999"),
            "prompts to train on and to hold out, .* dev_rows = 999; lower dev_rows, or",
        ),
    ],
)
def test_too_few_pairs_are_refused(change: tuple[str, str], message: str, write_study: WriteStudy, letters: str):
    assert change[0] in letters
    study = write_study(HEAD + letters.replace(*change) + ROWS)
    with pytest.raises(EmptyDataError, match=message):
        read_cell(study.data[0], 0)


def test_draws_of_images_differ_and_never_meet_the_held_out_ones(write_study: WriteStudy, colours: str):
    data = write_study(HEAD + colours + ROWS).data[0]
    cells = [read_cell(data, draw) for draw in (0, 1)]
    pixels = [{e["image"].tobytes() for e in cell.train} for cell in cells]
    held = [{e["image"].tobytes() for e in cell.dev} for cell in cells]
    assert pixels[0] != pixels[1]
    assert held[0] == held[1]
    assert not (pixels[0] | pixels[1]) & held[0]


def test_images_are_drawn_by_limit_and_tested_on_what_eval_names(
    write_study: WriteStudy, colours: str, image_folder: Path, tmp_path: Path
):
    alone = tmp_path / "others"
    shutil.copytree(image_folder / "train", alone)
    text = colours.replace("shots = 2", f'limit = 6\neval = "{alone}"\ndev = "{image_folder}"')
    cell = read_cell(write_study(HEAD + text + ROWS).data[0], 0)
    assert (len(cell.train), len(cell.dev), len(cell.test)) == (6, 3, 16)
    held = {e["image"].tobytes() for e in read_cell(write_study(HEAD + colours + ROWS).data[0], 0).test}
    assert {e["image"].tobytes() for e in cell.dev} <= held
    whole = read_cell(write_study(HEAD + colours.replace("shots = 2", "") + ROWS).data[0], 0)
    assert (len(whole.train), len(whole.dev), len(whole.test)) == (13, 3, 8)
    with pytest.raises(EmptyDataError, match="others has images of train alone, none to test on; name them as eval"):
        read_cell(write_study(HEAD + colours.replace(str(image_folder), str(alone)) + ROWS).data[0], 0)


def test_shots_of_texts_are_of_each_class_and_held_out_rows_may_have_a_file(
    write_study: WriteStudy, words: str, held_csv: str
):
    text = words.replace("limit = 32", f'shots = 4\ndev = "{held_csv}"').replace("dev_rows = 12", "dev_rows = 3")
    cell = read_cell(write_study(HEAD + text + ROWS).data[0], 0)
    assert Counter(e["label"] for e in cell.train) == {0: 4, 1: 4}
    assert Counter(e["label"] for e in cell.dev) == {0: 3, 1: 3}
    tested = [e["input_ids"] for e in cell.test]
    assert all(e["input_ids"] in tested for e in cell.dev)


def test_other_rows_under_the_same_name_are_run_anew(write_study: WriteStudy, words: str, tmp_path: Path):
    rows = tmp_path / "rows.csv"
    shutil.copy(re.search(r'eval = "(.+)"', words)[1], rows)
    text = HEAD + re.sub(r'eval = ".+"', f'eval = "{rows}"', words) + ROWS[: ROWS.index('[[row]]\nname = "LoRA')]
    path = tmp_path / "runs.jsonl"
    first = run_study(planned(write_study(text)), path, cores=0)
    assert len(run_study(planned(write_study(text)), path, cores=0)) == len(read_records(path)) == len(first)
    head, *lines = rows.read_text().splitlines()
    rows.write_text("\n".join((head, *lines[:5])) + "\n")
    surroundings.cache_clear()
    sources._digest.cache_clear()
    again = run_study(planned(write_study(text)), path, cores=0)
    assert len(read_records(path)) == 2 * len(first)
    assert {one.sources for one in again}.isdisjoint({one.sources for one in first})


def test_a_metric_or_an_option_that_cannot_be_is_refused_before_training(write_study: WriteStudy, words: str):
    with pytest.raises(StudyError, match="words: metric 'bleu' is none of this task on these rows; there are: accur"):
        planned(write_study(HEAD + words.replace('"accuracy"', '"bleu"') + ROWS))
    with pytest.raises(StudyError, match=r"words: row 'NOLA 64 coefficients': .*law"):
        planned(write_study(HEAD + words + ROWS + 'law = "sine"\n'))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="nothing tells the processes of a command here")
def test_a_process_that_is_killed_is_told_and_what_has_ended_is_kept(study: Study, tmp_path: Path):
    with pytest.raises(StudyError, match=r"a process ended in the middle of words, .* call the command again"):
        run_study(planned(study), tmp_path / "runs.jsonl", cores=1, prepare=die)


def die() -> None:
    """Stop the process that is to run the study."""
    os._exit(9)


def test_prompts_are_held_out_whole_where_no_file_is_named(write_study: WriteStudy, letters: str):
    cell = read_cell(write_study(HEAD + letters + ROWS).data[0], 0)
    held = [e["prompt"] for e in cell.dev]
    assert len(set(held)) == 2
    assert all(held.count(prompt) == 2 for prompt in held)
    assert not {e["prompt"] for e in cell.train} & {*held}


# --- one run ---


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_scored(method: str, write_study: WriteStudy, words: str):
    row = "" if method == "none" else f'[[row]]\nname = "it"\nmethod = "{method}"\n{SMALLEST[method]}\n'
    name = "it" if row else "base alone"
    study = write_study(HEAD + words + ROWS + row)
    record = run_job(study, Job("words", name, "final", 0.01, 0.05, 0))
    assert record.head_parameters == 34
    assert (record.coefficients > 0) == (method != "none")
    assert record.points[0].scores.keys() >= {"loss", "accuracy"}
    assert record.points[0].bytes > record.points[0].head_bytes == 4 * 34
    assert record.step_seconds > 0
    assert (record.expand_seconds is not None) == (method in ("nola", "vera", "randlora", "pranc"))
    again = run_job(study, Job("words", name, "final", 0.01, 0.05, 0))
    assert plain(again) == plain(record)
    other = run_job(study, Job("words", name, "final", 0.01, 0.05, 1))
    assert other.points[0].scores != record.points[0].scores


NOLA = '[[row]]\nname = "plain"\nmethod = "nola"\nbasis = 6\nbits = [16]\n'
START = NOLA.replace("plain", "it") + "start = {%s}\n"


def test_basis_matrices_are_allotted_within_the_same_count(write_study: WriteStudy, words: str):
    study = write_study(HEAD + words + ROWS + NOLA + START % 'allot = "gradient"')
    plain_run, allotted = (run_job(study, Job("words", name, "final", 0.05, 0.05, 0)) for name in ("plain", "it"))
    assert allotted.coefficients == plain_run.coefficients
    assert allotted.points[0].scores != plain_run.points[0].scores
    assert allotted.points[1].bytes > plain_run.points[1].bytes  # the file says the number of each


def test_the_best_of_a_few_seeds_is_the_run_of_that_seed(
    write_study: WriteStudy, words: str, monkeypatch: pytest.MonkeyPatch
):
    seeds: list[int] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        seeds.append(arguments[1].seed)
        return fit(*arguments, **options)

    fit = runs.fit
    monkeypatch.setattr(runs, "fit", watched)
    study = write_study(HEAD + words + ROWS + START % "try_seeds = 3, try_steps = 2")
    losses: dict[int, float] = {}

    def told(*arguments: Any, **options: Any) -> Any:
        found = tried(*arguments, **options)
        losses.update(found.losses)
        return found

    tried = decisions.try_seeds
    monkeypatch.setattr(decisions, "try_seeds", told)
    run_job(study, Job("words", "it", "final", 0.05, 0.05, 5))
    assert sorted(losses) == [5, 6, 7]
    assert seeds == [min(losses, key=lambda seed: losses[seed])]


@pytest.mark.parametrize("data", ["words", "letters"])
def test_a_projected_lora_starts_from_what_the_lora_has_learned(
    data: str, write_study: WriteStudy, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    starts: list[Any] = []

    def watched(model: Any, config: Any, *arguments: Any, **options: Any) -> Any:
        prepare = options.pop("prepare")

        def seen(adapted: Any) -> None:
            groups = parameter_groups(adapted)
            starts.append({name: p.detach().clone() for name, p in groups["adapter"].items()})
            prepare(adapted)

        return fit(model, config, *arguments, prepare=seen, **options)

    fit = runs.fit
    monkeypatch.setattr(runs, "fit", watched)
    study = write_study(HEAD + request.getfixturevalue(data) + ROWS + NOLA + START % "project = 4")
    head_rate = 0.05 if data == "words" else None
    plain_run, projected = (run_job(study, Job(data, name, "final", 1e-9, head_rate, 0)) for name in ("plain", "it"))
    assert projected.coefficients == plain_run.coefficients
    assert projected.head_parameters == plain_run.head_parameters
    # Its header tells the targets as the LoRA names them.
    assert abs(projected.points[1].bytes - plain_run.points[1].bytes) <= 64
    own, found = starts
    assert own.keys() == found.keys()
    assert not any(bool(p.any()) for name, p in own.items() if "nola_b" in name)  # ΔW is 0 there
    assert all(bool(p.any()) for name, p in found.items() if "nola_b" in name)
    assert projected.points[0].scores["loss"] != plain_run.points[0].scores["loss"]


def test_full_fine_tuning_trains_all_parameters(write_study: WriteStudy, words: str, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        before = {name: p.detach().clone() for name, p in arguments[0].named_parameters()}
        result = fit(*arguments, **options)
        seen.append((before, result.model))
        return result

    fit = runs.fit
    monkeypatch.setattr(runs, "fit", watched)
    study = write_study(HEAD + words + ROWS + '[[row]]\nname = "all"\nmethod = "full"\nrate = 0.01\n')
    record = run_job(study, Job("words", "all", "final", 0.01, 0.05, 0))
    ((before, model),) = seen
    groups = parameter_groups(model)
    assert {*groups["head"], *groups["head_vectors"]} == {"classifier.weight", "classifier.bias"}
    assert record.coefficients + 34 == sum(p.numel() for p in model.parameters())
    still = [name for name, p in model.named_parameters() if torch.equal(p.detach(), before[name])]
    assert not [name for name in still if "pooler" not in name]  # which mean pooling does not use


def test_a_language_model_is_scored_by_what_it_writes_and_by_what_it_forgot(write_study: WriteStudy, letters: str):
    study, name = write_study(HEAD + letters + ROWS.replace("[64]", "[128]")), "NOLA 128 coefficients"
    record = run_job(study, Job("letters", name, "final", 0.5, None, 0))
    assert record.points[0].scores.keys() >= {"loss", "bleu", "chrf"}
    assert [point.name for point in record.points] == ["as trained", "16 bits", "2 bits"]
    assert record.base_perplexity is not None
    assert record.base_perplexity != record.points[0].forgetting != record.points[2].forgetting
    trial = run_job(study, Job("letters", name, "trial", 0.5, None, 0))
    assert trial.points[0].scores.keys() == {"loss", "perplexity"}
    assert (len(trial.points), trial.base_perplexity) == (1, None)
    alone = run_job(study, Job("letters", "base alone", "final", 0.0, None, 0))
    assert (alone.coefficients, alone.points[0].bytes, alone.points[0].forgetting) == (0, 0, alone.base_perplexity)


def test_perplexity_of_a_text_against_the_sum_by_hand(language_model: str, tmp_path: Path):
    model = LlamaForCausalLM.from_pretrained(language_model, max_position_embeddings=WINDOW)
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    path = tmp_path / "text.txt"
    path.write_text("abc cab bac " * 40)
    ids = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    windows = [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
    assert len(windows) > 1
    total = 0.0
    with torch.no_grad():
        for one in windows:
            chances = model(torch.tensor([one])).logits[0].double().log_softmax(-1)
            total -= sum(float(chances[i, token]) for i, token in enumerate(one[1:]))
    assert perplexity(model, tokenizer, path) == pytest.approx(math.exp(total / len(windows) / (WINDOW - 1)), rel=1e-5)
    path.write_text("abc")
    with pytest.raises(EmptyDataError, match="at least 128"):
        perplexity(model, tokenizer, path)


def test_a_loss_that_is_not_finite_is_a_record_without_points(study: Study, monkeypatch: pytest.MonkeyPatch):
    def diverge(*_: Any, **__: Any) -> None:
        raise NonFiniteLossError("the loss at step 1 is nan")

    monkeypatch.setattr(runs, "fit", diverge)
    record = run_job(study, Job("words", "LoRA r=2", "trial", 1e-1, 1e-1, 0))
    assert (record.points, record.coefficients) == ((), 0)


def test_a_row_trained_at_two_bits_loses_nothing_at_two_bits(write_study: WriteStudy, words: str):
    rows = "".join(
        f'[[row]]\nname = "{method}"\nmethod = "{method}"\n{size}\nquantize_coefficients = 2\n'
        for method, size in (("nola", "basis = 8"), ("lora", "rank = 2"))
    )
    study = write_study(HEAD + words + ROWS + rows)
    for method in ("nola", "lora"):
        record = run_job(study, Job("words", method, "final", 0.1, 0.1, 0))
        trained, coded = record.points
        assert (coded.name, coded.scores) == ("2 bits", trained.scores)
        assert coded.bytes < trained.bytes


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="nothing tells the peak of a process here")
def test_the_peak_of_a_run_does_not_hide_in_what_earlier_runs_have_freed():
    block = 100_000  # bytes, which the C library keeps when they are freed below what is still held
    kept: list[bytes] = []

    def grow() -> int:
        before = runs._reset_peak()
        held = [b"1" * block for _ in range(800)]
        kept.append(b"1" * block)
        return runs._peak(before) if held else 0

    assert [grow() > 0.9 * 800 * block for _ in range(3)] == [True] * 3


# --- all runs ---


def test_processes_and_a_resumed_study_give_what_one_process_gives(study: Study, tmp_path: Path):
    plan = planned(study)
    here = run_study(plan, tmp_path / "here.jsonl", cores=0)
    lines = (tmp_path / "here.jsonl").read_text().splitlines()
    half = tmp_path / "half.jsonl"
    half.write_text("\n".join(lines[:5]) + "\n" + lines[5][:40])  # cut by a crash
    there = run_study(plan, half, cores=2)
    assert len(here) == len(there) == 12
    assert half.read_text().splitlines()[:5] == lines[:5]
    assert {job_of(r): plain(r) for r in here} == {job_of(r): plain(r) for r in there}
    before = half.read_text()
    assert len(run_study(plan, half, cores=0)) == 12
    assert half.read_text() == before


def test_a_run_of_another_size_than_its_budget_means_now_is_made_again(study: Study, tmp_path: Path):
    plan, path = planned(study), tmp_path / "runs.jsonl"
    records = run_study(plan, path, cores=0)
    assert {job_of(one).row for one in records if "basis" in one.configuration} == {"NOLA 64 coefficients"}
    path.write_text(path.read_text().replace('"basis": ', '"basis": 1'))  # as an older rule may have counted
    again = run_study(plan, path, cores=0)
    assert {job_of(one): plain(one) for one in again} == {job_of(one): plain(one) for one in records}
    assert len(read_records(path)) == 12 + 4
    assert usable(study, read_records(path)) == again


def is_running(process: int) -> bool:
    """Whether it is there, and not only waits to be reaped."""
    status = Path(f"/proc/{process}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="nothing tells the processes of a command here")
def test_a_killed_command_goes_on_where_it_was(study: Study, tmp_path: Path, console_environment: dict[str, str]):
    command = [sys.executable, "-m", "randbasis", "compare", str(tmp_path / "study.toml"), "--results", str(tmp_path)]
    path, messages = tmp_path / "tiny.jsonl", tmp_path / "messages"
    with messages.open("w") as stream:
        process = subprocess.Popen([*command, "--cores", "1"], env=console_environment, stderr=stream,
                                   stdout=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    while process.poll() is None and not read_records(path):
        time.sleep(0.05)
    workers = [int(one) for one in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert workers
    said = messages.read_text().splitlines()
    process.kill()
    process.wait()
    until = time.monotonic() + 60
    while any(is_running(one) for one in workers):
        assert time.monotonic() < until, f"workers {workers} go on without their command"
        time.sleep(0.05)
    before = read_records(path)
    assert 0 < len(before) < 12
    assert [line for line in said if not re.match(r"\d+/12 words · ", line)] == [], "a worker says more than its run"
    with path.open("a") as file:
        file.write('{"study": "tiny", "da')  # as a kill in the middle of a write leaves it
    after = run_study(planned(study), path, cores=0)
    assert len(after) == 12
    assert [plain(r) for r in read_records(path)[: len(before)]] == [plain(r) for r in before]


def test_a_run_that_fails_is_told_and_costs_no_other(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def failing(study: Study, job: Job) -> Record:
        if job.row.startswith("NOLA"):
            raise RuntimeError("no such thing")
        return run_job(study, job)

    monkeypatch.setattr(pool, "run_job", failing)
    failures: list[tuple[Job, Exception]] = []
    plan = planned(study)
    records = run_study(plan, tmp_path / "a.jsonl", cores=0, failed=lambda job, error: failures.append((job, error)))
    assert {r.row for r in records} == {"base alone", "LoRA r=2"}
    assert len(records) == 8
    assert [job.phase for job, _ in failures] == ["trial", "trial"]
    with pytest.raises(RuntimeError, match="no such thing"):
        run_study(plan, tmp_path / "a.jsonl", cores=0)


def test_no_run_begins_after_the_time(study: Study, tmp_path: Path):
    assert run_study(planned(study), tmp_path / "a.jsonl", cores=0, seconds=-1.0) == []


def test_a_budget_that_nothing_meets_is_told_and_left_out(write_study: WriteStudy, words: str):
    plan = planned(write_study(HEAD + words + ROWS + '[[row]]\ncurve = "V"\nmethod = "vera"\nbudgets = ["64"]\n'))
    assert [row.name for row in plan.study.rows] == ["base alone", "LoRA r=2", "NOLA 64 coefficients"]
    (told,) = plan.impossible
    assert told.startswith("words: row 'V 64 B': vera has no configuration of 64 bytes")


def test_the_middle_of_the_rates_is_trains_own_where_a_row_names_none(write_study: WriteStudy, words: str):
    plan = planned(write_study(HEAD + words + ROWS.replace("rate = 0.05\n", "")))
    # Width 16 against the 384 of the sweep: 1e-2 (384 / 16)^0.7 for NOLA, capped to one digit.
    assert plan.middles["words", "NOLA 64 coefficients"] == pytest.approx(1e-2 * 24**0.7, rel=0.2)
    assert plan.middles["words", "base alone"] == 1e-2


# --- the command ---


def test_the_command_lists_runs_and_reports_what_is_there(
    study: Study, words: str, tmp_path: Path, console_environment: dict[str, str]
):
    def run(*options: str) -> Any:
        command = [sys.executable, "-m", "randbasis", "compare", str(tmp_path / "study.toml"), "--json"]
        command += ["--results", str(tmp_path / "r"), *options]
        done = subprocess.run(command, env=console_environment, capture_output=True, text=True, check=False)
        return done.returncode, json.loads(done.stdout)

    code, listed = run("--dry-run")
    assert (code, listed["runs"]) == (0, 12)
    assert {row["row"]: (row["options"], len(row["rates"])) for row in listed["rows"]} == {
        "base alone": ({}, 2), "LoRA r=2": ({"rank": 2}, 2), "NOLA 64 coefficients": ({"basis": 8}, 2)
    }  # fmt: skip
    assert not (tmp_path / "r").exists()
    for record in run_study(planned(study), tmp_path / "all.jsonl", cores=0)[:7]:
        append_record(tmp_path / "r" / "tiny.jsonl", record)
    code, told = run("--report-only", "--output", str(tmp_path / "out"))
    assert (code, told["runs"]) == (0, 7)
    code, told = run("--rows", "VeRA*")
    assert (code, told["error"]) == (2, "StudyError")


def test_named_parts_are_checked(study: Study):
    with pytest.raises(StudyError):
        study.row_named("LoRA")

"""`resume` on a first start, after an interruption and after the end; signals; what a run says of its own result."""

import io
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.metrics import f1_score
from sklearn.utils.class_weight import compute_class_weight
from torch.nn.functional import cross_entropy

from randbasis.errors import OutputExistsError, SettingError
from randbasis.train import AdapterSettings, DataSettings, LoopSettings, TrainSettings, prepare, train
from randbasis.train.class_weights import class_weights, weighted_loss
from randbasis.train.classification import class_scores
from randbasis.train.judgement import compared_size, doubts

LOOP = LoopSettings(max_steps=6, batch_size=8, learning_rate=1e-2, eval_every=3, threads=1, device="cpu")
NOLA = AdapterSettings(method="nola", rank=2, basis=8, seed=5)


@pytest.fixture
def run(encoder: str, sentences_csv: str, held_csv: str, tmp_path: Path) -> TrainSettings:
    data = DataSettings(sentences_csv, eval=held_csv, text_column="sentence", label_column="label")
    return TrainSettings("sequence-classification", encoder, data, tmp_path / "run", adapter=NOLA, loop=LOOP)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


def told(settings: TrainSettings) -> tuple[dict[str, Any], str]:
    console = Console(record=True, width=500, file=io.StringIO())
    return train(settings, console=console).summary, console.export_text()


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_on_a_first_start_it_starts_anew_and_says_so(run: TrainSettings, tmp_path: Path):
    _, text = told(replace(run, resume=True))
    assert f"there is nothing to resume in {run.output}: the run starts anew" in text
    train(replace(run, output=tmp_path / "plain"))
    assert weights(tmp_path / "plain") == weights(Path(run.output))


def test_it_does_not_write_over_what_is_not_a_run(run: TrainSettings):
    Path(run.output).mkdir()
    (Path(run.output) / "adapter_config.json").write_text("{}")
    with pytest.raises(OutputExistsError):
        train(replace(run, resume=True))


@pytest.mark.parametrize("keep", [False, True], ids=["checkpoints gone", "checkpoints kept"])
def test_after_the_end_nothing_is_changed(run: TrainSettings, keep: bool):
    first = train(replace(run, keep_checkpoints=keep))
    before = contents(first.output)
    outcome = train(replace(run, keep_checkpoints=keep, resume=True))
    summary, text = told(replace(run, keep_checkpoints=keep, resume=True))
    assert f"the run in {run.output} is complete: nothing is left to do" in text
    assert contents(first.output) == before
    assert summary == first.summary
    examples = prepare(run).eval
    assert outcome.task.score(outcome.model, examples, 32) == pytest.approx(first.summary["after"], rel=1e-5)
    with pytest.raises(SettingError, match=r"loop\.learning_rate was 0\.01 and is 0\.5"):
        train(replace(run, resume=True, loop=replace(LOOP, learning_rate=0.5)))


def test_a_finished_run_becomes_longer_where_its_checkpoints_were_kept(run: TrainSettings, tmp_path: Path):
    flat = replace(LOOP, schedule="constant", warmup=0.0, keep="last")
    longer = replace(flat, max_steps=9)
    train(replace(run, loop=flat, keep_checkpoints=True))
    summary, text = told(replace(run, loop=longer, keep_checkpoints=True, resume=True))
    assert "it becomes longer (loop.max_steps was 6 and is 9)" in text
    assert summary["steps"] == 9
    train(replace(run, loop=longer, output=tmp_path / "whole"))
    assert weights(Path(run.output)) == weights(tmp_path / "whole"), "a constant rate knows no length"
    train(replace(run, loop=flat, output=tmp_path / "gone"))
    with pytest.raises(SettingError, match="complete and its checkpoints are gone"):
        train(replace(run, loop=longer, output=tmp_path / "gone", resume=True))


# --- signals ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kept", [True, False], ids=["after a checkpoint", "before one"])
def test_a_signal_ends_a_run_with_one_line(
    run: TrainSettings, number: signal.Signals, kept: bool, console_environment: dict[str, str]
):
    data, output = run.data, Path(run.output)
    words = [sys.executable, "-m", "randbasis", "train", "--task", run.task, "--model", run.model]
    words += ["--data", str(data.train), "--eval-data", str(data.eval), "--text-column", "sentence"]
    words += ["--label-column", "label", "--rank", "2", "--basis", "8", "--max-steps", "100000", "--batch-size", "8"]
    words += ["--threads", "1", "--output", str(output), "--eval-every", "20" if kept else "100000", "--device", "cpu"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env=console_environment)  # fmt: skip
    sign = "checkpoints/checkpoint-*/trainer_state.json" if kept else "checkpoints/settings.json"
    deadline = time.monotonic() + 120
    while not list(output.glob(sign)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    last = stderr.strip().splitlines()[-1]
    assert last.startswith(f"stopped by {number.name}: ")
    if kept:
        assert last.endswith("is kept; the same command with --resume goes on from there")
        checkpoints = list((output / "checkpoints").glob("checkpoint-*"))
        assert checkpoints
        assert all((one / "trainer_state.json").is_file() for one in checkpoints), "no half of one"
    else:
        assert last.endswith("nothing of this run is kept")
        assert not output.exists()


# --- class weights, F1, doubts, sizes ---


def test_class_weights_against_sklearn():
    rows = [0, 0, 0, 0, 1, 2, 2]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=rows)
    torch.testing.assert_close(class_weights("balanced", ("a", "b", "c"), rows), torch.tensor(expected).float())
    own = class_weights("a=1, b=4,c=2", ("a", "b", "c"), rows)
    assert own.tolist() == pytest.approx([1 / (12 / 7), 4 / (12 / 7), 2 / (12 / 7)])


@pytest.mark.parametrize(
    ("given", "labels", "words"),
    [
        ("balanced", None, "needs classes"),
        ("a=1", ("a", "b"), "'b'"),
        ("a=1,b=0", ("a", "b"), "above 0"),
        ("a=1,b=x", ("a", "b"), "above 0"),
        ("a=1,bb=2", ("a", "b"), "LABEL=NUMBER"),
    ],
)
def test_class_weights_that_mean_nothing(given: str, labels: tuple[str, ...] | None, words: str):
    with pytest.raises(SettingError, match=words):
        class_weights(given, labels, [0, 1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_weighted_loss_against_torch(smoothing: float):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(9, 3, generator=generator), torch.arange(9) % 3
    even = weighted_loss(logits, labels, torch.ones(3), smoothing)
    torch.testing.assert_close(even, cross_entropy(logits, labels, label_smoothing=smoothing))
    first = weighted_loss(logits, labels, torch.tensor([2.0, 0.0, 0.0]), smoothing)
    torch.testing.assert_close(first, cross_entropy(logits[::3], labels[::3], label_smoothing=smoothing) * 2 / 3)


def test_a_run_with_weights_learns_otherwise_and_equal_ones_change_nothing(run: TrainSettings, tmp_path: Path):
    labels = json.loads((train(run).output / "task.json").read_text())["task"]["labels"]
    results: dict[str, float] = {}
    for name, numbers in (("even", (3, 3)), ("first", (1000, 1)), ("second", (1, 1000))):
        given = ",".join(f"{label}={number}" for label, number in zip(labels, numbers, strict=True))
        loop = replace(LOOP, max_steps=30, eval_every=30, class_weights=given, keep="last", learning_rate=3e-2)
        outcome = train(replace(run, loop=loop, output=tmp_path / name))
        answers = outcome.task.predict(outcome.model, prepare(run).eval, 32)
        results[name] = sum(answer["prediction"] == labels[0] for answer in answers) / len(answers)
    assert results["first"] == 1.0
    assert results["second"] == 0.0
    loop = replace(LOOP, max_steps=30, eval_every=30, keep="last", learning_rate=3e-2)
    plain = train(replace(run, loop=loop, output=tmp_path / "plain"))
    even = json.loads((tmp_path / "even" / "summary.json").read_text())
    assert even["after"] == pytest.approx(plain.summary["after"], rel=1e-4)


@pytest.mark.parametrize("classes", [2, 4])
def test_f1_against_sklearn(classes: int):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, classes, generator=generator)
    expected = torch.randint(0, classes, (40,), generator=generator).tolist()
    scores, predicted = class_scores(logits, expected), logits.argmax(-1).tolist()
    assert scores["f1_macro"] == pytest.approx(f1_score(expected, predicted, average="macro"))
    assert ("f1" in scores) == (classes == 2)
    if classes == 2:
        assert scores["f1"] == pytest.approx(f1_score(expected, predicted))


def test_doubts():
    assert doubts("accuracy", {"accuracy": 0.5}, {"accuracy": 0.6, "matthews": 0.2}) == []
    assert "no better than before" in doubts("accuracy", {"accuracy": 0.5}, {"accuracy": 0.5, "matthews": 0.2})[0]
    assert "no better than before" in doubts("loss", {"loss": 1.0}, {"loss": 1.1})[0]
    assert doubts("loss", {"loss": 1.0}, {"loss": 0.9}) == []
    assert "Matthews' coefficient is 0" in doubts("accuracy", {"accuracy": 0.4}, {"accuracy": 0.5, "matthews": 0.0})[0]


def test_a_run_that_learns_nothing_says_so(run: TrainSettings):
    summary, text = told(replace(run, loop=replace(LOOP, learning_rate=0.0, head_learning_rate=0.0)))
    assert "warning: accuracy after training" in text
    assert summary["doubts"]


@pytest.mark.parametrize("method", ["nola", "lora", "none"])
def test_the_size_against_peft_lora_of_rank_one(run: TrainSettings, method: str, tmp_path: Path):
    adapter = {"nola": NOLA, "lora": AdapterSettings(method="lora", rank=2), "none": AdapterSettings(method="none")}
    summary = train(replace(run, adapter=adapter[method])).summary
    if method == "none":
        assert "lora_rank_1" not in summary
        return
    one = train(replace(run, adapter=AdapterSettings(method="lora", rank=1), output=tmp_path / "one")).summary
    assert summary["lora_rank_1"]["coefficients"] == one["coefficients"]
    assert summary["lora_rank_1"]["bytes"] == 4 * one["coefficients"]
    assert summary["lora_rank_1"]["times"] == pytest.approx(one["coefficients"] / summary["coefficients"], abs=0.01)


def test_a_model_without_an_adapter_has_nothing_to_compare():
    assert compared_size(torch.nn.Linear(2, 2)) is None

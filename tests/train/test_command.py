"""The command: documents on the output stream, messages on the other, exit codes."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from randbasis.cli import app

COMMANDS = ["train", "evaluate", "predict", "generate", "plan", "inspect", "merge"]


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), catch_exceptions=False)


def train_words(encoder: str, data: str, held: str, output: Path) -> list[str]:
    return ["train", "--task", "sequence-classification", "--model", encoder, "--data", data, "--eval-data", held,
            "--text-column", "sentence", "--label-column", "label", "--method", "nola", "--rank", "2", "--basis", "8",
            "--seed", "3", "--max-steps", "6", "--batch-size", "8", "--threads", "1",
            "--output", str(output)]  # fmt: skip


@pytest.fixture(scope="module")
def trained(encoder: str, sentences_csv: str, held_csv: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("command") / "run"
    result = run(*train_words(encoder, sentences_csv, held_csv, output), "--quiet")
    assert result.exit_code == 0, result.stderr
    assert "coefficients" in result.stdout
    assert "adapter bytes" in result.stdout
    return output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: randbasis {command}" in re.sub(r"\s+", " ", result.stdout)
    assert "--json" in result.stdout


def test_train_answers_with_one_document(encoder: str, sentences_csv: str, held_csv: str, tmp_path: Path):
    words = train_words(encoder, sentences_csv, held_csv, tmp_path / "run")
    result = run(*words, "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["settings"]["adapter"]["seed"] == 3
    assert {"before", "after", "coefficients", "adapter_bytes", "seconds", "output"} <= set(summary)
    assert "step 6:" in result.stderr
    again = run(*words, "--json")
    assert again.exit_code == 2
    assert json.loads(again.stdout)["error"] == "OutputExistsError"
    assert "give --overwrite" in again.stderr


def test_evaluate(trained: Path, held_csv: str):
    result = run("evaluate", "--adapter", str(trained), "--data", held_csv, "--json", "--threads", "1")
    document = json.loads(result.stdout)
    assert document["rows"] == 24
    summary = json.loads((trained / "summary.json").read_text())
    assert document["metrics"] == pytest.approx(summary["after"], rel=1e-5, abs=1e-7)
    plain = run("evaluate", "--adapter", str(trained), "--data", held_csv, "--limit", "5")
    assert plain.exit_code == 0
    assert "accuracy" in plain.stdout


def test_predict(trained: Path, held_csv: str, tmp_path: Path):
    words = ["predict", "--adapter", str(trained), "--data", held_csv, "--threads", "1"]
    rows = [json.loads(line) for line in run(*words).stdout.splitlines()]
    assert len(rows) == 24
    assert {"sentence", "label", "prediction", "probability"} == set(rows[0])
    assert json.loads(run(*words, "--json").stdout)["rows"] == rows
    output = tmp_path / "answers.jsonl"
    assert json.loads(run(*words, "--output", str(output), "--json").stdout) == {"output": str(output), "rows": 24}
    assert [json.loads(line) for line in output.read_text().splitlines()] == rows
    assert run(*words, "--output", str(output)).exit_code == 2
    assert run(*words, "--output", str(output), "--overwrite").exit_code == 0


def test_predict_needs_no_labels(trained: Path, tmp_path: Path):
    path = tmp_path / "rows.tsv"
    path.write_text("text\tlabel\na good day\tnever seen\n")
    rows = run("predict", "--adapter", str(trained), "--data", str(path), "--text-column", "text").stdout
    assert json.loads(rows)["prediction"] in ("pos", "neg")


def test_generate(language_model: str, tmp_path: Path):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("id,mr\n1,ab\n2,cd\n")
    words = ["generate", "--model", language_model, "--max-new-tokens", "5", "--threads", "1"]
    given = run(*words, "--prompt", "ab", "--prompt", "cd")
    read = run(*words, "--data", str(prompts), "--prompt-column", "mr")
    assert [json.loads(line)["prompt"] for line in given.stdout.splitlines()] == ["ab", "cd"]
    assert given.stdout == read.stdout
    sampled = [run(*words, "--prompt", "ab", "--sample", "--seed", seed, "--json").stdout for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "nolla"], "method 'nolla' is unknown; did you mean nola"),
        (["--rank", "0"], "rank must be at least 1, got 0"),
        (["--text-column", "text"], "column 'text' is not in"),
        (["--targets", "nothing"], "nothing"),
        (["--law", "signs"], "law"),
        (["--task", "classification"], "task 'classification' is unknown"),
        (["--metric", "bleu"], "metric 'bleu' does not apply"),
        (["--data", "nowhere.csv"], "nowhere.csv"),
    ],
    ids=" ".join,
)
def test_bad_usage_is_2_and_leaves_nothing(
    encoder: str, sentences_csv: str, held_csv: str, tmp_path: Path, words: list[str], message: str
):
    result = run(*train_words(encoder, sentences_csv, held_csv, tmp_path / "run"), *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_missing_options_and_unknown_commands_are_2():
    assert run("train", "--task", "causal-lm").exit_code == 2
    assert run("tune").exit_code == 2
    assert run("evaluate").exit_code == 2


def test_failures_are_1(trained: Path, held_csv: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args: Any, **rest: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    output = tmp_path / "rows.jsonl"
    result = run("predict", "--adapter", str(trained), "--data", held_csv, "--output", str(output), "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"] == "SaveError"
    assert "the disk is full" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_traceback_on_request(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANDBASIS_TRACEBACK", "1")
    result = run("evaluate", "--adapter", "nowhere")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


def test_as_a_module_in_a_fresh_process(trained: Path, held_csv: str, console_environment: dict[str, str]):
    words = [sys.executable, "-m", "randbasis", "evaluate", "--adapter", str(trained), "--data", held_csv, "--json"]
    done = subprocess.run(
        [*words, "--threads", "1"], capture_output=True, text=True, env=console_environment, check=False
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((trained / "summary.json").read_text())
    assert json.loads(done.stdout)["metrics"] == pytest.approx(summary["after"], rel=1e-5, abs=1e-7)
    bad = subprocess.run(["randbasis", "evaluate", "--adapter", "nowhere"], capture_output=True, text=True,
                         env=console_environment, check=False)  # fmt: skip
    assert bad.returncode == 2
    assert (
        "error: --adapter must be a folder, a packed file, its URL, or store:NAME, there is nothing at 'nowhere'"
        in bad.stderr
    )

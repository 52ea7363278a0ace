"""What a person reads beside the answer: nothing of third parties, our warnings once, errors in the command's words."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

from randbasis.cli import app, store
from randbasis.cli.command import in_command_words
from randbasis.cli.console import reported

#: Runs commands one after another in a process that nothing was imported in, as the entry point does.
RUN = """
import json, sys
from randbasis.cli import app, noise
noise.no_bars_in_a_pipe()
for words in json.loads(sys.argv[1]):
    print("$", *words, file=sys.stderr, flush=True)
    code = app(words, standalone_mode=False)
    print("code", code, file=sys.stderr, flush=True)
"""
KNOWN = (
    r"\$ .*",
    "code (None|0)",
    r"(before|step \d+): \w+ [-\d.]+(, \w+ [-\d.]+)*",
    r"warning: \w+ after training \([-\d.]+\) is no better than before \([-\d.]+\); try another .*",
    r"warning: Matthews' coefficient is 0: .*",
    r"(loss [\d.]+ ━+ 4/4 [\d:]+ [\d:]+)?",
    r"warning: the packed file names the base model 'encoder\d+' and not '[^']+', a path of this machine; give "
    "--base-name to name it otherwise",
)


def test_commands_say_nothing_that_we_do_not_know(
    encoder: str, language_model: str, sentences_csv: str, pairs_jsonl: str, tmp_path: Path
):
    run, lm, file = str(tmp_path / "run"), str(tmp_path / "lm"), str(tmp_path / "run.safetensors")
    adapter = ["--method", "nola", "--rank", "2", "--basis", "4", "--max-steps", "4", "--batch-size", "8"]
    columns = ["--text-column", "sentence", "--label-column", "label"]
    commands = [
        ["train", "--task", "sequence-classification", "--model", encoder, "--data", sentences_csv, *columns, *adapter,
         "--output", run],
        ["train", "--task", "causal-lm", "--model", language_model, "--data", pairs_jsonl, "--prompt-column", "mr",
         "--target-column", "ref", *adapter, "--output", lm, "--json"],
        ["evaluate", "--adapter", run, "--data", sentences_csv],
        ["evaluate", "--adapter", lm, "--data", pairs_jsonl, "--max-new-tokens", "3"],
        ["predict", "--adapter", run, "--data", sentences_csv],
        ["generate", "--adapter", lm, "--prompt", "a", "--max-new-tokens", "3"],
        ["pack", run, file],
        ["inspect", run],
        ["inspect", file, "--json"],
        ["quantize", run],
        ["plan", language_model, "--method", "vera"],
        ["diff", run, file],
        ["export", lm, str(tmp_path / "lora"), "--to", "peft-lora"],
        ["merge", "--adapter", lm, "--output", str(tmp_path / "merged")],
        ["store", "add", str(tmp_path / "store.db"), file],
        ["store", "verify", str(tmp_path / "store.db")],
    ]  # fmt: skip
    words = [sys.executable, "-c", RUN, json.dumps(commands)]
    environment = os.environ | {"COLUMNS": "80"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\ncode ") == len(commands), done.stderr
    unknown = [line for line in done.stderr.splitlines() if not any(re.fullmatch(one, line) for one in KNOWN)]
    assert not unknown


def test_a_warning_of_ours_is_one_line(capsys: pytest.CaptureFixture[str]):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with reported(as_json=True):
            for _ in range(2):
                warnings.warn("3 of 9 rows were cut", stacklevel=1)
                warnings.warn("`is_gradient_checkpointing` is deprecated and so on", FutureWarning, stacklevel=1)
    captured = capsys.readouterr()
    assert captured.err == "warning: 3 of 9 rows were cut\n"
    assert captured.out == ""


def test_from_python_a_warning_is_as_usual():
    with reported(as_json=False):
        pass
    with pytest.warns(UserWarning, match="cut"):
        warnings.warn("3 of 9 rows were cut", stacklevel=1)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train"], "Missing options --task, --model, --data, --output."),
        (["train", "--task", "x", "--output", "y"], "Missing options --model, --data."),
        (["average"], "Missing argument adapters; missing option --output."),
        (["pack", "a"], "Missing argument 'file'."),
        (["train", "--lerning-rate", "1"], "--learning-rate"),
        (["trian"], "Did you mean 'train'?"),
        (["store", "lst"], "Did you mean 'list'?"),
        (["evaluate", "--model", "x", "--batch-size", "0"], "error: --batch-size must be at least 1, got 0"),
        (["plan", "x", "--rank", "0"], "error: --rank must be at least 1, got 0"),
        (["export", "a", "b", "--to", "peft-lor"], "error: --to must be one of"),
        (["evaluate"], "neither an adapter nor a model was given"),
    ],
)
def test_bad_usage_in_the_words_of_the_command(words: list[str], told: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert told in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("output 'a' exists; give overwrite to replace it", "--output 'a' exists; give --overwrite to replace it"),
        ("label_column and text_column are both 'a'", "--label-column and --text-column are both 'a'"),
        ("say rank=16, or heads='first'", "say --rank 16, or heads='first'"),
        ("model 'm': its weights cannot be read", "--model 'm': its weights cannot be read"),
        ("the model has no rank; give a model", "the model has no rank; give a model"),
        ("rows/text_column.csv has no 'label_column'", "rows/text_column.csv has no 'label_column'"),
    ],
)
def test_parameters_become_options(message: str, told: str, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        print(in_command_words(message))  # what the command would print

    monkeypatch.setattr("randbasis.cli.train.reported", fail)
    words = ["train", "--task", "t", "--model", "m", "--data", "d", "--output", "o"]
    assert CliRunner().invoke(app, words).stdout.strip() == told


@pytest.mark.parametrize("columns", ["80", None])
def test_a_reader_that_goes_away_ends_a_command_quietly(columns: str | None, tmp_path: Path):
    """Both where a table is longer than what a pipe holds, and where nothing was written out before the end."""
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "randbasis", "store", "list", str(tmp_path / "store.db")]
    words += [] if columns else ["--json"]
    with store._opened(words[-1] if columns else words[-2], 1, create=True):  # pyright: ignore[reportPrivateUsage]
        pass
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_completion_knows_commands_and_options():
    words = {"_RANDBASIS_COMPLETE": "complete_bash", "COMP_WORDS": "randbasis tr", "COMP_CWORD": "1"}
    code = "import sys; from randbasis.cli import app; app(prog_name='randbasis')"

    def completed(**environment: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", code],
            capture_output=True, text=True, check=False, env=os.environ | words | environment,
        )  # fmt: skip
        assert not re.search(r"\|\s+(torch|transformers|peft|numpy)$", done.stderr, re.M)
        return done.stdout.split()

    assert completed() == ["train"]
    assert completed(COMP_WORDS="randbasis train --learn", COMP_CWORD="2") == ["--learning-rate"]

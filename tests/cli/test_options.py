"""Options of the command that would be ignored are refused, and what is checked before them is left as it was."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from randbasis.cli import app

TRAIN = ["train", "--model", "nowhere", "--data", "rows.csv", "--output", "out"]
TEXTS = [*TRAIN, "--task", "sequence-classification"]
WRITER = [*TRAIN, "--task", "causal-lm"]
PAIRS = [*WRITER, "--prompt-column", "a", "--target-column", "b"]
IMAGES = [*TRAIN, "--task", "image-classification"]
GENERATE = ["generate", "--model", "nowhere", "--prompt", "a"]
EVALUATE = ["evaluate", "--model", "nowhere", "--data", "rows.csv"]
PREDICT = ["predict", "--model", "nowhere", "--data", "rows.csv"]


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ([*GENERATE, "--temperature", "1"], "--temperature"),
        ([*GENERATE, "--top-k", "3"], "--top-k"),
        ([*GENERATE, "--top-p", "0.5"], "--top-p"),
        ([*GENERATE, "--seed", "0"], "--seed"),
        ([*GENERATE, "--data", "rows.csv"], "--data"),
        ([*GENERATE, "--limit", "1"], "--limit"),
        ([*GENERATE, "--prompt-column", "a"], "--prompt-column"),
        ([*GENERATE, "--length-penalty", "2"], "--length-penalty"),
        ([*GENERATE, "--overwrite"], "--overwrite"),
        ([*EVALUATE, "--text-column", "a", "--beams", "2"], "--beams"),
        ([*EVALUATE, "--text-column", "a", "--max-new-tokens", "5"], "--max-new-tokens"),
        ([*EVALUATE, "--prompt-column", "a", "--text-column", "b"], "--text-column"),
        ([*EVALUATE, "--split", "test"], "--split"),
        ([*PREDICT, "--prompt-column", "a", "--overwrite"], "--overwrite"),
        ([*TEXTS, "--image-size", "32"], "--image-size"),
        ([*TEXTS, "--flip"], "--flip"),
        ([*TEXTS, "--separator", " "], "--separator"),
        ([*TEXTS, "--end-token", "x"], "--end-token"),
        ([*TEXTS, "--prompt-column", "x"], "--prompt-column"),
        ([*WRITER, "--text-column", "a", "--pooling", "mean"], "--pooling"),
        ([*WRITER, "--text-column", "a", "--separator", " "], "--separator"),
        ([*WRITER, "--label-column", "a"], "--label-column"),
        ([*WRITER, "--text-column", "a", "--loss-on", "all"], "--loss-on"),
        ([*PAIRS, "--chat-template", "x.jinja"], "--chat-template"),
        ([*WRITER, "--prompt-template", "{a}", "--target-column", "b", "--separator", " "], "--separator"),
        ([*TEXTS, "--packing"], "--packing"),
        ([*TEXTS, "--messages-column", "a"], "--messages-column"),
        ([*TEXTS, "--prompt-template", "{a}"], "--prompt-template"),
        ([*GENERATE, "--messages-column", "a"], "--messages-column"),
        ([*WRITER, "--shots", "2"], "--shots"),
        ([*PAIRS, "--text-column", "c"], "--text-column"),
        ([*PAIRS, "--head-learning-rate", "1"], "--head-learning-rate"),
        ([*IMAGES, "--text-column", "a"], "--text-column"),
        ([*IMAGES, "--max-length", "9"], "--max-length"),
        ([*IMAGES, "--format", "csv"], "--format"),
        ([*TEXTS, "--max-steps", "3", "--epochs", "3"], "--epochs"),
        ([*TEXTS, "--eval-data", "dev.csv", "--eval-fraction", "0.1"], "--eval-fraction"),
        ([*TEXTS, "--schedule", "constant", "--warmup", "0.06"], "--warmup"),
        ([*TEXTS, "--method", "none", "--rank", "4"], "--rank"),
        ([*TEXTS, "--method", "none", "--targets", "query"], "--targets"),
        ([*TEXTS, "--method", "lora", "--seed", "0"], "--seed"),
        ([*TEXTS, "--method", "vera", "--basis", "4"], "--basis"),
        ([*TEXTS, "--method", "pranc", "--rank", "4"], "--rank"),
        ([*TEXTS, "--method", "randlora", "--parametrization", "offset"], "--parametrization"),
        (["plan", "nowhere", "--method", "vera", "--basis", "4"], "--basis"),
        (["push", "nowhere", "me/x", "--dry-run", "out", "--private"], "--private"),
        (["push", "nowhere", "me/x", "--dry-run", "out", "--message", "m"], "--message"),
        (["push", "nowhere", "me/x", "--overwrite"], "--overwrite"),
        (["quantize", "nowhere", "--overwrite"], "--overwrite"),
        (["quantize", "nowhere", "--base-name", "x"], "--base-name"),
        (["quantize", "nowhere", "--bits", "3"], "--bits"),
        (["quantize", "nowhere", "out", "--bits", "16", "--group-size", "32"], "--group-size"),
        (["quantize", "a.safetensors", "b.safetensors", "--base-name", "x"], "--base-name"),
        (["quantize", "a.safetensors", "--model", "x"], "--model"),
        (["export", "nowhere", "out", "--to", "merged", "--rank", "4"], "--rank"),
        (["import", "nowhere", "out", "--to", "vera", "--basis", "4"], "--basis"),
        (["import", "nowhere", "out", "--to", "peft-lora", "--seed", "0"], "--seed"),
        (["import", "nowhere", "out", "--to", "merged", "--limit", "1"], "--limit"),
        (["import", "nowhere", "out", "--to", "nola", "--dtype", "auto"], "--dtype"),
        (["diff", "a.safetensors", "b.safetensors", "--base", "x"], "--base"),
        (["average", "a.safetensors", "b.safetensors", "--output", "c", "--base", "x"], "--base"),
        (["store", "add", "s.db", "a.safetensors", "b.safetensors", "--name", "x"], "--name"),
        (["store", "get", "s.db", "x", "--overwrite"], "--overwrite"),
        (["store", "get", "s.db", "--digest", "0", "--version", "1"], "--version"),
        (["pack", "nowhere", "x.safetensors", "--bits", "4", "--bfloat16"], "--bfloat16"),
        (["pack", "nowhere", "x.safetensors", "--group", "32"], "--group-size"),
        (["inspect", "nowhere", "--overwrite"], "--overwrite"),
    ],
    ids=lambda value: " ".join(value[-3:]) if isinstance(value, list) else "",
)
def test_an_option_that_would_be_ignored_is_refused(
    words: list[str], option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also with the value that is its default: what counts is that somebody wrote it."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {option} has no meaning here")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*TEXTS, "--targets", ""], "targets must name at least one module"),
        (["plan", "nowhere", "--targets", " , "], "targets must name at least one module"),
        ([*TEXTS, "--text-column", "a", "--label-column", "a"], "--label-column and --text-column are both 'a'"),
        (
            [*TEXTS, "--text-column", "a", "--text-pair-column", "a"],
            "--text-pair-column and --text-column are both 'a'",
        ),
        ([*WRITER, "--prompt-column", "a", "--target-column", "a"], "--target-column and --prompt-column are both 'a'"),
    ],
)
def test_words_that_contradict_themselves(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_language_model_without_columns_is_told_which_it_needs(language_model: str, tmp_path: Path):
    rows = tmp_path / "rows.csv"
    rows.write_text("mr,ref\na,b\n")
    for command, message in (("evaluate", "name --prompt-column"), ("predict", "predict needs the column")):
        words = [command, "--model", language_model, "--data", str(rows)]
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 2
        assert message in result.stderr


def test_a_flag_that_is_switched_off_asks_for_nothing():
    """What stops the run is the missing model, not `--no-flip` for a text."""
    result = CliRunner().invoke(app, [*TEXTS, "--text-column", "a", "--label-column", "b", "--no-flip", "--json"])
    assert result.exit_code == 2
    assert "has no meaning" not in result.output


@pytest.mark.parametrize("words", [PREDICT, ["generate", "--model", "nowhere", "--data", "rows.csv"]])
def test_answers_do_not_take_the_place_of_the_rows(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("a\nb\n")
    result = CliRunner().invoke(app, [*words, "--prompt-column", "a", "--output", "rows.csv", "--overwrite"])
    assert result.exit_code == 2
    assert "a file that is read from" in result.output
    assert (tmp_path / "rows.csv").read_text() == "a\nb\n"

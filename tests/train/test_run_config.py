"""A run as a file: what is read, what is refused, and that what a run leaves makes the same run again."""

import json
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
import typer
import yaml
from click.testing import Result
from safetensors import torch as safetensors
from typer.testing import CliRunner

from randbasis.cli import app
from randbasis.train import AdapterSettings, DataSettings, LoopSettings, TrainSettings
from randbasis.train.run_config import FOR_PYTHON, OF_THIS_CALL, OPTION_NAMES, config_text


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, words)], catch_exceptions=False)


@pytest.fixture
def settings(encoder: str, sentences_csv: str, held_csv: str) -> dict[str, object]:
    return {"task": "sequence-classification", "model": encoder, "data": sentences_csv, "eval-data": held_csv,
            "text-column": "sentence", "label_column": "label", "method": "nola", "rank": 2, "basis": 8, "seed": 3,
            "max_steps": 4, "batch_size": 8, "threads": 1, "learning-rate": 0.02, "flip": False, "json": True,
            "quiet": True, "targets": ["query", "value"]}  # fmt: skip


def words_of(settings: dict[str, object], file: str) -> list[object]:
    """The settings on the command line, but for those that the file names."""
    dashed = {name.replace("_", "-"): value for name, value in settings.items() if not isinstance(value, bool | list)}
    given = file.replace("_", "-")
    return [word for name, value in dashed.items() if name not in given for word in (f"--{name}", value)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_a_file_of_options_is_the_run_and_what_it_leaves_is_the_same_run(
    settings: dict[str, object], tmp_path: Path, kind: str
):
    file = tmp_path / f"mine.{kind}"
    file.write_text(yaml.safe_dump(settings) if kind == "yaml" else json.dumps(settings))
    first = run("--config", file, "--output", tmp_path / "a")
    assert first.exit_code == 0, first.stderr
    summary = json.loads(first.stdout)  # --json of the file
    assert summary["settings"]["adapter"]["targets"] == ["query", "value"]
    assert summary["settings"]["loop"]["learning_rate"] == 0.02
    again = run("--config", tmp_path / "a" / "run.yaml", "--output", tmp_path / "b", "--quiet")
    assert again.exit_code == 0, again.stderr
    one, other = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "a" / "run.yaml").read_text() == (tmp_path / "b" / "run.yaml").read_text()
    changed = run("--config", tmp_path / "a" / "run.yaml", "--output", tmp_path / "c", "--quiet", "--seed", 4)
    assert changed.exit_code == 0, changed.stderr
    assert yaml.safe_load((tmp_path / "c" / "run.yaml").read_text())["seed"] == 4
    assert not all(torch.equal(one[name], value) for name, value in weights(tmp_path / "c").items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning-rat: 0.1", r"'learning_rat' is not an option of this command; did you mean learning_rate"),
        ("rank: 4\nrank: 5", "'rank' stands there twice"),
        ("batch-size: 4\nbatch_size: 5", "'batch_size' stands there twice"),
        ("rank: four", "rank must be a whole number, got 'four'"),
        ("rank: 4.0", "rank must be a whole number, got 4.0"),
        ("rank: true", "rank must be a whole number, got True"),
        ("rank:", "rank must be a whole number, got nothing"),
        ("alpha: high", "alpha must be a number, got 'high'"),
        ("flip: 1", "flip must be true or false, got 1"),
        ("label_column: no", "label_column must be a text (in quotes, where it could be taken for something else)"),
        ("model: [a, b]", "model must be a text"),
        ("config: other.yaml", "'config' is not an option of this command"),
        ("1: 2", "the key 1 is a int"),
        ("- rank", "holds a list; options and their values are needed"),
        ("", "holds nothing"),
        ("rank: [", "is not YAML"),
        ("learning_rate: -1", "--learning-rate must be a finite number not below 0"),
        ("image_size: 32", "--image-size has no meaning here"),
    ],
)
def test_what_a_file_may_not_say(settings: dict[str, object], tmp_path: Path, text: str, message: str):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    words = ["--task", "sequence-classification", "--json", *words_of(settings, text)]
    result = run("--config", file, "--output", tmp_path / "run", *words)
    assert result.exit_code == 2
    told = json.loads(result.stdout)["message"]
    assert message in told
    assert str(file) in told or "has no meaning" in told or "finite" in told
    assert not (tmp_path / "run").exists()


def test_a_key_twice_in_json_and_a_file_that_is_not_there(tmp_path: Path):
    file = tmp_path / "mine.json"
    file.write_text('{"rank": 1, "rank": 2}')
    assert "'rank' stands there twice" in run("--config", file).stderr
    file.write_text("[1]")
    assert "holds a list" in run("--config", file).stderr
    assert "is not a file" in run("--config", tmp_path / "nothing.yaml").stderr


def test_an_exponent_without_a_point_is_a_number(settings: dict[str, object], tmp_path: Path):
    """YAML takes it for a text."""
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**settings, "max_steps": 1}).replace("learning-rate: 0.02", "learning-rate: 2e-2"))
    assert (
        json.loads(run("--config", file, "--output", tmp_path / "a").stdout)["settings"]["loop"]["learning_rate"]
        == 0.02
    )


def test_a_column_by_its_index_needs_no_quotes(settings: dict[str, object], tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("text_column: 0\n")
    result = run("--config", file, "--output", tmp_path / "a", *words_of(settings, "text_column"))
    assert "its columns are '0', '1'" in result.stderr  # which is how a file without a header is read


def test_every_setting_that_is_written_is_an_option():
    options = {one.name for one in typer.main.get_command(app).commands["train"].params}
    options |= {
        one.opts[0].lstrip("-").replace("-", "_") for one in typer.main.get_command(app).commands["train"].params
    }
    for kind in (TrainSettings, DataSettings, AdapterSettings, LoopSettings):
        names = {one.name for one in fields(kind)} - {"adapter", "loop", *OF_THIS_CALL, *FOR_PYTHON}
        assert {OPTION_NAMES.get(name, name) for name in names} <= options
        for name in FOR_PYTHON:
            assert name not in options


def test_what_only_python_can_say_is_written_where_it_is_said():
    settings = TrainSettings("causal-lm", "m", DataSettings("d"), "o")
    assert "group_by_length" not in config_text(settings)
    assert "group_by_length: false" in config_text(
        TrainSettings("causal-lm", "m", DataSettings("d"), "o", loop=LoopSettings(group_by_length=False))
    )
    defaults = [one.name for one in fields(LoopSettings) if one.default is not MISSING and one.default is None]
    assert not set(defaults) & set(yaml.safe_load(config_text(settings)))

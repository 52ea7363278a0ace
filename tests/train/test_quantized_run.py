"""`randbasis train --quantize-coefficients`: what is saved, and that packing at those bits loses nothing."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from randbasis.adapter_file import read
from randbasis.cli import app


def run(*words: object) -> tuple[int, dict]:
    done = CliRunner().invoke(app, [*map(str, words), "--json"], catch_exceptions=False)
    return done.exit_code, json.loads(done.stdout)


@pytest.fixture(scope="module")
def words(encoder: str, sentences_csv: str, held_csv: str) -> list[object]:
    return ["train", "--task", "sequence-classification", "--model", encoder, "--data", sentences_csv, "--eval-data",
            held_csv, "--text-column", "sentence", "--label-column", "label", "--targets", "query,value", "--quiet",
            "--max-steps", 6, "--batch-size", 8, "--learning-rate", 0.1, "--threads", 1]  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [
        ("--method", "nola", "--rank", 2, "--basis", 8),
        ("--method", "vera", "--rank", 4),
        ("--method", "randlora", "--rank", 5),
        ("--method", "pranc", "--basis", 8),
    ],
    ids=lambda words: words[1],
)
def test_a_run_at_three_bits_packs_without_loss(encoder: str, words: list, method: tuple, tmp_path: Path):
    output, held = tmp_path / "run", words[words.index("--eval-data") + 1]
    code, summary = run(*words, *method, "--quantize-coefficients", 3, "--output", output)
    assert code == 0
    assert summary["settings"]["adapter"]["quantize_coefficients"] == 3
    assert json.loads((output / "adapter_config.json").read_text())["quantize_coefficients"] == 3
    trained = [t for n, t in load_file(output / "adapter_model.safetensors").items() if ".randbasis_" in n]
    assert max(len(tensor.unique()) for tensor in trained) > 7, "full precision is what is saved"

    assert run("pack", output, tmp_path / "file", "--bits", 3, "--base-name", "tiny")[0] == 0
    assert run("unpack", tmp_path / "file", tmp_path / "again")[0] == 0
    vectors = [v for _, delta in read(tmp_path / "file").matrices() for v in delta.coefficients.values()]
    assert max(len(vector.unique()) for vector in vectors) <= 7

    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (output / name).write_bytes((tmp_path / "again" / name).read_bytes())
    assert json.loads((output / "adapter_config.json").read_text())["quantize_coefficients"] is None
    code, found = run("evaluate", "--adapter", output, "--data", held, "--model", encoder)
    assert code == 0
    assert found["metrics"] == pytest.approx(summary["after"], rel=1e-5)


def test_a_quantized_folder_knows_its_task(words: list, tmp_path: Path):
    output, held = tmp_path / "run", words[words.index("--eval-data") + 1]
    code, summary = run(*words, "--method", "nola", "--rank", 2, "--basis", 8, "--output", output)
    assert code == 0
    assert run("quantize", output, tmp_path / "eight", "--bits", 8)[0] == 0
    metrics = run("evaluate", "--adapter", tmp_path / "eight", "--data", held)[1]["metrics"]
    assert metrics["loss"] == pytest.approx(summary["after"]["loss"], rel=1e-2)
    assert metrics["loss"] != summary["after"]["loss"]


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (("--method", "nola", "--basis", 8, "--quantize-coefficients", 5), "PrecisionError"),
        (("--method", "lora", "--rank", 1, "--quantize-coefficients", 3), "OptionError"),
    ],
)
def test_refused_before_anything_is_written(words: list, more: tuple, error: str, tmp_path: Path):
    code, message = run(*words, *more, "--output", tmp_path / "run")
    assert (code, message["error"]) == (2, error)
    assert not (tmp_path / "run").exists()

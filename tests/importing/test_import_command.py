"""``randbasis import`` as a user calls it: exit codes, one JSON document, tables, and options that mean nothing."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from peft_adapters import adapted, contents, llama
from typer.testing import CliRunner, Result

from randbasis.adapters.saved import open_adapter
from randbasis.cli import app

TARGETS = ["q_proj", "down_proj"]


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["import", *map(str, words)], env={"COLUMNS": "140"})


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A folder with `lora`, `vera` and `randlora` for the model in `base`."""
    llama().save_pretrained(tmp_path / "base")
    configs: dict[str, peft.PeftConfig] = {
        "lora": peft.LoraConfig(r=3, target_modules=TARGETS),
        "vera": peft.VeraConfig(r=5, target_modules=TARGETS),
        "randlora": peft.RandLoraConfig(r=5, target_modules=TARGETS),
    }
    for name, config in configs.items():
        base = llama()
        base.name_or_path = str(tmp_path / "base")
        adapted(base, config, tmp_path / name)
    return tmp_path


def document(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("words", "method", "coefficients"),
    [
        (
            ["--to", "nola", "--rank", "2", "--basis", "6", "--basis-b", "5", "--seed", "3", "--law", "normal"],
            "nola",
            44,
        ),
        (["--to", "nola", "--basis", "6", "--unique-basis", "--parametrization", "plain", "--alpha", "2"], "nola", 48),
        (["--to", "vera", "--rank", "9"], "vera", 4 * (9 + 32)),
    ],
)
def test_nearest(words: list[str], method: str, coefficients: int, folders: Path):
    found = document(run(folders / "lora", folders / "out", *words, "--base", folders / "base", "--json"))
    assert (found["method"], found["coefficients"], found["matrices"]) == (method, coefficients, 4)
    assert 0 < found["residual"] < 1
    assert found["worst_residual"] == max(row["residual"] for row in found["rows"])
    options = json.loads((folders / "out" / "adapter_config.json").read_text())
    assert (options["method"], options["base_model_type"]) == (method, "llama")


def test_the_table_says_that_most_is_gone(folders: Path):
    result = run(folders / "lora", folders / "out", "--to", "nola", "--rank", "2", "--basis", "6")
    assert result.exit_code == 0
    for words in ("LoRA → nola", "32 × 48", "worst", "mean", "most of its ΔW is gone"):
        assert words in " ".join(result.output.split())


def test_a_limit_exits_with_2_and_writes_nothing(folders: Path):
    result = run(folders / "lora", folders / "out", "--to", "vera", "--rank", "9", "--limit", "0.5", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"] == "ResidualError"
    assert not (folders / "out").exists()


def test_lora_and_merged(folders: Path):
    exact = document(run(folders / "vera", folders / "a", "--to", "peft-lora", "--json"))
    assert exact["relative_error"] < 1e-6
    cut = document(run(folders / "randlora", folders / "b", "--to", "peft-lora", "--rank", "8", "--json"))
    assert 0.01 < cut["relative_error"] < 1
    assert "RandLoRA → LoRA" in run(folders / "randlora", folders / "c", "--to", "peft-lora", "--rank", "8").output
    merged = document(run(folders / "randlora", folders / "d", "--to", "merged", "--dtype", "bfloat16", "--json"))
    assert (merged["dtype"], merged["matrices"]) == ("bfloat16", 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "lora"], "did you mean peft-lora"),
        (["--to", "merged", "--basis", "3"], "--basis has no meaning here"),
        (["--to", "vera", "--alpha", "3"], "--alpha has no meaning here"),
        (["--to", "nola", "--dtype", "float16"], "--dtype has no meaning here"),
        (["--to", "peft-lora", "--seed", "3"], "--seed has no meaning here"),
        (["--to", "nola", "--rank", "0"], "rank must be at least 1"),
    ],
)
def test_what_means_nothing_exits_with_2(words: list[str], message: str, folders: Path):
    before = contents(folders)
    result = run(folders / "lora", folders / "out", *words)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")
    assert contents(folders) == before


def test_the_task_of_a_training_run_comes_along(folders: Path):
    about = {"base_model": "base", "method": "lora", "task": {"task": "causal-lm", "separator": " => "}}
    (folders / "lora" / "task.json").write_text(json.dumps(about))
    assert run(folders / "lora", folders / "out", "--to", "nola", "--basis", "4").exit_code == 0
    found = open_adapter(folders / "out")
    assert (found.method, found.task, found.base_model) == ("nola", about["task"], "base")

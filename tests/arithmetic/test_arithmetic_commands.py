"""``randbasis diff`` and ``randbasis average`` as a user calls them."""

import json
from pathlib import Path

import pytest
from tuner_cases import Case
from typer.testing import CliRunner, Result

from randbasis.adapter_file import verify
from randbasis.adapters.saved import open_adapter
from randbasis.cli import app


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "140"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the adapters `a` and `b` of one basis, and `c` of another method and fewer layers."""
    for seed, name in ((1, "a"), (2, "b")):
        Case("linear", "nola").adapted(fill_seed=seed).save_pretrained(str(tmp_path / name))
    Case("linear", "vera").adapted(target_modules=("q_proj",)).save_pretrained(str(tmp_path / "c"))
    return tmp_path


def test_diff(folder: Path):
    found = json.loads(run("diff", folder / "a", folder / "b", "--json").stdout)
    assert (found["layers"], found["methods"], found["other_basis"]) == (6, ["nola", "nola"], None)
    assert -1 < found["cosine"] < 1
    assert found["coefficients"]["norm_first"] > 0
    assert {"name", "out", "in", "distance", "relative", "cosine", "coefficients"} <= found["rows"][0].keys()


def test_diff_as_a_table(folder: Path):
    result = run("diff", folder / "a", folder / "c")
    assert result.exit_code == 0
    for words in ("nola and vera", "model.layers.0.self_attn.q_proj", "not adapted", "coefficients are not compared"):
        assert words in result.output.replace("\n", " ")
    assert "coefficients " in run("diff", folder / "a", folder / "b").output


def test_average(folder: Path):
    words = ["average", folder / "a", folder / "b", "--weights", "-0.5,1.5", "--output", folder / "out.safetensors"]
    found = json.loads(run(*words, "--json").stdout)
    assert found["weights"] == [-0.5, 1.5]
    assert found["relative_distance"] > 0
    assert verify(folder / "out.safetensors").canonical
    assert "relative distance" in run(*words[:3], "--output", folder / "out").output
    assert (folder / "out" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["a", "c"], "BasisMismatchError"),
        (["a", "b", "--weights", "half,half"], "WeightsError"),
        (["a", "b", "--weights", "0.5"], "WeightsError"),
        (["a", "nowhere"], "AdapterMissingError"),
        (["a", "b", "--heads", "last"], "WeightsError"),
    ],
)
def test_refusals_exit_with_2(words: list[str], error: str, folder: Path):
    there = [str(folder / word) if word in ("a", "b", "c", "nowhere") else word for word in words]
    result = run("average", *there, "--output", folder / "out", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"] == error
    assert not (folder / "out").exists()


def test_the_task_comes_along_where_all_have_it(folder: Path):
    about = {"base_model": "base", "method": "nola", "task": {"task": "causal-lm"}}
    (folder / "a" / "task.json").write_text(json.dumps(about))
    assert run("average", folder / "a", folder / "b", "--output", folder / "x").exit_code == 0
    assert not (folder / "x" / "task.json").exists()
    (folder / "b" / "task.json").write_text(json.dumps(about))
    assert run("average", folder / "a", folder / "b", "--output", folder / "y").exit_code == 0
    assert open_adapter(folder / "y").task == about["task"]

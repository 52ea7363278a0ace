"""`randbasis export`: what it answers, exit codes, and what the Python calls write."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_bases import adapted, bert, gpt2, llama, saved
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from randbasis import NolaConfig, RandLoraConfig, VeraConfig
from randbasis.adapters.packed import pack_adapter
from randbasis.cli import app
from randbasis.export import export_peft_lora
from randbasis.files.locations import Remote

RUNNER = CliRunner()


def run(*words: object) -> tuple[int, str, str]:
    done = RUNNER.invoke(app, ["export", *(str(word) for word in words)])
    return done.exit_code, done.stdout, done.stderr


def asked(*words: object) -> dict[str, Any]:
    code, out, err = run(*words, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A base, an exact adapter for it, and one of full rank."""
    model = llama()
    model.name_or_path = saved(llama(), tmp_path / "base")
    adapted(model, NolaConfig(r=2, num_basis=4, target_modules=["q_proj", "v_proj"]), tmp_path / "nola")
    model = llama()
    model.name_or_path = str(tmp_path / "base")
    adapted(model, RandLoraConfig(r=4, target_modules=["q_proj", "v_proj"]), tmp_path / "randlora")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_peft_lora_by_command_and_by_python(made: Path):
    said = asked(made / "nola", made / "lora", "--to", "peft-lora")
    done = export_peft_lora(made / "nola", made / "python")
    assert contents(made / "lora") == contents(made / "python")
    assert said == {**done.as_json(), "output": str(made / "lora")}
    assert (said["layers"], said["ranks"], said["parameters"]) == (4, [2], 2 * 2 * (32 + 24))
    assert len(said["rows"]) == 4
    assert said["relative_error"] < 1e-7


def test_a_truncated_lora_tells_total_and_worst_error(made: Path):
    words = (made / "randlora", made / "lora", "--to", "peft-lora", "--rank", 3)
    said = asked(*words)
    worst = max(said["rows"], key=lambda row: row["relative_error"])
    assert (said["worst_layer"], said["worst_relative_error"]) == (worst["name"], worst["relative_error"])
    assert 0.01 < said["relative_error"] < worst["relative_error"] < 1
    code, out, _ = run(*words, "--overwrite")
    assert code == 0
    assert f"{said['relative_error']:.3e}" in out
    assert f"{worst['relative_error']:.3e}" in out
    assert "rows" not in out


def test_merged_is_what_merge_writes(made: Path):
    said = asked(made / "nola", made / "merged", "--to", "merged")
    words = ["merge", "--model", made / "base", "--adapter", made / "nola", "--output", made / "other", "--json"]
    other = json.loads(RUNNER.invoke(app, [str(word) for word in words]).stdout)
    assert contents(made / "merged") == contents(made / "other")
    assert {**said, "output": ""} == {**other, "output": ""}
    assert asked(made / "nola", made / "half", "--to", "merged", "--dtype", "float16")["dtype"] == "float16"


def test_merged_keeps_the_labels_of_a_training_run(tmp_path: Path):
    base = saved(bert(classes=3), tmp_path / "base")
    config = VeraConfig(r=4, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    adapted(bert(classes=3), config, tmp_path / "adapter")
    (tmp_path / "adapter" / "task.json").write_text(json.dumps({"task": {"labels": ["bad", "fair", "good"]}}))
    asked(tmp_path / "adapter", tmp_path / "merged", "--to", "merged", "--base", base)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert list(model.config.id2label.values()) == ["bad", "fair", "good"]


def test_gguf_lora(made: Path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    said = asked(made / "nola", made / "lora.gguf", "--to", "gguf-lora", "--dtype", "bfloat16")
    assert (said["bytes"], said["dtype"]) == ((made / "lora.gguf").stat().st_size, "bfloat16")
    assert (made / "lora.gguf").read_bytes().startswith(b"GGUF")


def test_a_packed_file_at_a_url(made: Path):
    pack_adapter(made / "nola", made / "file.safetensors", bits=32, base_name="base")
    Remote("memory://export/file.safetensors").write((made / "file.safetensors").read_bytes())
    words = ("--to", "peft-lora", "--base", made / "base")
    asked("memory://export/file.safetensors", made / "remote", *words)
    asked(made / "file.safetensors", made / "local", *words)
    assert contents(made / "remote") == contents(made / "local")


def test_exit_codes_and_messages(made: Path):
    saved(gpt2(), made / "gpt2")
    before = contents(made)
    for words, code, named in (
        ((made / "nola", made / "x", "--to", "peft-lora", "--dtype", "int8"), 2, "dtype must be one of"),
        (
            (made / "nola", made / "x", "--to", "onnx"),
            2,
            "['peft-lora', 'merged', 'gguf-lora'], got 'onnx'",
        ),
        (
            (made / "nola", made / "x", "--to", "merged", "--rank", 4),
            2,
            "--rank has no meaning here, got 4: it needs --to peft-lora",
        ),
        ((made / "nola", made / "x", "--to", "merged", "--dtype", "int8"), 2, "dtype must be one of"),
        ((made / "nola", made / "x", "--to", "peft-lora", "--rank", 0), 2, "rank must be a positive integer"),
        ((made / "nola", made / "x", "--to", "merged", "--base", made / "gpt2"), 2, "made for another base model"),
        ((made / "nola", made / "base", "--to", "peft-lora"), 2, "overwrite"),
        ((made / "randlora", made / "x", "--to", "peft-lora"), 2, "rank must be given for randlora"),
        ((made / "randlora", made / "x", "--to", "gguf-lora"), 2, "--rank 16, which loses nothing"),
        ((made / "nowhere", made / "x", "--to", "merged"), 2, "nothing at"),
        ((made / "nola", made / "x"), 2, "--to"),
    ):
        got, _, err = run(*words)
        assert (got, named in err) == (code, True), (words, got, err)
    assert contents(made) == before
    error = json.loads(run(made / "randlora", made / "x", "--to", "peft-lora", "--json")[1])
    assert error["error"] == "ExportRankError"

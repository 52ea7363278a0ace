"""The page of exports keeps its word: its Python runs, then its commands, in one folder and in order."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from randbasis.cli import app
from randbasis.train import train
from randbasis.train.settings import settings_from_words

FENCES = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_snippets_run(root: Path, encoder: str, sentences_csv: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("gguf", reason="gguf is not installed: the page exports to GGUF too")
    fences = FENCES.findall((root / "docs" / "export.md").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    run = {"task": "sequence-classification", "model": encoder, "data": sentences_csv, "text_column": "sentence",
           "label_column": "label", "method": "nola", "rank": 2, "basis": 8, "max_steps": 1, "threads": 1,
           "output": "runs/reviews"}  # fmt: skip
    train(settings_from_words(run))
    with torch.random.fork_rng(devices=()):
        exec("".join(body for kind, body in fences if kind == "python"), {})
    console = "".join(body for kind, body in fences if kind == "console")
    for command in re.findall(r"^\$ randbasis (.*)$", console, re.MULTILINE):
        done = CliRunner().invoke(app, shlex.split(command, comments=True))
        assert done.exit_code == 0, (command, done.stderr)
    made = {"base", "runs", "lora", "lora.gguf", "merged", "lora16", "nearest", "reviews-lora"}
    assert {path.name for path in tmp_path.iterdir()} == made

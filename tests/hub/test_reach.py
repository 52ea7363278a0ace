"""A hub that does not answer: asked twice in all, one line, and what was fetched before is used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import FakeHub, serving
from silent_hub import SilentHub
from typer.testing import CliRunner

from randbasis.adapters import hub_reach
from randbasis.adapters.base_model import read_config
from randbasis.adapters.hub_reach import ATTEMPTS, why_unreachable
from randbasis.cli import app
from randbasis.errors import DataMissingError, RemoteError

#: Runs the words of a command as the entry point does, and tells what was asked of the hub.
RUN = "import sys; from randbasis.cli import app; app(sys.argv[1:])"


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_reach, "PAUSE", 0.0)


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "me/tiny"],
        ["evaluate", "--model", "me/tiny", "--data", "rows.csv", "--text-column", "a"],
        ["generate", "--model", "me/tiny", "--prompt", "a"],
        ["train", "--task", "causal-lm", "--model", "me/tiny", "--data", "hub:me/rows", "--text-column", "a",
         "--output", "out"],
    ],
)  # fmt: skip
def test_a_command_is_told_in_one_line(
    words: list[str], silent_hub: SilentHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("a\nb\n")
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 1
    assert silent_hub.asked == ATTEMPTS
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert f"the hub ({silent_hub.url}) could not be reached" in result.stderr


def test_it_is_not_asked_again_at_once_and_is_later(silent_hub: SilentHub, monkeypatch: pytest.MonkeyPatch):
    for _ in range(3):
        with pytest.raises(RemoteError, match=r"model 'me/tiny' is no folder here and was not fetched before, and the"):
            read_config("me/tiny")
    assert silent_hub.asked == ATTEMPTS
    monkeypatch.setattr(hub_reach, "MEMORY", 0.0)
    assert why_unreachable()
    assert silent_hub.asked == 2 * ATTEMPTS


def test_a_hub_that_answers_is_asked_once_whatever_it_says(monkeypatch: pytest.MonkeyPatch, silent_hub: SilentHub):
    found = FakeHub()
    with serving(found) as url:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        assert why_unreachable() is None
    assert why_unreachable() is None  # from now on transformers decides how patient it is
    assert silent_hub.asked == 0


def test_folders_and_offline_ask_nobody(silent_hub: SilentHub, language_model: str, monkeypatch: pytest.MonkeyPatch):
    read_config(language_model)
    with pytest.raises(DataMissingError, match="its configuration cannot be read"):
        read_config("./nothing/here")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataMissingError, match="its configuration cannot be read"):
        read_config("me/tiny")
    assert silent_hub.asked == 0


def test_what_was_fetched_before_is_used_and_said(language_model: str, tmp_path: Path):
    found = FakeHub()
    found.repositories["acme/tiny"] = {file.name: file.read_bytes() for file in Path(language_model).iterdir()}
    words = ["generate", "--model", "acme/tiny", "--prompt", "a b", "--max-new-tokens", "3", "--json"]

    def run(url: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        return subprocess.run(
            [sys.executable, "-c", RUN, *words], env=environment, capture_output=True, text=True, check=False
        )

    with serving(found) as url:
        fetched = run(url)
    assert fetched.returncode == 0, fetched.stderr
    assert "warning" not in fetched.stderr
    hub = SilentHub()
    again = run(hub.url)
    hub.close()
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == json.loads(fetched.stdout)
    assert hub.asked == ATTEMPTS
    told = [line for line in again.stderr.splitlines() if line.startswith("warning")]
    assert len(told) == 1
    assert told[0].endswith("; what was fetched of 'acme/tiny' before is used")

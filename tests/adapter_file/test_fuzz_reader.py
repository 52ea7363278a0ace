"""A short run of the fuzzer; `make fuzz` is the long one."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

RUNS = 3000


def test_the_reader_survives_a_short_run_of_the_fuzzer(tmp_path: Path, console_environment: dict[str, str]):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: pip install randbasis[fuzz]")
    target = Path(__file__).with_name("fuzz_reader.py")
    options = [f"-runs={RUNS}", "-seed=1", f"-artifact_prefix={tmp_path}/"]
    command = [sys.executable, str(target), str(tmp_path / "corpus"), *options]
    done = subprocess.run(command, env=console_environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DONE" in done.stderr, done.stderr[-3000:]

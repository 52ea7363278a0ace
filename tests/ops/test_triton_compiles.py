"""The Triton kernels compile for a GPU of the kind that they are written for, where there is none."""

import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="triton's wheel brings an assembler for x86-64 alone")
def test_every_kernel_compiles_for_an_h100(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    counts = {"words": 3, "expand": 3, "spread": 3, "gather": 3, "hashed_spread": 3, "hashed_gather": 3}
    assert Counter(name for name, _ in lines) == counts
    assert all(int(size) > 1000 for _, size in lines)

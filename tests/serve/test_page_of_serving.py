"""The curl lines of docs/serving.md, as they stand there, against a server."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from served import Served

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.S)).replace("\\\n", " ")
LINES = [line for line in BLOCKS.splitlines() if line.startswith("curl ")]


def test_there_are_curl_lines():
    assert len(LINES) >= 6


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("line", LINES)
def test_a_curl_line_of_the_page(line: str, served: Served):
    command = line.replace("http://127.0.0.1:8000", served.url) + " --silent --show-error --fail"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout

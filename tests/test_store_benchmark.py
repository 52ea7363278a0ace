"""The benchmark of the store, at a size that says nothing about speed: it runs, and its rows say what they are."""

import csv
import sys
from pathlib import Path

import pytest

from benchmarks import machine
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

"""A row of the soak becomes the table of docs/serving.md; the page in the repository is that of the csv."""

from pathlib import Path

import pytest

from benchmarks import machine, rows, soak, soak_page

COUNTS = {**dict.fromkeys(soak.COUNTS, 0), **dict.fromkeys(soak.PLAN, 7)}


def test_a_row_says_what_came_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = {**COUNTS, "wrong": 3, "changes": {"remove": 2, "update": 5}, "memory_mb": [512.0, 513.7]}
    about = {**dict.fromkeys(machine.COLUMNS, "x"), "others": "0.5"}
    monkeypatch.setattr(soak_page, "SOAKS", tmp_path / "soak.csv")
    assert soak_page.block() == "No rows yet."
    for requests in (9, 2000, 8):
        rows.append(tmp_path / "soak.csv", [{**about, **soak._row({**found, "requests": requests})}], soak.COLUMNS)
    text = soak_page.block()
    assert text.startswith("2,000 requests of 7 clients over 7 adapters")
    assert "remove 2, update 5" in text
    assert "| wrong answers | 3 |  |" in text
    assert "| 512.0 MB | 513.7 MB |" in text

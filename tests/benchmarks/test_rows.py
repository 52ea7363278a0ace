"""Rows of the csv: nothing is lost on the way, a case is run again only when something that it depends on changed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from synthetic_rows import run_of

from benchmarks import machine, rows
from benchmarks.case import Built, Case, Outcome, Timing

CASE = Case("step", "a step", ("a", "b"), lambda _: Built({}, str), {"tokens": 64}, work=64, unit="tokens/s")


def outcome(a: list[float], b: list[float], others: float = 0.0) -> Outcome:
    return Outcome([Timing("a", a, a), Timing("b", b, a)], "checked well", others)


def test_rows_say_where_when_and_what_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "some" / "timings.csv"
    made = rows.rows_of(CASE, outcome([1.0, 2.0, 4.0], [3.0, 3.0, 3.0]), load=1.25)
    rows.append(path, made)
    assert path.read_text().splitlines()[0] == ",".join(rows.COLUMNS)
    (run,) = rows.read(path)
    row = run.rows[1]
    for column in ("date", "device", "threads", "cores", "versions", "revision", "load", "others", "checked"):
        assert row[column], column
    assert all(package in row["versions"] for package in ("python", "torch", "peft", "randbasis", "numba"))
    assert (run.family, run.case, run.parameters) == ("step", "a step", {"tokens": 64})
    assert (row["median"], row["ratio"], row["over"], row["baseline"]) == ("3", "1.5", "1", "a")
    assert float(row["rate"]) == pytest.approx(64 / 3, rel=1e-3)
    assert run.timings["b"].values == [3.0, 3.0, 3.0]
    assert run.timings["b"].ratios == [3.0, 1.5, 0.75]


def test_a_row_says_when_others_were_computing() -> None:
    assert rows.rows_of(CASE, outcome([1.0], [1.0], others=0.1), load=9.0)[0]["note"] == ""
    assert "others used 2.0 cores" in rows.rows_of(CASE, outcome([1.0], [1.0], others=2.0), load=0.0)[0]["note"]


def test_another_csv_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "timings.csv"
    path.write_text("date,device\n2026-01-01,cpu\n")
    with pytest.raises(ValueError, match="must have the columns"):
        rows.read(path)


def test_the_newest_run_of_a_case_counts() -> None:
    old, new, other = (run_of("step", {"a": [value]}, name=name) for value, name in ((1, "x"), (2, "x"), (3, "y")))
    assert [run.timings["a"].values for run in rows.newest([old, other, new])] == [[2.0], [3.0]]


def test_a_case_is_measured_until_revision_threads_or_sides_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "timings.csv"
    rows.append(path, rows.rows_of(CASE, outcome([1.0], [1.0]), load=0.0))
    known = rows.read(path)
    assert rows.is_measured(CASE, known, ["a", "b"])
    assert not rows.is_measured(CASE, known, ["a", "b", "c"])
    assert not rows.is_measured(replace(CASE, name="another"), known, ["a"])
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert not rows.is_measured(CASE, known, ["a"])
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(machine, "revision", lambda: "another")
    assert not rows.is_measured(CASE, known, ["a"])


def test_the_watch_sees_no_more_than_the_machine_has() -> None:
    watch = machine.Watch()
    sum(range(10**6))
    assert watch.others() >= 0.0

"""The study of rounded sums: what it runs, that it goes on, and that the page is what its rows say."""

from pathlib import Path

import pytest

from studies import rounding
from studies.rounding import COLUMNS, PRODUCTS, ROUNDING, STEPS, TRAINED, RoundingCell, cells, run_cell, run_cells
from studies.rounding_page import cells_of, gap, verdict, write_rounding
from studies.sweep_rows import read_rows

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def rows_of(cell: RoundingCell, losses: dict[str, float] | None = None) -> list[dict[str, str]]:
    found = []
    for product in PRODUCTS:
        values = dict.fromkeys(COLUMNS, "1") | {"metric": "accuracy", "date": "2026-01-01", "revision": "abc"}
        values |= {"set": cell.set, "method": cell.method, "seed": str(cell.seed), "product": product}
        values |= {"eval_loss": str((losses or {}).get(product, 0.5)), "distance": "0.1"}
        found.append(values)
    return found


def test_seeds_come_one_after_the_other_and_a_rerun_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = list(cells(3))
    assert [cell.seed for cell in whole] == [seed for seed in range(3) for _ in range(len(STEPS) * len(TRAINED))]
    ran: list[RoundingCell] = []
    monkeypatch.setattr(rounding, "run_cell", lambda cell, data: ran.append(cell) or rows_of(cell))
    path = tmp_path / ROUNDING
    run_cells(tmp_path, path, seeds=1)
    assert ran == whole[: len(ran)]
    assert len(read_rows(path)) == 4 * len(ran)
    run_cells(tmp_path, path, seeds=2)
    assert ran == whole[: 2 * len(STEPS) * len(TRAINED)]
    run_cells(tmp_path, path, seeds=3, seconds=-1)
    assert len(ran) == 2 * len(STEPS) * len(TRAINED)


def test_a_cell_is_four_runs_that_differ_in_their_product(data_dir: Path):
    exact, *others = run_cell(RoundingCell("e2e", "nola", 0), data_dir, steps=4)
    assert [row["product"] for row in (exact, *others)] == [*PRODUCTS]
    assert float(exact["distance"]) == 0
    assert all(0 < float(row["distance"]) < 1 for row in others)
    assert len({row["eval_loss"] for row in (exact, *others)}) > 1
    assert {row["steps"] for row in (exact, *others)} == {"4"}


def test_a_loss_above_twice_its_error_is_named():
    worse = [0.02, 0.03, 0.025]
    rows = [
        row
        for seed in range(3)
        for row in rows_of(RoundingCell("sst2", "nola", seed), {"nearest": 0.5 + worse[seed], "exact": 0.5})
    ]
    found = cells_of(rows)
    mean, error = gap(found["sst2", "nola"], "nearest")
    assert (mean, error) == (pytest.approx(0.025), pytest.approx(0.005 / 3**0.5))
    nearest, stochastic, *_ = verdict(found).splitlines()
    assert "sst2, nola (+0.0250" in nearest
    assert "nowhere above exact" in stochastic


def test_the_page_is_what_the_rows_say(root: Path, tmp_path: Path):
    write_rounding(read_rows(RESULTS / ROUNDING), tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == (root / "docs" / "rounding.md").read_text("utf-8")

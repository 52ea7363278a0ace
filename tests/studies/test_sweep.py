"""The sweep of defaults: what it runs, that it goes on, and that the page is what its rows say."""

from pathlib import Path

import pytest

from randbasis.train import AdapterSettings
from randbasis.train.default_choices import METHODS
from studies.defaults_page import write_page
from studies.sweep import (
    CONTROLS,
    DEFAULTS,
    HALF_DECADES,
    KEY,
    SETS,
    SweepCell,
    default_rate,
    grid,
    read_rows,
    run_sweep,
    sweep_setting,
)

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_the_default_of_each_method_is_run_on_each_set_and_before_all_else():
    cells = list(grid())
    first = cells[: len(SETS) * len(METHODS)]
    assert [(c.set, c.adapter.method, c.rate) for c in first] == [
        (name, method, default_rate(name, method)) for name in SETS for method in METHODS
    ]
    assert len({cell.key() for cell in cells}) == len(cells)
    around = [cell.rate for cell in cells if (cell.set, cell.adapter.method) == ("sst2", "nola")]
    assert sorted(around) == list(HALF_DECADES[2:7])
    assert not [cell for cell in cells[len(first) :] if cell.set in CONTROLS]


@pytest.mark.parametrize("name", SETS)
def test_every_file_of_a_set_is_there(name: str, data_dir: Path):
    base = sweep_setting(name, data_dir).base
    assert Path(base.model).exists()
    assert Path(str(base.data.train)).exists()


def test_what_has_been_run_is_not_run_again(data_dir: Path, tmp_path: Path):
    cells = [SweepCell("flowers12", AdapterSettings(method="lora", rank=1), 1e-2, 3e-3)]
    path = tmp_path / DEFAULTS
    run_sweep(cells, data_dir, path, seconds=-1.0)
    assert not path.exists()
    run_sweep(cells, data_dir, path)
    before = path.read_bytes()
    (row,) = read_rows(path)
    assert (
        tuple(row[name] for name in KEY) == cells[0].key() == ("flowers12", "lora", "1", "", "", "0.01", "0.003", "0")
    )
    assert float(row["after"]) > float(row["before"]) + 0.2
    run_sweep(cells, data_dir, path)
    assert path.read_bytes() == before


def test_the_page_of_defaults_is_what_the_rows_say(root: Path, tmp_path: Path):
    write_page(read_rows(RESULTS / DEFAULTS), tmp_path / "defaults.md")
    page = (root / "docs" / "defaults.md").read_text(encoding="utf-8")
    assert page == (tmp_path / "defaults.md").read_text(encoding="utf-8"), "stale: run `python -m studies defaults`"


def test_no_default_collapses_where_it_was_run():
    """At one rate for all methods, LoRA and RandLoRA answered every sentence of SST-2 alike."""
    ran = {(r["set"], r["method"], float(r["rate"])): r for r in read_rows(RESULTS / DEFAULTS) if not r["rank"]}
    found = {key: row for key, row in ran.items() if key[2] == default_rate(key[0], key[1]) and key[0] == "sst2"}
    assert {method for _, method, _ in found} == set(METHODS)
    assert {method: float(row["after"]) > 0.7 for (_, method, _), row in found.items()} == dict.fromkeys(METHODS, True)

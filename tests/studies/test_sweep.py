"""The sweep of defaults: what it runs, that it goes on, and that the page is what its rows say."""

from pathlib import Path

import pytest

from randbasis.train import AdapterSettings
from randbasis.train.default_choices import METHODS
from studies.defaults_page import write_page
from studies.sweep import (
    AGAIN,
    COLUMNS,
    CONTROLS,
    DEFAULTS,
    HALF_DECADES,
    KEY,
    SETS,
    SweepCell,
    default_rate,
    grid,
    grid_points,
    rivals,
    run_sweep,
    sweep_setting,
    task_of,
)
from studies.sweep_rows import best_of, read_rows

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


def row(method: str, rate: float, seed: int, after: float | None, *, of: str = "sst2", **more: str) -> dict[str, str]:
    """A row of the csv, of the default size."""
    basis = METHODS[method].basis_for.get(task_of(of))
    values = dict.fromkeys(COLUMNS, "") | {"basis": str(basis or "")}
    values |= {"set": of, "method": method, "rate": f"{rate:g}", "seed": str(seed), "metric": "accuracy"}
    values |= {"before": "0.5", "after": "" if after is None else str(after), "date": "2026-01-01", "revision": "abc"}
    values |= {"head_rate": "" if of == "e2e" else "0.003", "steps": "9", "coefficients": "80"}
    return values | more


def test_a_rate_is_worth_the_mean_of_its_seeds_and_is_compared_on_those_of_both():
    rows = [row("lora", 0.1, seed, score) for seed, score in enumerate((0.6, 0.7, 0.8))]
    rows += [row("lora", 0.3, 0, 0.65), row("lora", 0.3, 2, 0.81), row("lora", 1.0, 0, None)]
    rows += [row("lora", 0.1, 3, 0.1, rank="2"), row("lora", 0.1, 3, 0.1, head_rate="0.1")]
    points = grid_points(rows)["sst2", "lora"]
    assert (points[0.1].mean, points[0.3].mean) == (pytest.approx(0.7), pytest.approx(0.73))
    assert points[0.1].error == pytest.approx(0.1 / 3**0.5)
    gap, error = points[0.1].over(points[0.3])
    assert (gap, error) == (pytest.approx(-0.03), pytest.approx(0.02))  # of -0.05 and -0.01
    assert max(points, key=lambda rate: points[rate].worth) == 0.3
    assert points[1.0].worth == points[1.0].over(points[0.1])[0] == float("-inf")
    assert [best_of(points, taken) for taken in (0.1, 0.3, 1.0, 9.0)] == [0.3, 0.3, 0.3, 0.3]
    unequal = grid_points([row("lora", 0.1, 0, 0.9), row("lora", 0.3, 0, 0.95), row("lora", 0.3, 1, 0.2)])
    assert best_of(unequal["sst2", "lora"], 0.1) == 0.3  # on seed 0, though its mean is lower
    assert grid_points([row("lora", 0.1, 0, 2.0, metric="loss"), row("lora", 0.3, 0, 3.0, metric="loss")])[
        "sst2", "lora"
    ][0.1].over(points[0.1]) == (pytest.approx(-1.4), None)


def test_the_default_and_its_best_rival_are_run_with_further_seeds():
    taken = default_rate("sst2", "lora")
    rows = [row("lora", rate, 0, score) for rate, score in ((taken, 0.5), (7e-3, 0.6), (8e-3, 0.4))]
    assert [(cell.rate, cell.adapter.seed) for cell in rivals(rows)] == [
        (rate, seed) for seed in AGAIN for rate in sorted({taken, 7e-3})
    ]
    assert [cell.adapter.seed for cell in rivals(rows[:1])] == [*AGAIN]


def test_a_default_that_is_further_behind_than_allowed_is_told(tmp_path: Path):
    taken = default_rate("sst2", "lora")
    e2e = {method: default_rate("e2e", method) for method in ("lora", "nola")}
    scores = {"of": "e2e", "metric": "loss", "before": "5"}
    rows = [row("lora", taken, 0, 0.70), row("lora", 1.0, 0, 0.72, revision="")]
    rows += [row("lora", taken, 1, 0.75), row("lora", 1.0, 1, 0.76, revision="")]
    rows += [row("nola", default_rate("sst2", "nola"), 0, 0.75), row("nola", 1.0, 0, 0.755)]
    rows += [row("lora", e2e["lora"], 0, 3.06, **scores), row("lora", 1.0, 0, 3.0, **scores)]
    rows += [row("nola", e2e["nola"], 0, 3.2, **scores), row("nola", 1.0, 0, 3.0, **scores)]
    write_page(rows, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    told = [line for line in page.splitlines() if line.startswith("- ")]
    assert told == [
        f"- sst2, lora: {taken:g} is at -1.5 ± 0.5 against 1.",
        f"- e2e, nola: {e2e['nola']:g} is at -10.0 % of the gain against 1.",
    ]
    assert "| lora | **0.725 ± 0.025** | 0.740 ± 0.020°* | -1.5 ± 0.5 |" in page.replace("|  ", "")
    assert (tmp_path / "defaults" / "rates.png").read_bytes().startswith(b"\x89PNG")


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
    points = grid_points(read_rows(RESULTS / DEFAULTS))
    scores = {method: points["sst2", method][default_rate("sst2", method)].scores for method in METHODS}
    assert {method: min(own.values()) > 0.7 for method, own in scores.items()} == dict.fromkeys(METHODS, True)

"""The studies on real data: files that must be there, budgets against counts by hand, the page against the raw rows."""

from pathlib import Path

import pytest

from randbasis.errors import DataMissingError
from studies import chosen_rate, read_records
from studies.report import write_report
from studies.runs import adapter_of
from studies.studies import STUDIES, study_named
from studies.study import usable

#: Coefficients by hand: 12 matrices of 384 x 384, 24 of 192 x 192, and all linear layers of five Llama blocks.
LORA_1 = {
    "SST-2": 12 * 768,
    "flowers12, 10 shots": 24 * 384,
    "E2E, llama_stories260k": 5 * (2 * 128 + 2 * 96 + 3 * 236),
}


def test_every_file_of_a_study_must_be_there(tmp_path: Path):
    for name in STUDIES:
        with pytest.raises(DataMissingError, match=f"study '{name}' reads"):
            study_named(name, tmp_path)


@pytest.mark.parametrize("name", ["sst2", "vision", "e2e"])
def test_budgets_on_the_real_models(name: str, data_dir: Path):
    study = study_named(name, data_dir)
    setting = study.settings[0]
    matrices = {"sst2": 12, "vision": 24, "e2e": 35}[name]
    half, whole = (adapter_of(setting, row) for row in study.rows if row.method == "nola")
    for settings, share in ((half, 0.5), (whole, 1.0)):
        assert settings.basis is not None
        assert 2 * matrices * settings.basis == pytest.approx(share * LORA_1[setting.name], rel=0.01)
    assert [adapter_of(setting, row).rank for row in study.rows if row.method == "lora"] == [1, 4]


def test_quantized_rows_have_the_papers_budget(data_dir: Path):
    setting = (study := study_named("quantization", data_dir)).settings[0]
    nola = adapter_of(setting, study.row("NOLA, QAT 3 bits"))
    assert nola.basis is not None
    assert 2 * 35 * nola.basis / LORA_1[setting.name] == pytest.approx(144 / 184.32, rel=0.01)
    assert (nola.quantize_coefficients, adapter_of(setting, study.row("NOLA")).quantize_coefficients) == (3, None)


@pytest.mark.parametrize(
    ("other", "index", "rows"),
    [
        ("e2e", 0, {"LoRA r=1": "LoRA r=1", "NOLA": "NOLA, as LoRA r=1"}),
        ("sst2", 1, {"frozen": "frozen + head", "LoRA r=1": "LoRA r=1", "NOLA": "NOLA, half of LoRA r=1"}),
    ],
)
def test_learning_rates_in_full_precision_are_those_chosen_before(root: Path, other: str, index: int, rows: dict):
    study, chosen_in = study_named("quantization"), study_named(other)
    records = usable(chosen_in, read_records(root / "benchmarks" / "results" / f"{other}.jsonl"))
    for ours, theirs in rows.items():
        rate = chosen_rate(chosen_in, chosen_in.settings[0], chosen_in.row(theirs), records)
        assert study.settings[index].rates_for(study.row(ours)) == (rate,)
        if ours != "frozen":
            assert study.settings[index].rates_for(study.row(f"{ours}, QAT 3 bits"))[2] == rate


def test_page_of_results_is_what_the_raw_rows_say(root: Path, tmp_path: Path):
    write_report([study_named(name) for name in STUDIES], root / "benchmarks" / "results", tmp_path / "results.md")
    page = (root / "docs" / "results.md").read_text(encoding="utf-8")
    assert page == (tmp_path / "results.md").read_text(encoding="utf-8"), "docs/results.md is stale: run `make results`"

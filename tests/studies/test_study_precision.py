"""Runs at few bits: LoRA's estimator against ours, what is quantized afterwards, lines of the table."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from randbasis.codes import rounded
from randbasis.errors import SettingError
from studies import Job, Row, Setting, Study, ready_jobs, run_job, run_study
from studies.plots import plot_study
from studies.precision import quantize_lora, quantized, settle_lora
from studies.study import all_jobs_count, fingerprint
from studies.tables import line_names, lines_of, table_of


def lora() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(r=1, target_modules=["0"]))
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight.copy_(torch.tensor([[0.3], [-1.0], [0.2], [0.7], [0.0]]))
    return model


def test_lora_computes_with_rounded_weights_and_their_gradients_reach_the_weights_themselves():
    model, plain = lora(), lora()
    x = torch.randn(4, 6)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                parameter.copy_(rounded(parameter.flatten(), [parameter.numel()], 3).view(parameter.shape))
    quantize_lora(model, 3)
    assert torch.equal(model(x), plain(x))
    for one in (model, plain):
        one(x).square().mean().backward()
    found = [p.grad for n, p in model.named_parameters() if "lora_" in n]
    assert len(found) == 2
    for gradient, expected in zip(found, [p.grad for n, p in plain.named_parameters() if "lora_" in n], strict=True):
        assert torch.equal(gradient, expected)
    settle_lora(model)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in plain.named_parameters()}
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_quantized_for_a_while():
    model, x = lora(), torch.randn(4, 6)
    before = model(x)
    with quantized(model, 2):
        assert len(model.base_model.model[0].lora_B["default"].weight.unique()) == 3
        assert not torch.equal(model(x), before)
    assert torch.equal(model(x), before)


@pytest.fixture
def study(text_setting: Setting) -> Study:
    rates = (("frozen", (1e-1,)), *((name, (1e-1,)) for name in ("LoRA", "NOLA")))
    rates += tuple((name, (1e-2, 1e-1)) for name in ("LoRA, QAT", "NOLA, QAT"))
    rows = (
        Row("frozen", "none", 0.0),
        Row("LoRA", "lora", 1.0, afterwards=(16, 2)),
        Row("LoRA, QAT", "lora", 1.0, bits=2),
        Row("NOLA", "nola", 1.0, afterwards=(16, 2)),
        Row("NOLA, QAT", "nola", 1.0, bits=2),
    )
    return Study("few", "Few bits", rows, (replace(text_setting, rates=rates, seeds=1),), ("accuracy", "loss"))


def test_only_rows_with_a_choice_are_swept(study: Study):
    first = ready_jobs(study, [])
    assert {job.row for job in first if job.phase == "sweep"} == {"LoRA, QAT", "NOLA, QAT"}
    assert {job.row for job in first if job.phase == "final"} == {"frozen", "LoRA", "NOLA"}
    assert {job.head_rate for job in first} == {1e-1}
    assert all_jobs_count(study) == 2 * 2 + 5


def test_precision_decides_which_records_are_of_a_row(study: Study):
    setting, row = study.settings[0], study.row("NOLA")
    prints = {fingerprint(setting, one) for one in (row, replace(row, bits=3), replace(row, afterwards=()))}
    assert len(prints) == 3
    assert fingerprint(setting, replace(row, afterwards=())) == fingerprint(
        replace(setting, rates=()), Row("", "nola", 1.0)
    )


def test_rows_at_one_precision_have_equally_many_rates(study: Study):
    uneven = (*study.settings[0].rates[:-1], ("NOLA, QAT", (1e-1,)))
    with pytest.raises(SettingError, match="at its precision"):
        replace(study, settings=(replace(study.settings[0], rates=uneven),))


def test_one_training_is_scored_at_each_precision(study: Study, tmp_path: Path):
    records = run_study(study, tmp_path / "few.jsonl", workers=0)
    setting = study.settings[0]
    lines = lines_of(study, setting, records)
    assert [line.name for line in lines] == line_names(study) == [
        "frozen", "LoRA", "LoRA, PTQ 16 bits", "LoRA, PTQ 2 bits", "LoRA, QAT",
        "NOLA", "NOLA, PTQ 16 bits", "NOLA, PTQ 2 bits", "NOLA, QAT",
    ]  # fmt: skip
    by_name = {line.name: line for line in lines}
    nola, half, coarse = by_name["NOLA"], by_name["NOLA, PTQ 16 bits"], by_name["NOLA, PTQ 2 bits"]
    assert half.mean("loss") == pytest.approx(nola.mean("loss"), rel=1e-3)
    assert coarse.mean("loss") != nola.mean("loss")
    # 4 matrices of 16 x 16: 128 coefficients in 8 vectors.
    assert [line.stored for line in (nola, half, coarse)] == [512, 256, 32 + 4 * 8]
    table = table_of(study, setting, records)
    assert "| NOLA, PTQ 2 bits | r = 8, k = l = 16, alpha = 8 | 128 | 2 | 64 | 0.1 |" in table
    plot_study(study, records, tmp_path / "few.png")
    assert (tmp_path / "few.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("row", ["LoRA, QAT", "NOLA, QAT"])
def test_a_row_trained_at_two_bits_loses_nothing_at_two_bits(study: Study, row: str):
    job = Job("words", row, "final", 1e-1, 1e-1, 0)
    again = replace(study, rows=tuple(replace(r, afterwards=(2,)) if r.name == row else r for r in study.rows))
    record = run_job(again, job)
    assert record.afterwards["2"] == record.scores
    assert record.scores != run_job(study, replace(job, row=row.partition(",")[0])).scores

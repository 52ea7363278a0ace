"""Learning rates of the steps, against transformers' own schedules and against what a first step does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import torch as safetensors
from transformers import TrainingArguments, get_scheduler

from randbasis.train import AdapterSettings, DataSettings, LoopSettings, TrainSettings, train
from randbasis.train.schedule import warmed_schedule

STEPS, RATE = 20, 0.5


def rates(schedule: object, optimizer: torch.optim.Optimizer) -> list[float]:
    found: list[float] = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[-1]["lr"])
        optimizer.step()
        schedule.step()
    return found


def optimizer() -> torch.optim.Optimizer:
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": RATE} for _ in range(2)]
    return torch.optim.AdamW(groups, lr=RATE)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup", "polynomial", "inverse_sqrt"])
def test_the_first_step_learns_and_behind_the_warm_up_nothing_changes(name: str, tmp_path: Path):
    args = TrainingArguments(str(tmp_path), lr_scheduler_type=name, warmup_steps=4, learning_rate=RATE, use_cpu=True)
    one, other = optimizer(), optimizer()
    ours = rates(warmed_schedule(args, one, STEPS), one)
    theirs = rates(get_scheduler(name, other, 4, STEPS), other)
    assert theirs[0] == 0.0
    assert ours[:5] == pytest.approx([RATE * (i + 1) / 5 for i in range(5)])
    if name == "inverse_sqrt":  # its own time begins with the length of the warm-up
        assert ours[4:] == sorted(ours[4:], reverse=True)
    else:
        assert ours[4:] == pytest.approx(theirs[4:])


@pytest.mark.parametrize("name", ["linear", "constant", "inverse_sqrt"])
def test_without_a_warm_up_it_is_transformers_own(name: str, tmp_path: Path):
    args = TrainingArguments(str(tmp_path), lr_scheduler_type=name, learning_rate=RATE, use_cpu=True)
    one, other = optimizer(), optimizer()
    assert rates(warmed_schedule(args, one, STEPS), one) == rates(get_scheduler(name, other, 0, STEPS), other)


def test_one_step_of_a_run_moves_the_coefficients(encoder: str, sentences_csv: str, held_csv: str, tmp_path: Path):
    data = DataSettings(sentences_csv, eval=held_csv, text_column="sentence", label_column="label")
    loop = LoopSettings(max_steps=1, batch_size=8, threads=1, warmup=0.06, learning_rate=1e-2)
    run = TrainSettings("sequence-classification", encoder, data, tmp_path / "run", AdapterSettings("lora", 2), loop)
    outcome = train(run)
    weights = safetensors.load_file(outcome.output / "adapter_model.safetensors")
    assert all(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)
    entries = [json.loads(line) for line in (outcome.output / "history.jsonl").read_text().splitlines()]
    assert [entry["learning_rate"] for entry in entries if "learning_rate" in entry] == [5e-3]

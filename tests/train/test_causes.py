"""What failed is told as what failed: memory is not a wrong base, a device is not a full disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import TrainingArguments

import randbasis
from randbasis.errors import BaseMismatchError
from randbasis.train import trained_parameters
from randbasis.train.trainer import AdapterTrainer

CONFIGS = {
    "nola": lambda: randbasis.NolaConfig(r=2, num_basis=4, target_modules=["0"]),
    "vera": lambda: randbasis.VeraConfig(r=4, target_modules=["0"]),
    "randlora": lambda: randbasis.RandLoraConfig(r=2, target_modules=["0"]),
    "pranc": lambda: randbasis.PrancConfig(num_basis=4, target_modules=["0"]),
}
MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
)


def base(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 8))


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("method", CONFIGS)
def test_memory_that_runs_out_is_not_a_wrong_base(
    method: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    adapted = get_peft_model(base(), CONFIGS[method]())
    adapted.save_pretrained(str(tmp_path))

    def fail(*args: Any, **rest: Any) -> None:
        raise error

    monkeypatch.setattr(PeftModel, "from_pretrained", fail)
    with pytest.raises(type(error)) as caught:
        trained_parameters.load_adapter(base(), tmp_path)
    assert caught.value is error
    monkeypatch.setattr(trained_parameters.peft, "set_peft_model_state_dict", fail)
    with pytest.raises(type(error)) as caught:
        trained_parameters.restore_parameters(adapted, tmp_path)
    assert caught.value is error


@pytest.mark.parametrize("method", ["vera", "randlora"])
def test_another_shape_is_a_wrong_base(method: str, tmp_path: Path):
    get_peft_model(base(), CONFIGS[method]()).save_pretrained(str(tmp_path))
    wider = nn.Sequential(nn.Linear(24, 24))
    with pytest.raises(BaseMismatchError):
        trained_parameters.load_adapter(wider, tmp_path)


def test_the_biases_of_a_head_do_not_decay(tmp_path: Path):
    """What the optimizer is given: decay for adapter and matrices, none for vectors."""
    model = nn.Module()
    model.linear, model.norm = nn.Linear(3, 2), nn.LayerNorm(2)
    trainer: Any = object.__new__(AdapterTrainer)
    trainer.optimizer, trainer.model, trainer.head_learning_rate = None, model, 0.1
    trainer.args = TrainingArguments(
        output_dir=str(tmp_path), weight_decay=0.5, learning_rate=0.01, use_cpu=True, report_to="none"
    )
    decay = {
        id(parameter): group["weight_decay"]
        for group in AdapterTrainer.create_optimizer(trainer).param_groups
        for parameter in group["params"]
    }
    assert decay.pop(id(model.linear.weight)) == 0.5
    assert len(decay) == 3
    assert set(decay.values()) == {0.0}

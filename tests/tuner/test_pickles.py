"""Coefficients in a pickle are refused before anything opens it, on every way in."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from tuner_cases import ONE_EACH, Case, outputs, pair_works, seeded, snapshot, tiny_llama

from randbasis.adapters.inspection import inspect_adapter
from randbasis.adapters.merging import merge_adapter
from randbasis.adapters.packed import pack_adapter
from randbasis.errors import AdapterFilesError

PICKLE = "adapter_model.bin"
WEIGHTS = "adapter_model.safetensors"


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture(params=ONE_EACH)
def case(request) -> Case:
    return Case("linear", request.param)


@pytest.fixture
def folder(case, tmp_path, monkeypatch) -> Path:
    """An adapter whose coefficients are a pickle, and a loader of torch that says when it is asked."""
    case.base().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, case.config(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "runs" / "adapter", safe_serialization=False)
    read: list[Any] = []
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail(f"a pickle was read: {a[0]}") or read.append(a))
    assert (tmp_path / "runs" / "adapter" / PICKLE).is_file()
    return tmp_path / "runs" / "adapter"


def refused(model: Any, load: Any) -> None:
    before = snapshot(model)
    with pytest.raises(AdapterFilesError, match=r"a pickle, which .*never read"):
        load()
    assert snapshot(model) == before


def test_peft(case, folder):
    base = case.base()
    refused(base, lambda: PeftModel.from_pretrained(base, folder))
    refused(base, lambda: PeftModel.from_pretrained(base, folder.parent, subfolder=folder.name))
    model = case.adapted()
    refused(model, lambda: model.load_adapter(str(folder), "default"))
    refused(model, lambda: model.load_adapter(str(folder.parent), "default", subfolder=folder.name))
    refused(model, lambda: model.load_adapter(str(folder), "second"))
    assert list(model.peft_config) == ["default"]
    with pytest.raises(AdapterFilesError, match="a pickle"):
        PeftModel.from_pretrained(base, folder, config=PeftConfig.from_pretrained(folder))


def test_transformers(case, folder):
    base = case.base()
    refused(base, lambda: base.load_adapter(str(folder)))
    refused(base, lambda: base.load_adapter(str(folder.parent), adapter_kwargs={"subfolder": folder.name}))
    with pytest.raises(AdapterFilesError, match="a pickle"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_our_own_readers(folder, tmp_path):
    for read in (
        lambda: pack_adapter(folder, tmp_path / "packed"),
        lambda: inspect_adapter(folder),
        lambda: merge_adapter(str(tmp_path / "base"), folder, tmp_path / "merged"),
    ):
        with pytest.raises(AdapterFilesError, match="a pickle, which is never read"):
            read()


def test_one_beside_the_tensors_is_left_alone(case, tmp_path):
    model = case.adapted()
    model.save_pretrained(tmp_path)
    torch.save({"x": Bomb(tmp_path / "mark")}, tmp_path / PICKLE)
    again = PeftModel.from_pretrained(case.base(), tmp_path).eval()
    assert torch.equal(outputs(again, case.batch()), outputs(model, case.batch()))
    if pair_works():
        native = case.base()
        refused(native, lambda: native.load_adapter(str(tmp_path), use_safetensors=False))
        native.load_adapter(str(tmp_path))
        assert torch.equal(outputs(native.eval(), case.batch()), outputs(model, case.batch()))
    assert not (tmp_path / "mark").exists()


def test_those_of_other_methods_are_none_of_our_business(tmp_path):
    model = get_peft_model(seeded(tiny_llama), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "lora", safe_serialization=False)
    PeftModel.from_pretrained(seeded(tiny_llama), tmp_path / "lora")
    shutil.copytree(tmp_path / "lora", tmp_path / "again")
    seeded(tiny_llama).load_adapter(str(tmp_path / "again"), use_safetensors=False)

"""Basis matrices by gradient: norms against autograd, shares against their sum, numbers through every form of file."""

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from randbasis import NolaConfig, PrancConfig, VeraConfig
from randbasis.adapter_file import read
from randbasis.adapters import load_packed, pack_adapter, unpack_adapter
from randbasis.adapters.inspection import inspect_adapter
from randbasis.adapters.plan import plan
from randbasis.errors import HyperparameterError, NonFiniteLossError, SettingError
from randbasis.store import AdapterStore
from randbasis.train.allotment import adapted_parts, allot, as_pattern, gradient_norms, shares
from randbasis.tuner.layer import RandbasisLinear
from randbasis.tuner.targets import Part


def llama() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=33, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, intermediate_size=24, initializer_range=0.3,
                             attention_dropout=0.5, pad_token_id=0)  # fmt: skip
        return LlamaForCausalLM(config)


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 33, (3, 7), generator=generator) for _ in range(count)]
    return [{"input_ids": one, "labels": one} for one in rows]


def test_norms_against_autograd_of_the_weights():
    model = llama().train()
    model.model.embed_tokens.weight.requires_grad_(False)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    parts = adapted_parts(model, NolaConfig(target_modules=["q_proj", "down_proj"]))
    found = gradient_norms(model, parts, batches())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    model.eval()
    squares = dict.fromkeys(parts, 0.0)
    for batch in batches():
        model.zero_grad()
        model(**batch).loss.backward()
        for key in squares:
            squares[key] += float(model.get_submodule(key).weight.grad.double().square().sum())
    assert len(found) == 4
    for key, square in squares.items():
        assert found[key] == pytest.approx(math.sqrt(square / 2), rel=1e-5)


def test_norms_of_slices_and_of_a_module_that_is_called_twice():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gpt = GPT2LMHeadModel(GPT2Config(vocab_size=33, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()
    parts = adapted_parts(gpt, NolaConfig(target_modules=["c_attn[q,v]", "c_fc"]))
    assert [part.name for part in parts["transformer.h.0.attn.c_attn"]] == ["q", "v"]
    found = gradient_norms(gpt, parts, batches(1))
    gpt(**batches(1)[0]).loss.backward()
    gradient = gpt.transformer.h[0].attn.c_attn.weight.grad.T  # Conv1D
    expected = torch.cat([gradient[:16], gradient[32:]]).norm()
    assert found["transformer.h.0.attn.c_attn"] == pytest.approx(float(expected), rel=1e-5)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.unused = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.unused(x)
            return self.one(self.one(x).tanh()).square().sum()

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Twice(), torch.randn(4, 5)
    found = gradient_norms(model, {"one": [Part("", 0, 5)], "unused": [Part("", 0, 5)]}, [{"x": x}] * 2,
                           loss=lambda model, batch: model(**batch))  # fmt: skip
    model(x).backward()
    assert found == {"one": pytest.approx(float(model.one.weight.grad.norm()), rel=1e-5), "unused": 0.0}


@given(
    st.dictionaries(st.text("abc.0", min_size=1, max_size=6), st.floats(0, 1e6), min_size=1, max_size=20),
    st.integers(0, 500),
)
def test_shares_add_up_and_no_matrix_goes_without(weights: dict[str, float], more: int):
    total = len(weights) + more
    found = shares(weights, total)
    assert sum(found.values()) == total
    assert min(found.values()) >= 1
    ordered = sorted(weights, key=lambda key: weights[key])
    assert all(found[low] <= found[high] for low, high in pairwise(ordered) if weights[low] < weights[high])


def test_shares_are_proportional():
    assert shares({"a": 1.0, "b": 2.0, "c": 5.0}, 80) == {"a": 10, "b": 20, "c": 50}
    assert shares({"a": 0.0, "b": 0.0}, 7) == {"a": 4, "b": 3}
    assert shares({"a": 1e-9, "b": 1.0, "c": 3.0}, 41) == {"a": 1, "b": 10, "c": 30}
    assert shares({"a": 1.0, "b": 1.0}, 30, {"a": 2, "b": 1}) == {"a": 10, "b": 10}
    assert shares({"a": 3.0, "b": 1.0}, 11, {"a": 2, "b": 1}) == {"a": 5, "b": 1}
    with pytest.raises(HyperparameterError, match="got 2 for 3 matrices"):
        shares({"a": 1.0, "b": 1.0}, 2, {"a": 2, "b": 1})


@given(st.lists(st.tuples(st.floats(0, 9), st.integers(1, 3)), min_size=1, max_size=9), st.integers(0, 60))
def test_shares_of_parts_add_up_as_far_as_they_can(rows: list[tuple[float, int]], more: int):
    parts = {str(place): count for place, (_, count) in enumerate(rows)}
    total = sum(parts.values()) + more
    found = shares({str(place): weight for place, (weight, _) in enumerate(rows)}, total, parts)
    left = total - sum(parts[key] * number for key, number in found.items())
    assert 0 <= left < min(parts.values())


@pytest.mark.parametrize("kind", [NolaConfig, PrancConfig])
def test_the_numbers_go_through_every_form_of_file(kind: Any, tmp_path: Path):
    config = kind(num_basis=12, target_modules=["q_proj", "up_proj"], seed=3)
    numbers = allot(llama(), config, batches())
    assert sum(numbers.values()) == 4 * 12
    assert len(set(numbers.values())) > 1
    config.num_basis_pattern = as_pattern(numbers)
    llama().save_pretrained(tmp_path / "base")
    model: Any = get_peft_model(llama(), config)
    with torch.no_grad():
        for place, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place)) / 9)
    layers = {key: one for key, one in model.get_base_model().named_modules() if isinstance(one, RandbasisLinear)}
    assert {key: one.matrices("default")[0].bound.method.num_basis for key, one in layers.items()} == numbers
    batch = {"input_ids": batches()[0]["input_ids"]}
    with torch.no_grad():
        expected = model.eval()(**batch).logits

    @torch.no_grad()
    def same(other: Any, tolerance: float = 0.0) -> bool:
        return bool(torch.allclose(other.eval()(**batch).logits, expected, rtol=tolerance, atol=tolerance))

    model.save_pretrained(tmp_path / "folder")
    assert same(PeftModel.from_pretrained(llama(), tmp_path / "folder"))
    pack_adapter(tmp_path / "folder", tmp_path / "packed.safetensors", bits=32, base_name="base")
    assert same(load_packed(llama(), tmp_path / "packed.safetensors"))
    assert "num_basis_pattern" not in read(tmp_path / "packed.safetensors").spec.peft
    unpack_adapter(tmp_path / "packed.safetensors", tmp_path / "again")
    assert same(PeftModel.from_pretrained(llama(), tmp_path / "again"))
    pack_adapter(tmp_path / "again", tmp_path / "second.safetensors", bits=32, base_name="base")
    assert (tmp_path / "packed.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()
    with AdapterStore(tmp_path / "some.db") as store:
        store.add("mine", tmp_path / "packed.safetensors")
        assert same(load_packed(llama(), store.get("mine")))
    coefficients = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert coefficients == (2 if kind is NolaConfig else 1) * 4 * 12
    planned = plan(tmp_path / "base", config)
    assert planned.coefficients == coefficients == inspect_adapter(tmp_path / "packed.safetensors").coefficients
    assert planned.bytes == (tmp_path / "folder" / "adapter_model.safetensors").stat().st_size
    assert same(model.merge_and_unload(), 1e-4)


def test_longer_paths_come_first():
    assert list(as_pattern({"q": 1, "a.q": 2})) == [re.escape("a.q"), "q"]
    config = NolaConfig(target_modules=["q"], num_basis_pattern=as_pattern({"q": 1, "a.q": 2}))
    assert [config.method_for(key).num_basis for key in ("q", "a.q")] == [1, 2]


def test_refusals():
    with pytest.raises(HyperparameterError, match="allotted for nola and pranc, got 'vera'"):
        allot(llama(), VeraConfig(r=4, target_modules=["q_proj"]), batches())
    with pytest.raises(HyperparameterError, match="num_basis_pattern must be empty"):
        allot(llama(), NolaConfig(target_modules=["q_proj"], num_basis_pattern={"q_proj": 3}), batches())
    with pytest.raises(SettingError, match="needs a batch"):
        allot(llama(), NolaConfig(target_modules=["q_proj"]), [])
    broken = llama()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("inf"))
    with pytest.raises(NonFiniteLossError, match="must be finite before the first step"):
        allot(broken, NolaConfig(target_modules=["q_proj"]), batches())

"""Export as LoRA: exact wherever the rank allows, and usable with plain PEFT."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, save_as_lora
from safetensors.torch import load_file
from tuner_cases import CASES, Case, adapted_layers, outputs


def rank_of_delta(model: PeftModel, method: str) -> int:
    """r a part for NOLA and VeRA, the smaller side for the others."""
    layers = adapted_layers(model).values()
    smaller = max(min(layer.out_features, layer.in_features) for layer in layers)
    rank = {"nola": 3, "vera": 7}.get(method.partition("-")[0], smaller)
    return min(rank * max(len(layer.matrices("default")) for layer in layers), smaller)


@pytest.mark.parametrize("case", CASES)
def test_a_lora_of_the_rank_of_delta_is_exact(case, tmp_path):
    # PEFT gives all layers one rank, which no layer's smaller side may be below: leave the narrow v_proj out.
    targets = ("q_proj", "o_proj", "down_proj") if case.place == "linear" else case.targets
    model = case.adapted(target_modules=targets)
    expected = outputs(model, case.batch())
    save_as_lora(tmp_path, model, rank=rank_of_delta(model, case.method))
    lora = PeftModel.from_pretrained(case.base(), tmp_path).eval()
    assert isinstance(lora.peft_config["default"], LoraConfig)
    assert not adapted_layers(lora)
    torch.testing.assert_close(outputs(lora, case.batch()), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(outputs(model, case.batch()), expected)


@pytest.mark.parametrize("case", CASES)
def test_a_lora_of_lower_rank_is_the_nearest(case):
    """With one rank less than ΔW has, what is lost is its smallest singular value (Eckart-Young)."""
    model = case.adapted()
    name, layer = next(iter(adapted_layers(model).items()))
    rank = {"nola": 3, "vera": 7}.get(case.method.partition("-")[0], 5) - 1
    config, state = convert_to_lora(model, rank=rank)
    assert config.r == rank
    delta = layer.get_delta_weight("default")
    delta = delta.T if layer.transposed else delta
    a, b = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
    lost = torch.linalg.matrix_norm(delta - config.lora_alpha / config.r * (b @ a), ord=2)
    torch.testing.assert_close(lost, torch.linalg.svdvals(delta)[rank], rtol=1e-3, atol=1e-4)


def test_the_export_holds_lora_tensors_only(tmp_path):
    model = Case("c_attn", "nola").adapted()
    save_as_lora(tmp_path, model, rank=6)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == 2 * len(adapted_layers(model))
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in stored)


_WITHOUT_US = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
assert not any(name.startswith("randbasis") for name in sys.modules)
batch = torch.load(sys.argv[3])
with torch.no_grad():
    error = (model(**batch["batch"]).logits - batch["expected"]).abs().max().item()
assert error < 1e-3, error
print("equal")
"""


def test_the_export_needs_plain_peft_alone(tmp_path, console_environment):
    case = Case("linear", "vera")
    model = case.adapted()
    case.base().save_pretrained(tmp_path / "base")
    save_as_lora(tmp_path / "lora", model, rank=7)
    torch.save({"batch": case.batch(), "expected": outputs(model, case.batch())}, tmp_path / "expected.pt")
    arguments = [str(tmp_path / name) for name in ("base", "lora", "expected.pt")]
    command = [sys.executable, "-W", "ignore", "-c", _WITHOUT_US, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=console_environment, check=False)
    assert result.stdout.endswith("equal\n"), result.stderr[-3000:]

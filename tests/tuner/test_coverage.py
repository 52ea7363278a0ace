"""What a configuration asks for and does not get, against the modules and parameters of the model."""

import re
import warnings

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from tuner_cases import ONE_EACH, adapted_layers, make_config, seeded, tiny_llama

from randbasis import RandbasisModel

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
MIXTURES = {
    "MixtralForCausalLM": {"num_local_experts": 4},
    "Qwen3MoeForCausalLM": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "Qwen2MoeForCausalLM": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16},
}


def mixture(name: str) -> nn.Module:
    kind = getattr(transformers, name)
    return seeded(kind, kind.config_class(**SIZES, **MIXTURES[name]))


def said(record) -> list[str]:
    return [str(w.message) for w in record if "adapt" in str(w.message)]


@pytest.mark.parametrize("method", ONE_EACH)
def test_a_name_that_matches_nothing_is_named_when_put_on_and_when_loaded(method, tmp_path, recwarn):
    model = get_peft_model(seeded(tiny_llama), make_config(method, ["q_proj", "v_porj"]))
    (message,) = said(recwarn)
    assert re.search(r"entries \['v_porj'\] match no module.*did you mean v_proj", message)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")  # the same words from the same line are shown once in a process
        PeftModel.from_pretrained(seeded(tiny_llama), tmp_path)
    assert said(record) == [message]


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", r".*q_proj", None, ["layers.1.mlp.up_proj"]])
def test_names_that_match_are_not_mentioned(targets, recwarn):
    get_peft_model(seeded(tiny_llama), make_config("nola", targets))
    assert not said(recwarn)


def test_layers_that_all_linear_excludes_are_not_mentioned(recwarn):
    config = make_config("nola", "all-linear", exclude_modules=["up_proj"])
    model = get_peft_model(seeded(tiny_llama), config)
    assert not said(recwarn)
    assert not any(name.endswith("up_proj") for name in model.peft_config["default"].target_modules)


def test_usual_names_that_a_model_lacks_are_left_out_without_a_word(recwarn, tmp_path):
    base = seeded(tiny_llama)
    for layer in base.model.layers:
        layer.self_attn.value = layer.self_attn.v_proj
        del layer.self_attn.v_proj
    model = get_peft_model(base, make_config("nola", None))
    assert model.peft_config["default"].target_modules == {"q_proj"}
    assert not said(recwarn)


def test_usual_names_may_be_one_expression(monkeypatch):
    monkeypatch.setitem(RandbasisModel.target_module_mapping, "llama", r".*\.q_proj")
    model = get_peft_model(seeded(tiny_llama), make_config("nola", None))
    assert model.targeted_module_names
    assert all(name.endswith(".q_proj") for name in model.targeted_module_names)


def test_layer_numbers_beyond_the_last_are_named(recwarn):
    get_peft_model(seeded(tiny_llama), make_config("nola", ["q_proj"], layers_to_transform=[1, 2, 9]))
    (message,) = said(recwarn)
    assert "layers_to_transform numbers [2, 9] match no target" in message


@pytest.mark.parametrize("method", ONE_EACH)
@pytest.mark.parametrize(
    "targets", [SEVEN, "all-linear", r".*(q_proj|experts\.down_proj)"], ids=["7", "all", "pattern"]
)
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_in_one_tensor_are_counted(name, targets, method, recwarn):
    base = mixture(name)
    model = get_peft_model(base, make_config(method, targets))
    (message,) = [text for text in said(recwarn) if "3-dimensional" in text]
    experts = {n: p for n, p in base.named_parameters() if p.dim() == 3}
    assert f"keep {sum(p.numel() for p in experts.values()):,} parameters" in message
    assert all(re.sub(r"\.\d+\.", ".*.", n) in message for n in (m.removeprefix("base_model.model.") for m in experts))
    assert not any(".experts" in key for key in adapted_layers(model))


@pytest.mark.parametrize("name", MIXTURES)
def test_who_asks_for_attention_alone_hears_nothing_of_experts(name, recwarn):
    get_peft_model(mixture(name), make_config("nola", ["q_proj", "v_proj"]))
    assert not said(recwarn)


def test_convolutions_and_positions_are_no_experts(recwarn):
    kind = transformers.ViTModel
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = seeded(kind, kind.config_class(**sizes, image_size=16, patch_size=8))
    base.extra = nn.Conv1d(4, 4, 3)
    with torch.no_grad():
        get_peft_model(base, make_config("nola", "all-linear"))
    assert not said(recwarn)

"""What a directory of PEFT says its ΔW is, against PEFT's own matrices; and what is refused."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_adapters import WEIGHTS, adapted, bert, contents, gpt2, llama, peft_deltas, rewrite

from randbasis import NolaConfig
from randbasis.errors import (
    AdapterFilesError,
    BaseMismatchError,
    DataMissingError,
    ProjectionsMissingError,
    UnsupportedAdapterError,
)
from randbasis.importing import read_peft_adapter

LINEAR = ["q_proj", "v_proj", "down_proj"]
CONV = ["c_attn", "c_fc", "c_proj"]
CONFIGS: dict[str, tuple[Any, peft.PeftConfig]] = {
    "lora": (llama, peft.LoraConfig(r=3, lora_alpha=5, target_modules=LINEAR)),
    "lora-patterns": (
        llama,
        peft.LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=LINEAR,
            rank_pattern={"down_proj": 7, r"layers\.1\.self_attn\.q_proj": 2},
            alpha_pattern={"down_proj": 2, "layers.0.self_attn.v_proj": 11},
        ),
    ),
    "rslora-conv1d": (gpt2, peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=CONV)),
    "vera": (llama, peft.VeraConfig(r=5, target_modules=LINEAR)),
    "vera-conv1d": (gpt2, peft.VeraConfig(r=5, target_modules=CONV, projection_prng_key=3)),
    "randlora": (llama, peft.RandLoraConfig(r=5, randlora_alpha=7, target_modules=LINEAR)),
    "randlora-conv1d": (gpt2, peft.RandLoraConfig(r=7, target_modules=CONV, sparse=True)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_delta_against_peft(name: str, tmp_path: Path):
    build, config = CONFIGS[name]
    base = build()
    base.save_pretrained(tmp_path / "base")
    expected = peft_deltas(adapted(base, config, tmp_path / "adapter"))
    found = read_peft_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    assert sorted(found.layers) == sorted(expected)
    for key, delta in expected.items():
        assert found.shape(key) == tuple(delta.shape)
        assert delta.abs().max() > 1e-3
        torch.testing.assert_close(found.factors(key).matrix(), delta, rtol=1e-4, atol=1e-4 * float(delta.abs().max()))


def test_layers_are_in_their_order_and_heads_apart(tmp_path: Path):
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    adapted(bert(), config, tmp_path)
    found = read_peft_adapter(tmp_path)
    assert found.layers == [f"bert.encoder.layer.{n}.attention.self.query" for n in range(2)]
    assert sorted(found.head) == ["base_model.model.classifier.bias", "base_model.model.classifier.weight"]


def change_config(folder: Path, **options: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    adapted(llama(), peft.LoraConfig(r=3, target_modules=["q_proj"]), tmp_path / "lora")
    return tmp_path / "lora"


@pytest.fixture
def vera(tmp_path: Path) -> Path:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    adapted(base, peft.VeraConfig(r=3, target_modules=["q_proj"]), tmp_path / "vera")
    return tmp_path / "vera"


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "lora_only"},
        {"trainable_token_indices": [1]},
        {"layer_replication": [[0, 1]]},
        {"alora_invocation_tokens": [1, 2]},
        {"use_qalora": True},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
    ],
    ids=lambda options: next(iter(options)) + str(next(iter(options.values()))),
)
def test_other_forms_of_lora_are_refused(lora: Path, options: dict[str, Any]):
    change_config(lora, **options)
    before = contents(lora)
    with pytest.raises(UnsupportedAdapterError, match=next(iter(options))):
        read_peft_adapter(lora)
    assert contents(lora) == before


def test_dora_as_peft_writes_it_is_refused(tmp_path: Path):
    adapted(llama(), peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]), tmp_path)
    with pytest.raises(UnsupportedAdapterError, match="use_dora=True"):
        read_peft_adapter(tmp_path)


def test_embeddings_are_refused(tmp_path: Path):
    adapted(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]), tmp_path)
    with pytest.raises(UnsupportedAdapterError, match="embed_tokens"):
        read_peft_adapter(tmp_path)


def test_convolutions_are_refused(lora: Path):
    rewrite(lora, lambda tensors: tensors.update({name: t[:, :, None, None].clone() for name, t in tensors.items()}))
    with pytest.raises(UnsupportedAdapterError, match="a convolution"):
        read_peft_adapter(lora)


def test_tensors_that_nothing_explains_are_refused(lora: Path):
    rewrite(lora, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)}))
    with pytest.raises(UnsupportedAdapterError, match=r"lm_head.*shape \[2, 2\]"):
        read_peft_adapter(lora)


def test_half_a_layer_and_ranks_that_differ_are_refused(lora: Path):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    rewrite(lora, lambda tensors: tensors.update({name: tensors[name][:2].clone()}))
    with pytest.raises(AdapterFilesError, match="must fit each other"):
        read_peft_adapter(lora)
    rewrite(lora, lambda tensors: tensors.__delitem__(name))
    with pytest.raises(AdapterFilesError, match=r"no lora_A\.weight of 'model\.layers\.0"):
        read_peft_adapter(lora)


def test_an_alpha_that_is_no_number_is_refused(lora: Path):
    change_config(lora, lora_alpha="much")
    with pytest.raises(AdapterFilesError, match="lora_alpha must be a finite number, got 'much'"):
        read_peft_adapter(lora).factors("model.layers.0.self_attn.q_proj")


def test_other_methods_and_our_own_are_refused(lora: Path, tmp_path: Path):
    adapted(llama(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), tmp_path / "ia3")
    with pytest.raises(UnsupportedAdapterError, match=r"'IA3'.*convert_to_lora"):
        read_peft_adapter(tmp_path / "ia3")
    adapted(llama(), NolaConfig(num_basis=3, target_modules=["q_proj"]), tmp_path / "ours")
    with pytest.raises(AdapterFilesError, match="randbasis export"):
        read_peft_adapter(tmp_path / "ours")
    (lora / WEIGHTS).unlink()
    with pytest.raises(AdapterFilesError, match=r"adapter_model\.safetensors"):
        read_peft_adapter(lora)


@pytest.mark.parametrize("config", [peft.VeraConfig, peft.RandLoraConfig])
def test_checkpoints_without_their_random_matrices_are_refused(config: Any, tmp_path: Path):
    adapted(llama(), config(r=4, target_modules=["q_proj"], save_projection=False), tmp_path)
    with pytest.raises(ProjectionsMissingError, match=r"save_projection=False.*generator.*save_projection=True"):
        read_peft_adapter(tmp_path)


def test_vera_needs_the_base_that_it_was_made_for(vera: Path, tmp_path: Path):
    assert read_peft_adapter(vera).shape("model.layers.0.self_attn.q_proj") == (32, 32)
    gpt2().save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match=r"no such linear layer"):
        read_peft_adapter(vera, str(tmp_path / "other"))
    change_config(vera, base_model_name_or_path=None)
    with pytest.raises(DataMissingError, match="does not name its base model"):
        read_peft_adapter(vera)


def test_a_base_of_other_widths_is_refused(vera: Path, tmp_path: Path):
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "wide").mkdir()
    wide = config | {"hidden_size": 64, "head_dim": 16}
    (tmp_path / "wide" / "config.json").write_text(json.dumps(wide))
    with pytest.raises(BaseMismatchError, match="name the base model that it was made for"):
        read_peft_adapter(vera, str(tmp_path / "wide")).factors("model.layers.0.self_attn.q_proj")

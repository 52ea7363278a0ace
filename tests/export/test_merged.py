"""Merged models, also of quantized bases, read by plain transformers, against the base with its adapter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_bases import adapted, bert, gpt2, llama, saved
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from randbasis import LoraXsConfig, NolaConfig, RandLoraConfig, VeraConfig
from randbasis.adapters.packed import pack_adapter
from randbasis.adapters.putting import load_packed
from randbasis.errors import AdapterMissingError, ExportBaseError, MergeError, OutputExistsError
from randbasis.export import export_merged
from randbasis.train.pooled import PooledClassifier

TOKENS = torch.arange(24).view(2, 12)
SIZES = {"hidden_size": 64, "intermediate_size": 128}
QUANTIZED = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4-nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
}
#: The products of quantized layers round too: to 8 bits, and to bfloat16 on processors that have it.
ROUNDING = 0.02


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in each of the quantizations, and an adapter for all of them."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no quantized bases to test")
    folder = tmp_path_factory.mktemp("quantized")
    saved(llama(**SIZES), folder / "base")
    for name, options in QUANTIZED.items():
        config = BitsAndBytesConfig(**options)
        AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=config).save_pretrained(folder / name)
    adapted(llama(**SIZES), NolaConfig(r=2, num_basis=5, target_modules=["q_proj", "down_proj"]), folder / "adapter")
    return folder


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_dequantized_and_merged_against_the_quantized_model_with_the_adapter(
    name: str, dtype: str, quantized: Path, tmp_path: Path
):
    plain, base = (AutoModelForCausalLM.from_pretrained(quantized / name) for _ in range(2))
    want = logits(PeftModel.from_pretrained(base, quantized / "adapter"))
    done = export_merged(quantized / "adapter", tmp_path / "merged", base=str(quantized / name), dtype=dtype)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), want, rtol=0, atol=ROUNDING)
    assert (want - logits(plain)).abs().max() > 10 * ROUNDING
    assert done.matrices == 4
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    weights = load_file(tmp_path / "merged" / "model.safetensors").values()
    assert {str(tensor.dtype) for tensor in weights} == {"torch.float32" if dtype == "auto" else "torch.bfloat16"}
    assert all(type(module) is nn.Linear for module in merged.modules() if hasattr(module, "in_features"))


@pytest.mark.parametrize("name", QUANTIZED)
def test_merged_against_the_dequantized_model_with_the_adapter(name: str, quantized: Path, tmp_path: Path):
    """Without the rounding of quantized products, nothing but that of float32 is left."""
    plain = AutoModelForCausalLM.from_pretrained(quantized / name).dequantize(dtype=torch.float32)
    want = logits(PeftModel.from_pretrained(plain, quantized / "adapter"))
    export_merged(quantized / "adapter", tmp_path / "merged", base=str(quantized / name))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), want, rtol=0, atol=2e-6)
    unquantized = load_file(quantized / "base" / "model.safetensors")
    kept = {key for key, tensor in merged.state_dict().items() if torch.equal(tensor, unquantized[key])}
    assert kept == {key for key in unquantized if "_proj" not in key}


def test_a_quantization_that_cannot_be_undone_is_refused(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    def cannot(*_: Any, **__: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(Bnb4BitHfQuantizer, "_dequantize", cannot)
    with pytest.raises(MergeError, match=r"transformers can dequantize.*give the model that it was quantized from"):
        export_merged(quantized / "adapter", tmp_path / "merged", base=str(quantized / "nf4"))
    assert not (tmp_path / "merged").exists()


def test_a_packed_file_merges_as_it_loads(tmp_path: Path):
    base = saved(gpt2(), tmp_path / "base")
    adapted(gpt2(), RandLoraConfig(r=5, target_modules=["c_attn[q,v]", "c_fc"]), tmp_path / "adapter")
    pack_adapter(tmp_path / "adapter", tmp_path / "file.safetensors", bits=8)
    want = logits(load_packed(gpt2(), tmp_path / "file.safetensors"))
    export_merged(tmp_path / "file.safetensors", tmp_path / "merged", base=base)
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_trained_biases_and_head_are_merged(tmp_path: Path):
    base = saved(bert(classes=3), tmp_path / "base")
    config = VeraConfig(r=4, target_modules=["query"], bias="all", modules_to_save=["classifier"], task_type="SEQ_CLS")
    want = logits(adapted(bert(classes=3), config, tmp_path / "adapter"))
    export_merged(tmp_path / "adapter", tmp_path / "merged", base=base)
    got = logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_text_encoder_under_a_head_of_its_own(data_dir: Path, tmp_path: Path):
    """Its pooler is left out in training, and is as it was in the merged model."""
    base = str(data_dir / "minilm_l6_h384")
    with torch.random.fork_rng(devices=()):
        model = PooledClassifier.from_encoder(base, num_labels=2, pooling="mean", dtype="float32")
    config = NolaConfig(
        r=2, num_basis=8, target_modules="all-linear", exclude_modules=["classifier"], modules_to_save=["classifier"],
        parametrization="plain",
    )  # fmt: skip
    with torch.no_grad():
        want = adapted(model, config, tmp_path / "adapter").get_base_model().encoder(TOKENS)[0]
        done = export_merged(tmp_path / "adapter", tmp_path / "merged", dtype="float32")
        got = AutoModel.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(got(TOKENS)[0], want, rtol=1e-4, atol=1e-4)
    assert (done.head, done.matrices) == ("apart", 36)
    assert torch.equal(
        got.pooler.dense.weight, AutoModel.from_pretrained(base, dtype=torch.float32).pooler.dense.weight
    )


def test_no_base_no_adapter_and_an_output_that_exists_are_refused(tmp_path: Path):
    adapted(gpt2(), VeraConfig(r=4, target_modules=["c_fc"]), tmp_path / "adapter")
    with pytest.raises(ExportBaseError, match="names none"):
        export_merged(tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(AdapterMissingError, match="nothing at"):
        export_merged(tmp_path / "nowhere", tmp_path / "merged")
    with pytest.raises(OutputExistsError, match="for both"):
        export_merged(tmp_path / "adapter", tmp_path / "adapter", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize("trained", ["float32", "bfloat16"])
@pytest.mark.parametrize("given", ["folder", "file"])
def test_one_that_is_made_of_the_weights_is_merged_before_they_are_rounded(trained: str, given: str, tmp_path: Path):
    """Or after, where it was trained on rounded ones, which have another digest."""
    base = saved(llama(), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=trained)
    config = LoraXsConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    merged = adapted(model, config, tmp_path / "folder").merge_and_unload().to(torch.bfloat16).state_dict()
    pack_adapter(tmp_path / "folder", tmp_path / "file", bits=32, base_name="tiny")
    done = export_merged(tmp_path / given, tmp_path / "merged", base=base, dtype="bfloat16")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert done.dtype == "bfloat16"
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(torch.equal(found[name], merged[name]) for name in found)
    assert not torch.equal(found["model.layers.0.self_attn.q_proj.weight"], rounded(base))


def rounded(base: str) -> Tensor:
    return load_file(Path(base, "model.safetensors"))["model.layers.0.self_attn.q_proj.weight"].bfloat16()

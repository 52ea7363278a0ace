"""Names of parts against the rows that each model really uses as query, key, value, gate and up."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from tuner_cases import ONE_EACH, FusedBlock, adapted_layers, make_config, outputs, seeded, tiny_gpt2, token_batch

from randbasis.errors import SliceError
from randbasis.tuner.fused_layouts import LAYOUTS

COMMON = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2_SIZES = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32, **COMMON}
LLAMA_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, **COMMON}


@dataclass(frozen=True)
class Fused:
    """A model and its fused projection."""

    name: str
    model: str
    config: dict[str, Any]
    projection: str
    inputs: Callable[[], dict[str, Tensor]] = token_batch

    def build(self) -> nn.Module:
        kind = getattr(transformers, self.model)
        return seeded(kind, kind.config_class(**self.config))


def pixels(size: int = 16) -> Callable[[], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return lambda: {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}


MROPE = {"type": "default", "mrope_section": [1, 1, 2]}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
PATCHED = {**VISION, "image_size": 16, "patch_size": 8, "initializer_range": 0.2}
DECODERS = [
    Fused("gpt2", "GPT2Model", GPT2_SIZES, "c_attn"),
    Fused("openai", "OpenAIGPTModel", GPT2_SIZES, "c_attn"),
    Fused("gpt_bigcode", "GPTBigCodeModel", GPT2_SIZES, "c_attn"),
    Fused("phi3", "Phi3Model", {**LLAMA_SIZES, "num_key_value_heads": 2}, "qkv_proj"),
    Fused(
        "dbrx",
        "DbrxModel",
        {
            **COMMON,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 1,
            "max_seq_len": 32,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 32, "hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1},
        },
        "Wqkv",
    ),
    Fused("mpt", "MptModel", {"d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 32, "vocab_size": 64}, "Wqkv"),
    Fused(
        "falcon of one key",
        "FalconModel",
        {
            **COMMON,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
            "multi_query": True,
            "new_decoder_architecture": False,
            "alibi": False,
        },
        "query_key_value",
    ),
]
VISION_MODELS = [
    Fused("blip", "BlipVisionModel", PATCHED, "qkv", pixels()),
    Fused("blip-2", "Blip2VisionModel", PATCHED, "qkv", pixels()),
    Fused(
        "vitdet",
        "VitDetModel",
        {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
            "pretrain_image_size": 16,
            "use_relative_position_embeddings": False,
        },
        "qkv",
        pixels(),
    ),
    Fused(
        "hiera",
        "HieraModel",
        {
            "embed_dim": 16,
            "image_size": [32, 32],
            "patch_stride": [4, 4],
            "num_heads": [2, 4],
            "depths": [1, 1],
            "masked_unit_size": [4, 4],
            "query_stride": [2, 2],
            "num_query_pool": 1,
            "masked_unit_attention": [True, False],
        },
        "qkv",
        pixels(32),
    ),
]
SPECIAL_TOKENS = {"cls_token_id": 1, "sep_token_id": 2}
BIDIRECTIONAL = [
    # With fewer layers, of one kind alone, transformers 5.14 cannot build its configuration.
    Fused("modernbert", "ModernBertModel", {**LLAMA_SIZES, "num_hidden_layers": 4, **SPECIAL_TOKENS}, "Wqkv"),
    *VISION_MODELS,
]


def _with(fused: Fused, part: str) -> tuple[PeftModel, nn.Module]:
    """The model with an adapter on one part, made to change it much, and the model without."""
    adapted = get_peft_model(fused.build(), make_config("pranc", [f"{fused.projection}[{part}]"])).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".randbasis_" in name:
                parameter.normal_(0, 3, generator=torch.Generator().manual_seed(5))
    return adapted, fused.build()


def _cache(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        layer = model(**batch, use_cache=True).past_key_values.layers[0]
    return layer.keys, layer.values


@pytest.mark.parametrize("fused", [f for f in DECODERS if f.name != "openai"], ids=lambda f: f.name)
@pytest.mark.parametrize(("part", "changed"), [("q", (False, False)), ("k", (True, False)), ("v", (False, True))])
def test_a_part_of_a_decoder_changes_what_it_names_in_the_cache(fused, part, changed):
    adapted, plain = _with(fused, part)
    batch = fused.inputs()
    before, after = _cache(plain, batch), _cache(adapted.get_base_model(), batch)
    assert tuple(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) == changed
    if part == "q":
        assert not torch.allclose(plain(**batch)[0], adapted.get_base_model()(**batch)[0], atol=1e-4)


@pytest.mark.parametrize("fused", [*BIDIRECTIONAL, DECODERS[1]], ids=lambda f: f.name)
def test_queries_and_keys_of_an_encoder_act_on_the_scores_alone(fused):
    """With values of zeros, what the scores are does not matter: only v changes the output."""
    differences = {}
    for part in "qkv":
        adapted, plain = _with(fused, part)
        rows = [one.part for layer in adapted_layers(adapted).values() for one in layer.matrices("default")]
        with torch.no_grad():
            for model in (adapted.get_base_model(), plain):
                for name, module in model.named_modules():
                    if name.endswith((fused.projection, f"{fused.projection}.base_layer")):
                        _silence_values(module)
        batch = fused.inputs()
        with torch.no_grad():
            differences[part] = float((plain(**batch)[0] - adapted.get_base_model()(**batch)[0]).abs().max())
        assert {one.name for one in rows} == {part}
    assert differences["q"] < 1e-5
    assert differences["k"] < 1e-5
    assert differences["v"] > 1e-3


def _silence_values(module: Any) -> None:
    """Values of zeros: the last third of the rows of a projection, as its own code has it."""
    weight = module.weight.T if isinstance(module, transformers.pytorch_utils.Conv1D) else module.weight
    third = weight.shape[0] // 3
    weight.data[2 * third :] = 0
    if module.bias is not None:
        module.bias.data[2 * third :] = 0


@pytest.mark.parametrize("fused", VISION_MODELS[:1], ids=lambda f: f.name)
def test_one_vector_added_to_all_keys_changes_nothing_and_to_queries_it_does(fused):
    """Softmax is deaf to what is the same for all keys: the oracle that tells k from q."""
    differences = {}
    for part, start in (("q", 0), ("k", 32)):
        model = fused.build()
        (layer,) = adapted_layers(get_peft_model(fused.build(), make_config("pranc", [f"qkv[{part}]"]))).values()
        (one,) = layer.matrices("default")
        assert (one.part.start, one.part.stop) == (start, start + 32)
        batch = fused.inputs()
        with torch.no_grad():
            before = model(**batch)[0]
            bias = next(m for name, m in model.named_modules() if name.endswith("qkv")).bias
            bias[one.part.start : one.part.stop] += torch.randn(32, generator=torch.Generator().manual_seed(1)) * 9
            differences[part] = float((model(**batch)[0] - before).abs().max())
    assert differences["k"] < 1e-4 < 1e-2 < differences["q"]


ALTERNATING = [
    Fused("codegen", "CodeGenModel", {**GPT2_SIZES, "rotary_dim": 4}, "qkv_proj"),
    Fused("gpt_bigcode with many keys", "GPTBigCodeModel", {**GPT2_SIZES, "multi_query": False}, "c_attn"),
    Fused("bloom", "BloomModel", {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64}, "query_key_value"),
    Fused("gpt_neox", "GPTNeoXModel", LLAMA_SIZES, "query_key_value"),
    Fused("persimmon", "PersimmonModel", LLAMA_SIZES, "query_key_value"),
    Fused(
        "falcon of many keys",
        "FalconModel",
        {**COMMON, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "multi_query": False},
        "query_key_value",
    ),
    Fused(
        "falcon of groups",
        "FalconModel",
        {
            **COMMON,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
        },
        "query_key_value",
    ),
]


@pytest.mark.parametrize("method", ONE_EACH)
@pytest.mark.parametrize("fused", ALTERNATING, ids=lambda f: f.name)
def test_alternating_parts_are_refused_and_rows_are_not(fused, method):
    with pytest.raises(SliceError, match=r"interleaves query, key and value by head.*'start:stop'"):
        get_peft_model(fused.build(), make_config(method, [f"{fused.projection}[q]"]))
    model = get_peft_model(fused.build(), make_config(method, [f"{fused.projection}[3:9]"]))
    (layer,) = adapted_layers(model).values()
    assert [(one.part.start, one.part.stop) for one in layer.matrices("default")] == [(3, 9)]


@pytest.mark.parametrize("method", ONE_EACH)
@pytest.mark.parametrize("name", ["qkv[q]", "qkv[value]", "in_proj[k]", "qkv[gate]"])
def test_models_that_nobody_read_take_rows_but_no_names(name, method):
    with pytest.raises(SliceError, match=r"none is for this layer of a model without a model type.*\[0:24\].*\[0/3\]"):
        get_peft_model(seeded(FusedBlock), make_config(method, [name]))


def test_a_known_name_on_an_unknown_layer_of_a_known_model_is_refused():
    with pytest.raises(SliceError, match="none is for this layer of model type 'gpt2'"):
        get_peft_model(seeded(tiny_gpt2), make_config("nola", ["c_fc[up]"]))


def test_cross_attention_of_gpt2_has_keys_and_values_alone():
    base = seeded(tiny_gpt2, add_cross_attention=True)
    with pytest.raises(SliceError, match=r"'q' of .*crossattention.c_attn' must be one of \['k', 'v'\]"):
        get_peft_model(base, make_config("nola", ["crossattention.c_attn[q]"]))
    model = get_peft_model(base, make_config("nola", ["crossattention.c_attn[v]"]))
    assert {
        (o.part.start, o.part.stop) for layer in adapted_layers(model).values() for o in layer.matrices("default")
    } == {(32, 64)}


@pytest.mark.parametrize(
    ("model", "config", "projection", "wanted"),
    [
        # The vision part of a model whose language part has other numbers of heads.
        (
            "Qwen2VLModel",
            {
                "text_config": {**LLAMA_SIZES, "num_key_value_heads": 2, "rope_scaling": MROPE},
                "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2},
            },
            "attn.qkv",
            (64, 96),
        ),
    ],
)
def test_the_part_of_a_composite_model_decides(model, config, projection, wanted):
    kind = getattr(transformers, model)
    base = seeded(kind, kind.config_class(**config))
    adapted = get_peft_model(base, make_config("nola", [f"{projection}[v]"]))
    rows = {
        (o.part.start, o.part.stop) for layer in adapted_layers(adapted).values() for o in layer.matrices("default")
    }
    assert rows == {wanted}


def test_gate_and_up_of_phi3_are_what_its_code_multiplies():
    kind = transformers.Phi3Model
    base = seeded(kind, kind.config_class(**LLAMA_SIZES))
    model = get_peft_model(base, make_config("nola", ["gate_up_proj[up]"]))
    (layer,) = adapted_layers(model).values()
    (one,) = layer.matrices("default")
    with torch.no_grad():
        layer.base_layer.weight[one.part.start : one.part.stop] = 0
        mlp = model.get_submodule("base_model.model.layers.0.mlp")
        assert not mlp(torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))).any()
        layer.base_layer.weight[one.part.start : one.part.stop] = 1
        layer.base_layer.weight[: one.part.start] = 1
        assert mlp(torch.ones(1, 1, 32)).any()


def test_model_types_of_the_table_exist():
    """A row with a misspelt type is one that no model ever meets."""
    declared = {
        match
        for file in (Path(transformers.__file__).parent / "models").glob("*/configuration_*.py")
        for match in re.findall(r'model_type = "([^"]+)"', file.read_text(encoding="utf-8"))
    }
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 23):
        pytest.skip("some types of the table are younger than this transformers")
    assert {model_type for model_type, _ in LAYOUTS} <= declared


def test_rows_of_a_saved_adapter_are_those_it_was_trained_on(tmp_path):
    """Whatever a later version knows of the model."""
    model = get_peft_model(seeded(tiny_gpt2), make_config("nola", ["c_attn[q]"], init_weights=False)).eval()
    want = outputs(model, token_batch())
    model.save_pretrained(tmp_path)
    base = seeded(tiny_gpt2)
    base.config.model_type = "of a later day"
    assert torch.equal(outputs(PeftModel.from_pretrained(base, tmp_path).eval(), token_batch()), want)

"""Which modules a configuration names, and hyper-parameters of some of them."""

import pytest
import torch
from peft import get_peft_model
from tuner_cases import (
    ONE_EACH,
    OPTIONS,
    Case,
    FusedBlock,
    adapted_layers,
    fill,
    make_config,
    outputs,
    seeded,
    tiny_gpt2,
    tiny_llama,
    token_batch,
)

LLAMA_LINEAR = {f"layers.{i}.{block}" for i in (0, 1) for block in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}  # fmt: skip


def adapted_names(model) -> set[str]:
    return {name.removeprefix("base_model.model.").removeprefix("model.") for name in adapted_layers(model)}


@pytest.mark.parametrize("method", ONE_EACH)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"targets": "all-linear"}, LLAMA_LINEAR),
        ({"targets": ["q_proj", "up_proj"]}, {n for n in LLAMA_LINEAR if n.endswith(("q_proj", "up_proj"))}),
        ({"targets": ["layers.1.mlp.up_proj"]}, {"layers.1.mlp.up_proj"}),
        ({"targets": r".*\.1\.self_attn\.[qk]_proj"}, {"layers.1.self_attn.q_proj", "layers.1.self_attn.k_proj"}),
        ({"targets": None}, {n for n in LLAMA_LINEAR if n.endswith(("q_proj", "v_proj"))}),
        ({"targets": ["q_proj"], "layers_to_transform": [1]}, {"layers.1.self_attn.q_proj"}),
        ({"targets": ["q_proj"], "layers_to_transform": 0}, {"layers.0.self_attn.q_proj"}),
        (
            {"targets": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
            {"layers.0.self_attn.q_proj"},
        ),
        (
            {"targets": "all-linear", "exclude_modules": ["down_proj", "k_proj"]},
            {n for n in LLAMA_LINEAR if not n.endswith(("down_proj", "k_proj"))},
        ),
        ({"targets": ["q_proj"], "exclude_modules": r".*layers\.0.*"}, {"layers.1.self_attn.q_proj"}),
        ({"targets": ["lm_head"]}, {"lm_head"}),
    ],
)
def test_named_modules(method, options, expected):
    targets = options["targets"]
    rest = {key: value for key, value in options.items() if key != "targets"}
    model = get_peft_model(seeded(tiny_llama, tie_word_embeddings=False), make_config(method, targets, **rest))
    assert adapted_names(model) == expected
    fill(model)
    outputs(model.eval(), token_batch())


@pytest.mark.parametrize("method", ONE_EACH)
def test_all_linear_finds_conv1d(method):
    model = get_peft_model(seeded(tiny_gpt2), make_config(method, "all-linear"))
    assert {name.rpartition(".")[2] for name in adapted_layers(model)} == {"c_attn", "c_proj", "c_fc"}


@pytest.mark.parametrize("method", ONE_EACH)
def test_usual_targets_of_gpt2_are_the_whole_projection(method):
    model = get_peft_model(seeded(tiny_gpt2), make_config(method, None))
    assert {name.rpartition(".")[2] for name in adapted_layers(model)} == {"c_attn"}


def test_a_square_conv1d_needs_no_hint():
    """`fan_in_fan_out` does not exist: the layer knows its own layout, also where its shape would not tell."""
    model = get_peft_model(seeded(tiny_gpt2), make_config("nola", ["attn.c_proj"]))
    fill(model)
    expected = outputs(model.eval(), token_batch())
    torch.testing.assert_close(outputs(model.merge_and_unload(), token_batch()), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="fan_in_fan_out"):
        make_config("nola", ["attn.c_proj"], fan_in_fan_out=True)


@pytest.mark.parametrize("method", ["nola", "vera", "randlora"])
def test_rank_pattern(method):
    options = {"rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 4}}
    model = get_peft_model(seeded(tiny_llama), make_config(method, "all-linear", **options))
    usual = OPTIONS[method][1]["r"]
    for name, layer in adapted_layers(model).items():
        rank = layer.matrices("default")[0].bound.method.r
        wanted = 2 if "down_proj" in name else 4 if "layers.1.self_attn.q_proj" in name else usual
        assert rank == wanted


@pytest.mark.parametrize("method", ["nola", "randlora"])
def test_alpha_pattern_scales_delta(method):
    common = {"scaling": "hf", "alpha": 10.0} if method == "randlora" else {"alpha": 10.0}
    deltas = []
    for pattern in ({}, {"v_proj": 30.0}):
        model = get_peft_model(
            seeded(tiny_llama), make_config(method, ["q_proj", "v_proj"], alpha_pattern=pattern, **common)
        )
        fill(model)
        deltas.append({name: layer.get_delta_weight("default") for name, layer in adapted_layers(model).items()})
    for name, delta in deltas[0].items():
        factor = 3.0 if "v_proj" in name else 1.0
        torch.testing.assert_close(deltas[1][name], factor * delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["nola", "pranc"])
def test_num_basis_pattern(method):
    options = {"num_basis_pattern": {"v_proj": 9}}
    model = get_peft_model(seeded(tiny_llama), make_config(method, ["q_proj", "v_proj"], **options))
    for name, layer in adapted_layers(model).items():
        assert layer.matrices("default")[0].bound.method.num_basis == (9 if "v_proj" in name else 6)


@pytest.mark.parametrize("method", ["nola", "vera", "randlora"])
def test_patterns_survive_the_file(method, tmp_path):
    case = Case("linear", method)
    model = case.adapted(rank_pattern={"down_proj": 2})
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(case.base(), tmp_path).eval()
    assert torch.equal(outputs(again, case.batch()), outputs(model, case.batch()))


def test_patterns_on_slices():
    options = {"num_basis_pattern": {"in_proj": 9}}
    model = get_peft_model(seeded(FusedBlock), make_config("nola", ["qkv[0/3]", "in_proj[2/3]"], **options))
    assert [layer.matrices("default")[0].bound.method.num_basis for layer in adapted_layers(model).values()] == [6, 9]

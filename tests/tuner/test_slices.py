"""Slices of fused projections: which rows a name means, and that the other rows are left alone."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from tuner_cases import (
    CASES,
    OPTIONS,
    Case,
    FusedBlock,
    adapted_layers,
    coefficients_of,
    fill,
    make_config,
    outputs,
    parts_by_hand,
    seeded,
    tiny_gpt2,
    tiny_llama,
    tiny_phi3,
    vector_batch,
)

from randbasis.errors import SliceError, TargetError
from randbasis.tuner.targets import Part, parts_of, resolve_parts, split_names, split_slices

SLICED = [parameter for parameter in CASES if parameter.values[0].place in ("c_attn", "qkv_proj", "in_proj")]


@pytest.mark.parametrize("case", SLICED)
def test_other_rows_get_exactly_the_output_of_the_base(case):
    model, plain = case.adapted(), case.base()
    for name, layer in adapted_layers(model.get_base_model()).items():
        x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            difference = layer(x) - plain.get_submodule(name)(x)
        touched = torch.zeros(layer.out_features, dtype=torch.bool)
        for _, start, stop in parts_by_hand(case.targets, name, layer.out_features):
            touched[start:stop] = True
        assert torch.equal(difference.ne(0).any(0).any(0), touched)
        assert 0 < touched.sum() < layer.out_features


@pytest.mark.parametrize("case", SLICED)
def test_each_part_has_coefficients_of_its_own(case):
    model = case.adapted()
    parts = {name for name in coefficients_of(model) if name.split(".randbasis_")[1].split(".")[0][-1] in "qkvp3"}
    assert len(parts) == len(coefficients_of(model))


@pytest.mark.parametrize("method", OPTIONS)
def test_a_part_is_the_method_on_a_layer_of_that_shape(method):
    """ΔW of a slice on the shared basis equals ΔW of a layer of the slice's shape with the same coefficients."""
    if method == "nola-own-basis":
        pytest.skip("its streams are named after the path, which differs here by design")

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key = nn.Linear(24, 24)

    fused, alone = seeded(FusedBlock), seeded(Apart)
    alone.key.weight.data.copy_(fused.qkv.weight[24:48])  # for a method that makes its matrices of it
    sliced = get_peft_model(fused, make_config(method, ["qkv[1/3]"]))
    apart = get_peft_model(alone, make_config(method, ["key"]))
    fill(sliced)
    fill(apart)
    (one,), (other,) = (list(adapted_layers(m).values()) for m in (sliced, apart))
    delta = one.get_delta_weight("default")
    assert torch.equal(delta[24:48], other.get_delta_weight("default"))
    assert not delta[:24].any()
    assert not delta[48:].any()


@pytest.mark.parametrize("method", OPTIONS)
def test_parts_in_any_order_and_spelling_are_one_adapter(method):
    results = []
    for targets in (["qkv[0/3,2/3]"], ["qkv[2/3]", "qkv[0/3]"], ["qkv[ 2/3 , 0/3 ]", "qkv[0/3]"]):
        model = get_peft_model(seeded(FusedBlock), make_config(method, targets))
        fill(model)
        results.append(outputs(model.eval(), vector_batch()))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("build", "target", "expected"),
    [
        (tiny_gpt2, "c_attn[q]", (0, 32)),
        (tiny_gpt2, "c_attn[key]", (32, 64)),
        (tiny_gpt2, "c_attn[v]", (64, 96)),
        (tiny_phi3, "qkv_proj[q]", (0, 32)),  # grouped queries: 4 heads of queries, 2 of keys, 2 of values
        (tiny_phi3, "qkv_proj[k]", (32, 48)),
        (tiny_phi3, "qkv_proj[value]", (48, 64)),
        (tiny_phi3, "gate_up_proj[gate]", (0, 48)),
        (tiny_phi3, "gate_up_proj[up]", (48, 96)),
        (FusedBlock, "in_proj[2/3]", (48, 72)),
        (FusedBlock, "qkv[1/2]", (36, 72)),
        (FusedBlock, "qkv[10:31]", (10, 31)),
        (tiny_llama, "q_proj[1/4]", (8, 16)),  # one head
    ],
)
def test_rows_of_a_name(build, target, expected):
    model = get_peft_model(seeded(build), make_config("nola", [target]))
    for layer in adapted_layers(model).values():
        (one,) = layer.matrices("default")
        assert (one.part.start, one.part.stop) == expected
        assert one.bound.out_features == expected[1] - expected[0]


def test_queries_of_gpt2_behave_as_queries():
    """With q alone changed, the keys and values that the layer caches are those of the base model."""
    model = get_peft_model(seeded(tiny_gpt2, n_layer=1), make_config("vera", ["c_attn[q]"]))
    fill(model)
    ids = torch.arange(3, 11).view(1, 8)
    mine, theirs = model.eval()(ids, use_cache=True), seeded(tiny_gpt2, n_layer=1)(ids, use_cache=True)
    for name in ("keys", "values"):
        a, b = (getattr(out.past_key_values.layers[0], name) for out in (mine, theirs))
        assert torch.equal(a, b)
    assert not torch.allclose(mine.logits, theirs.logits, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "method", "options", "count"),
    [
        ((24, 1024), "nola", {"num_basis": 1000}, 96_000),
        ((36, 1280), "nola", {"num_basis": 250}, 36_000),
        ((24, 1024), "vera", {"r": 1024}, 98_304),
        ((36, 1280), "vera", {"r": 1024}, 165_888),
    ],
)
def test_counts_of_math_4_for_the_slices_of_gpt2(size, method, options, count):
    layers, width = size
    with torch.device("meta"):
        base = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width, n_head=16))
    options = {"num_basis_b": None, "basis_storage": "recompute"} | options if method == "nola" else options
    model = get_peft_model(base, make_config(method, ["c_attn[q,v]"], **options), low_cpu_mem_usage=True)
    assert sum(p.numel() for p in coefficients_of(model).values()) == count


# --- the language of targets ---


def test_split_names():
    assert split_names("c_attn[q,v],c_fc, mlp.c_proj ,") == ["c_attn[q,v]", "c_fc", "mlp.c_proj"]


def test_split_slices():
    assert split_slices(["c_attn[q]", "c_attn[v,q]", "c_fc"]) == ({"c_attn", "c_fc"}, {"c_attn": ["q", "v"]})


def test_the_longest_name_decides():
    slices = {"qkv": ["q"], "encoder.qkv": ["v"]}
    assert parts_of("model.encoder.qkv", slices) == ["v"]
    assert parts_of("model.decoder.qkv", slices) == ["q"]
    assert parts_of("qkv", slices) == ["q"]
    assert parts_of("model.other_qkv", slices) == []


def test_a_name_with_a_path_slices_only_that_module():
    model = get_peft_model(seeded(tiny_gpt2), make_config("nola", ["h.1.attn.c_attn[v]", "c_fc"]))
    rows = {name.removeprefix("base_model.model.transformer."): [one.part for one in layer.matrices("default")]
            for name, layer in adapted_layers(model).items()}  # fmt: skip
    assert rows == {"h.0.mlp.c_fc": [Part("", 0, 128)], "h.1.mlp.c_fc": [Part("", 0, 128)],
                    "h.1.attn.c_attn": [Part("v", 64, 96)]}  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["nope"], "'nope' of 'a.qkv' is unknown: .*'start:stop' or 'i/n'"),
        (["0:61"], "0:61 of 'a.qkv' must lie in 0:60"),
        (["30:10"], "30:10 of 'a.qkv' must lie in 0:60 and not be empty"),
        (["2/2"], "must be i/n with i < n"),
        (["0/0"], "must be i/n with i < n"),
        (["0/7"], "60 rows are not 7 equal parts"),
        (["0/2", "0/3"], "must not overlap"),
    ],
)
def test_parts_that_do_not_exist(wanted, message):
    with pytest.raises(SliceError, match=message):
        resolve_parts("a.qkv", wanted, 60, {})


def test_interleaved_projections_take_rows_but_no_names():
    with pytest.raises(SliceError, match="interleaves query, key and value by head; adapt the whole layer"):
        resolve_parts("h.0.query_key_value", ["q"], 96, {"model_type": "bloom", "n_head": 4})
    assert resolve_parts("h.0.query_key_value", ["0:8"], 96, {}) == [Part("0:8", 0, 8)]


@pytest.mark.parametrize("target", ["a[b]c", "a[[b]]", "[q]", "a]", ""])
def test_targets_that_are_no_names(target):
    with pytest.raises(TargetError, match="must look like 'name' or 'name"):
        split_slices([target])


def test_slices_survive_saving_twice(tmp_path):
    """A reloaded configuration has its names and parts apart; saving it again loses neither."""
    case = Case("c_attn", "vera")
    model = case.adapted()
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
        model = type(model).from_pretrained(case.base(), tmp_path / name).eval()
    assert torch.equal(outputs(model, case.batch()), outputs(case.adapted(), case.batch()))

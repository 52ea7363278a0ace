"""Bad input: an error of its own class that says what was wrong and how to go on, and nothing that has changed."""

import copy
import json
import re
import shutil
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Model, GPTNeoXConfig, GPTNeoXForCausalLM
from tuner_cases import (
    ONE_EACH,
    OPTIONS,
    Case,
    FusedBlock,
    coefficients_of,
    fill,
    make_config,
    needs_pair,
    outputs,
    seeded,
    snapshot,
    tiny_gpt2,
    tiny_llama,
)

from randbasis import NolaConfig, PrancConfig, RandbasisConfig, RandbasisError, RandLoraConfig, VeraConfig
from randbasis.errors import (
    AdapterFilesError,
    BaseMismatchError,
    CoefficientCountError,
    CoefficientValueError,
    ContractionError,
    HyperparameterError,
    LawError,
    LayerTypeError,
    RankError,
    SeedError,
    SliceError,
    StorageError,
    TargetError,
    UnknownMethodError,
)

CONFIGS = (NolaConfig, VeraConfig, RandLoraConfig, PrancConfig)
SAVED = Case("c_attn", "nola")


# --- configurations: refused before there is a model ---


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"law": "gauss"}, LawError, r"law .*'gauss'"),
        ({"law": "sparse(0)"}, LawError, r"sparse\(0\)"),
        ({"seed": -1}, SeedError, "seed .*-1"),
        ({"seed": 2**64}, SeedError, "seed .*18446744073709551616"),
        ({"seed": 1.5}, SeedError, "seed .*1.5"),
        ({"basis_storage": "disk"}, StorageError, "basis_storage .*'disk'"),
        ({"contraction": "best"}, ContractionError, "contraction must be one of .* got 'best'"),
        ({"dropout": 1.0}, HyperparameterError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, HyperparameterError, r"dropout must be in \[0, 1\), got -0.1"),
        ({"bias": "some"}, HyperparameterError, "bias must be 'none', 'all' or 'randbasis_only', got 'some'"),
        ({"method": "dora"}, UnknownMethodError, "method"),
        ({"target_modules": ["c_attn[q"]}, TargetError, r"must look like .* got 'c_attn\[q'"),
        ({"target_modules": ["c_attn[]"]}, SliceError, r"'c_attn\[\]' names no part; write for example c_attn\[q\]"),
        ({"target_modules": ["qkv", "qkv[q]"]}, SliceError, r"'qkv' both whole and in parts \['q'\]"),
        ({"target_modules": "q", "layers_to_transform": [0]}, TargetError, "layers_to_transform needs .* list"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, TargetError, "'all-linear'; name the modules"),
        ({"target_modules": ["q"], "layers_to_transform": []}, TargetError, r"a number of a layer or .* got \[\]"),
        ({"target_modules": ["q"], "layers_to_transform": [0, -1]}, TargetError, r"counted from 0, got \[0, -1\]"),
        ({"target_modules": ["q"], "layers_to_transform": ["1"]}, TargetError, r"counted from 0, got \['1'\]"),
        ({"target_modules": ["q"], "layers_to_transform": True}, TargetError, "counted from 0, got True"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, TargetError, "layers_pattern needs layers_to_transform"),
        ({"target_modules": "(q"}, TargetError, r"target_modules must hold regular .*'\(q'.*backslash"),
        ({"target_modules": ["q"], "exclude_modules": "*"}, TargetError, r"exclude_modules must hold regular .*'\*'"),
        ({"target_modules": ["q"], "modules_to_save": ["a["]}, TargetError, r"modules_to_save must hold .*'a\['"),
        (
            {"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": ["h", "(l"]},
            TargetError,
            r"layers_pattern must hold regular .*'\(l'",
        ),
    ],
)
def test_options_that_no_method_takes(config_class, options, error, message):
    with pytest.raises(error, match=message):
        config_class(**options)


@pytest.mark.parametrize("value", [0, -3, 2.0, True, "8", 10**9])
@pytest.mark.parametrize(
    ("config_class", "argument"),
    [
        (NolaConfig, "r"),
        (NolaConfig, "num_basis"),
        (NolaConfig, "num_basis_b"),
        (VeraConfig, "r"),
        (RandLoraConfig, "r"),
        (PrancConfig, "num_basis"),
    ],
)
def test_ranks_and_bases_that_are_no_positive_integers(config_class, argument, value):
    rule = "must be at most" if value == 10**9 else "must be a positive integer"
    with pytest.raises(RankError, match=rf"{argument} {rule}.*got {value!r}; use for example {argument}="):
        config_class(**{argument: value})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NolaConfig(parametrization="new"), HyperparameterError, r"parametrization must be one of .*'new'"),
        (lambda: RandLoraConfig(scaling="big"), HyperparameterError, "scaling must be one of .* got 'big'"),
        (lambda: RandLoraConfig(scaling="paper", alpha=3.0), HyperparameterError, "alpha has no meaning .*'paper'"),
        (lambda: PrancConfig(rank_pattern={"q": 2}), HyperparameterError, "rank_pattern has no meaning .*num_basis"),
        (lambda: RandbasisConfig(), UnknownMethodError, "method must be named"),
        (lambda: RandbasisConfig(method="lola"), UnknownMethodError, r"got 'lola'; did you mean .*nola"),
        (lambda: RandbasisConfig(method="vera", num_basis=3), HyperparameterError, "no option 'num_basis'"),
    ],
)  # fmt: skip
def test_options_that_one_method_does_not_take(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_every_error_is_one_of_ours_and_a_builtin():
    for error in (LawError, RankError, TargetError, SliceError, BaseMismatchError, AdapterFilesError):
        assert issubclass(error, RandbasisError)
        assert issubclass(error, ValueError)
    assert issubclass(LayerTypeError, TypeError)


# --- targets: refused before the first layer is replaced ---


class Odd(nn.Module):
    """A model with what cannot be adapted, beside a layer that can."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 24)
        self.first = nn.Linear(24, 24)
        self.conv1 = nn.Conv1d(24, 24, 1)
        self.norm1 = nn.LayerNorm(24)
        self.attention1 = nn.MultiheadAttention(24, 2)
        self.uneven = nn.Linear(24, 25)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)


def tiny_bare_gpt2() -> GPT2Model:
    return tiny_gpt2().transformer


def tiny_neox() -> GPTNeoXForCausalLM:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, vocab_size=64))


BAD_TARGETS = [
    (tiny_llama, ["q_porj"], TargetError, r"\['q_porj'\] not found in the base model: did you mean q_proj"),
    (tiny_llama, ["zzz"], TargetError, r"'zzz'.*not found.*there are: .*q_proj"),
    (tiny_llama, "q_proj", TargetError, "'q_proj' not found.*one regular expression for whole module names"),
    (tiny_llama, [], TargetError, "name at least one module"),
    (tiny_llama, ["qproj[q]"], TargetError, "did you mean q_proj"),
    (FusedBlock, None, TargetError, "specify `target_modules`.*'all-linear'"),
    (tiny_llama, ["q_proj", "embed_tokens"], LayerTypeError, "'model.embed_tokens', a Embedding, but only linear"),
    (tiny_llama, ["q_proj", "self_attn"], LayerTypeError, "'model.layers.0.self_attn', a LlamaAttention, but only"),
    (Odd, ["first", "conv1"], LayerTypeError, "'conv1', a Conv1d.*modules_to_save"),
    (Odd, ["first", "norm1"], LayerTypeError, "'norm1', a LayerNorm"),
    (Odd, ["first", "attention1"], LayerTypeError, "'attention1', a MultiheadAttention"),
    (Odd, ["first", "uneven[0/3]"], SliceError, "'0/3' of 'uneven' does not divide it: 25 rows are not 3 equal parts"),
    (Odd, ["first", "uneven[0/2]"], SliceError, "'0/2' of 'uneven' does not divide it: 25 rows are not 2 equal parts"),
    (Odd, ["first", "uneven[1/4]"], SliceError, "25 rows are not 4 equal parts"),
    (FusedBlock, ["head", "qkv[3/3]"], SliceError, "i/n with i < n"),
    (FusedBlock, ["head", "qkv[quary]"], SliceError, "'quary' of 'qkv' is unknown: did you mean .*query"),
    (FusedBlock, ["head", "qkv[0:73]"], SliceError, "0:73 of 'qkv' must lie in 0:72"),
    (FusedBlock, ["head", "qkv[9:9]"], SliceError, "9:9 of 'qkv' must lie in 0:72 and not be empty"),
    (
        FusedBlock,
        ["head", "qkv[0/3,0:10]"],
        SliceError,
        "parts of 'qkv' must not overlap, got .*=0:24.*=0:10|=0:10.*=0:24",
    ),
    (FusedBlock, ["head", "qkv[0/3,0:24]"], SliceError, "parts of 'qkv' must not overlap"),
    (tiny_neox, ["dense_h_to_4h", "query_key_value[q]"], SliceError, "interleaves query, key and value by head"),
]


@pytest.mark.parametrize("method", ONE_EACH)
@pytest.mark.parametrize(("build", "targets", "error", "message"), BAD_TARGETS)
def test_targets_that_cannot_be_adapted(build, targets, error, message, method):
    model, config = seeded(build), make_config(method, targets)
    before, options = snapshot(model), copy.deepcopy(config.to_dict())
    with pytest.raises(error, match=message):
        get_peft_model(model, config)
    assert snapshot(model) == before
    if targets:
        now = config.to_dict()
        assert {k: now[k] for k in ("target_modules", "target_slices", "r") if k in now} == {
            k: options[k] for k in ("target_modules", "target_slices", "r") if k in now
        }


@pytest.mark.parametrize("method", ONE_EACH)
@pytest.mark.parametrize(
    ("targets", "error"), [(["c_atn[q]"], TargetError), (["c_attn[x]"], SliceError), (["wte"], LayerTypeError)]
)
def test_a_second_adapter_that_is_refused(method, targets, error):
    model = Case("c_attn", method).adapted()
    before, expected = snapshot(model), outputs(model, SAVED.batch())
    with pytest.raises(error):
        model.add_adapter("second", make_config(method, targets))
    assert snapshot(model) == before
    assert list(model.peft_config) == ["default"]
    assert model.active_adapter == "default"
    assert torch.equal(outputs(model, SAVED.batch()), expected)


@needs_pair
def test_transformers_own_method_refuses_too():
    model = seeded(tiny_llama)
    before = snapshot(model)
    with pytest.raises(TargetError, match="did you mean q_proj"):
        model.add_adapter(make_config("nola", ["q_porj"]))
    assert snapshot(model) == before


@pytest.mark.parametrize("pattern", ["*", "q_proj(", "(?i)q", "[z-a]"])
@pytest.mark.parametrize("method", ONE_EACH)
def test_patterns_that_are_no_regular_expressions(method, pattern):
    for name, _ in OPTIONS[method][0].patterns:
        with pytest.raises(HyperparameterError, match=f"{name} must hold regular expressions .*backslash"):
            make_config(method, ["q_proj"], **{name: {pattern: 4}})
        with pytest.raises(HyperparameterError, match=f"{name} must map regular expressions"):
            make_config(method, ["q_proj"], **{name: [pattern]})


@pytest.mark.parametrize("method", ONE_EACH)
@pytest.mark.parametrize(
    ("build", "targets", "options", "message"),
    [
        (tiny_llama, ["q_proj"], {"layers_to_transform": 7}, r"layers_to_transform must .* got 7 .* are \[0, 1\]"),
        (tiny_llama, ["q_proj"], {"layers_to_transform": [1], "layers_pattern": "h"}, "with layers_pattern='h'"),
        (tiny_bare_gpt2, ["c_attn"], {"layers_to_transform": [0]}, "where a name stands before its list"),
        (tiny_llama, ["q_porj"], {"layers_to_transform": [0]}, "did you mean q_proj"),
    ],
)
def test_layers_that_are_not_there(build, targets, options, message, method):
    model = seeded(build)
    before = snapshot(model)
    with pytest.raises(TargetError, match=message):
        get_peft_model(model, make_config(method, targets, **options))
    assert snapshot(model) == before


@pytest.mark.parametrize("method", ONE_EACH)
def test_some_layers_that_are_not_there_are_named(method):
    config = make_config(method, ["q_proj"], layers_to_transform=[1, 5, 9])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(seeded(tiny_llama), config)
    (told,) = (str(one.message) for one in caught if one.category is UserWarning)
    assert re.search(r"layers_to_transform numbers \[5, 9\] match no target", told)


def test_a_pattern_with_a_rank_that_cannot_be():
    model = seeded(tiny_llama)
    before = snapshot(model)
    with pytest.raises(RankError, match="r must be a positive integer, got 0"):
        get_peft_model(model, make_config("nola", ["q_proj", "v_proj"], rank_pattern={"v_proj": 0}))
    assert snapshot(model) == before


# --- files: refused with the model as it was ---


@pytest.fixture
def folder(tmp_path):
    """A saved adapter, to be damaged."""
    SAVED.adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder, **changes) -> None:
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v != "REMOVED"}))


def edit_weights(folder, change) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def first_key(tensors) -> str:
    return min(name for name in tensors if "randbasis_meaning" not in name)


def cut_short(folder) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def no_weights(folder) -> None:
    (folder / "adapter_model.safetensors").unlink()


def set_nan(tensors) -> None:
    tensors[first_key(tensors)][1] = float("nan")


def set_infinite(tensors) -> None:
    tensors[first_key(tensors)][0] = float("inf")


def longer(tensors) -> None:
    tensors[first_key(tensors)] = torch.zeros(9)


def one_less(tensors) -> None:
    del tensors[first_key(tensors)]


def all_foreign(tensors) -> None:
    names = list(tensors)
    for name in names:
        tensors[name.replace("randbasis_nola_a_q", "lora_A").replace("randbasis_nola_b_q", "lora_B")] = tensors.pop(
            name
        )


def one_more(tensors) -> None:
    tensors["base_model.model.transformer.h.7.attn.c_attn.randbasis_nola_a_q.weight"] = torch.zeros(6)


DAMAGES = [
    (lambda f: edit_weights(f, set_nan), CoefficientValueError, "values that are not finite.*earlier checkpoint"),
    (lambda f: edit_weights(f, set_infinite), CoefficientValueError, "values that are not finite"),
    (lambda f: edit_weights(f, longer), CoefficientCountError, r"must have shape \[6\].*got \[9\]"),
    (lambda f: edit_config(f, num_basis=7), CoefficientCountError, r"must have shape \[7\].*got \[6\]"),
    (lambda f: edit_weights(f, one_less), AdapterFilesError, "must be complete, 1 are missing, the first is .*nola_a"),
    (lambda f: edit_weights(f, all_foreign), AdapterFilesError, "no method of randbasis writes, such as .*lora_"),
    (lambda f: edit_weights(f, one_more), BaseMismatchError, r"1 tensors for layers that this model does not.*h\.7\."),
    (no_weights, AdapterFilesError, "has no adapter_model.safetensors"),
    (cut_short, AdapterFilesError, "must be a whole safetensors file"),
    (lambda f: edit_config(f, colour="red"), HyperparameterError, "no option 'colour'.*newer version.*remove"),
    (lambda f: edit_config(f, method="lola"), UnknownMethodError, "'lola'; did you mean .*nola"),
    (lambda f: edit_config(f, law="gauss"), LawError, "'gauss'"),
    (lambda f: edit_config(f, r=0), RankError, "r must be a positive integer, got 0"),
    (lambda f: edit_config(f, target_slices={"c_attn": ["nope"]}), SliceError, "'nope' of .*c_attn' is unknown"),
]
DAMAGED = pytest.mark.parametrize(("damage", "error", "message"), DAMAGES, ids=[e.__name__ for _, e, _ in DAMAGES])


@DAMAGED
@pytest.mark.parametrize("low_memory", [False, True], ids=["usual", "low_cpu_mem_usage"])
def test_damaged_files(damage, error, message, low_memory, folder):
    damage(folder)
    base = SAVED.base()
    before = snapshot(base)
    with pytest.raises(error, match=message):
        PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_memory)
    assert snapshot(base) == before
    assert torch.equal(outputs(base, SAVED.batch()), outputs(SAVED.base(), SAVED.batch()))


@DAMAGED
def test_damaged_files_beside_another_adapter(damage, error, message, folder):
    damage(folder)
    model = SAVED.adapted(fill_seed=4)
    before, expected = snapshot(model), outputs(model, SAVED.batch())
    with pytest.raises(error, match=message):
        model.load_adapter(str(folder), "second")
    assert snapshot(model) == before
    assert list(model.peft_config) == ["default"]
    assert torch.equal(outputs(model, SAVED.batch()), expected)


@pytest.mark.parametrize("change", [set_nan, longer, one_less, one_more])
def test_a_damaged_checkpoint_leaves_the_adapter_that_was_there(change, folder):
    """As when training goes on from a checkpoint: the model and its adapter were there before."""
    edit_weights(folder, change)
    for model in (SAVED.adapted(fill_seed=4), PeftModel.from_pretrained(SAVED.base(), restored(folder))):
        model.eval()
        before = snapshot(model)
        with pytest.raises((CoefficientValueError, CoefficientCountError, AdapterFilesError, BaseMismatchError)):
            model.load_adapter(str(folder), "default", is_trainable=True)
        assert snapshot(model) == before
        with pytest.raises((CoefficientValueError, CoefficientCountError, AdapterFilesError, BaseMismatchError)):
            set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        assert snapshot(model) == before


def restored(folder):
    SAVED.adapted().save_pretrained(folder.parent / "whole")
    return folder.parent / "whole"


@pytest.mark.parametrize("method", OPTIONS)
def test_an_adapter_for_another_base_names_the_first_matrix_that_differs(method, tmp_path):
    model = get_peft_model(seeded(tiny_llama), make_config(method, ["q_proj", "v_proj", "down_proj"]))
    fill(model)
    model.save_pretrained(tmp_path)
    wider = seeded(tiny_llama, intermediate_size=56)
    before = snapshot(wider)
    with pytest.raises(BaseMismatchError, match=r"'model.layers.0.mlp.down_proj', 32×48 there and 32×56 here \(out×in"):
        PeftModel.from_pretrained(wider, tmp_path)
    assert snapshot(wider) == before
    with pytest.raises(BaseMismatchError, match="down_proj"):
        wider.load_adapter(str(tmp_path))
    assert snapshot(wider) == before
    more_heads = seeded(tiny_llama, num_key_value_heads=4)
    with pytest.raises(BaseMismatchError, match=r"'model.layers.0.self_attn.v_proj', 16×32 there and 32×32 here"):
        PeftModel.from_pretrained(more_heads, tmp_path)


@pytest.mark.parametrize("layers", [1, 3])
def test_an_adapter_for_a_model_of_another_depth(layers, tmp_path):
    SAVED.adapted().save_pretrained(tmp_path)
    base = seeded(tiny_gpt2, n_layer=layers)
    before = snapshot(base)
    with pytest.raises((AdapterFilesError, BaseMismatchError), match=r"h\.[12]\."):
        PeftModel.from_pretrained(base, tmp_path)
    assert snapshot(base) == before


def test_folders_without_an_adapter(tmp_path):
    base = SAVED.base()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftModel.from_pretrained(base, tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "RANDBASIS", "r": 4}')
    with pytest.raises(UnknownMethodError, match="method must be named"):
        PeftModel.from_pretrained(base, tmp_path)
    assert snapshot(base) == before


def test_a_real_model_with_the_adapter_of_another(data_dir, tmp_path):
    small, large = (AutoModelForCausalLM.from_pretrained(data_dir / name) for name in
                    ("llama_stories260k", "llama_babyllama105"))  # fmt: skip
    model = get_peft_model(small, make_config("nola", ["q_proj", "v_proj"]))
    model.save_pretrained(tmp_path)
    before = snapshot(large)
    message = "'model.layers.0.self_attn.q_proj', 64×64 there and 128×128 here.*load it on .*llama_stories260k"
    with pytest.raises(BaseMismatchError, match=message):
        PeftModel.from_pretrained(large, tmp_path)
    assert snapshot(large) == before


def test_a_config_without_its_folder_can_be_used_again(folder):
    """The folder is looked at when a model is loaded from it, not ever after."""
    model = PeftModel.from_pretrained(SAVED.base(), folder)
    again = RandbasisConfig.from_pretrained(folder)
    shutil.rmtree(folder)
    model.add_adapter("second", model.peft_config["default"])
    assert coefficients_of(model, "second")
    with pytest.raises(AdapterFilesError, match="is nothing"):
        get_peft_model(SAVED.base(), again)

"""`save_pretrained` and `PeftModel.from_pretrained`: coefficients and a configuration, and a model that is equal."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, GPT2Model
from tuner_cases import (
    CASES,
    ONE_EACH,
    OPTIONS,
    Case,
    FusedBlock,
    adapted_layers,
    bits,
    coefficients_of,
    fill,
    make_config,
    outputs,
    seeded,
    tiny_gpt2,
    tiny_llama,
    token_batch,
    vector_batch,
)

from randbasis import NolaConfig, RandbasisConfig


def tiny_classifier() -> BertForSequenceClassification:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=64, num_labels=3))


@pytest.mark.parametrize("case", CASES)
def test_the_file_holds_the_coefficients_and_nothing_else(case, tmp_path):
    model = case.adapted()
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} - {"README.md"} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    stored = load_file(tmp_path / "adapter_model.safetensors")
    expected = {name.replace(".default", ""): p.detach() for name, p in coefficients_of(model).items()}
    (meaning,) = (name for name in stored if name.endswith("randbasis_meaning.weight"))
    assert stored.pop(meaning).shape == (160,)
    if case.method == "nola-own-basis":
        streams = {name for name in stored if name.endswith("randbasis_streams.weight")}
        assert len(streams) == len(adapted_layers(model))
        assert all(stored.pop(name).dtype == torch.int64 for name in streams)
    assert bits(stored) == bits(expected)


@pytest.mark.parametrize("case", CASES)
def test_the_file_is_as_small_as_its_coefficients(case, tmp_path):
    model = case.adapted()
    model.save_pretrained(tmp_path)
    count = model.get_nb_trainable_parameters()[0]
    tensors = len(load_file(tmp_path / "adapter_model.safetensors"))
    beside = 160 + (8 * 3 * 2 * len(adapted_layers(model)) if case.method == "nola-own-basis" else 0)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= 4 * count + beside + 160 * tensors + 64
    assert (tmp_path / "adapter_config.json").stat().st_size < 4096


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("low_memory", [False, True], ids=["usual", "low_cpu_mem_usage"])
def test_reload_is_exact(case, low_memory, tmp_path):
    model = case.adapted()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(case.base(), tmp_path, low_cpu_mem_usage=low_memory).eval()
    assert bits(coefficients_of(again)) == bits(coefficients_of(model))
    assert torch.equal(outputs(again, case.batch()), outputs(model, case.batch()))
    assert not any(tensor.is_meta for tensor in again.state_dict().values())
    for name, layer in adapted_layers(again).items():
        assert torch.equal(layer.get_delta_weight("default"), adapted_layers(model)[name].get_delta_weight("default"))


@pytest.mark.parametrize("case", CASES)
def test_config_survives_the_file(case, tmp_path):
    model = case.adapted(seed=2**64 - 1, dropout=0.25)
    model.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is OPTIONS[case.method][0]
    written_by_peft = ("inference_mode", "auto_mapping")
    mine, theirs = (
        {k: sorted(v) if isinstance(v, set | list) else v for k, v in config.to_dict().items()}
        for config in (model.peft_config["default"], again)
    )
    assert all(mine[k] == theirs[k] for k in mine.keys() | theirs.keys() if k not in written_by_peft)
    assert again.method_for("x") == model.peft_config["default"].method_for("x")


@pytest.mark.parametrize("method", OPTIONS)
def test_saving_twice_gives_the_same_bytes(method, tmp_path):
    case = Case("c_attn", method)
    for folder in ("first", "second"):
        case.adapted().save_pretrained(tmp_path / folder)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.parametrize("method", OPTIONS)
def test_the_name_of_the_adapter_is_not_in_the_file(method, tmp_path):
    case = Case("c_attn", method)
    model = case.adapted()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(case.base(), tmp_path, adapter_name="weight").eval()
    assert torch.equal(outputs(again, case.batch()), outputs(model, case.batch()))


@pytest.mark.parametrize("method", OPTIONS)
def test_a_second_adapter_is_loaded_beside_the_first(method, tmp_path):
    case = Case("qkv_proj", method)
    model = case.adapted()
    model.save_pretrained(tmp_path)
    other = case.adapted(fill_seed=2, seed=12)
    expected = outputs(other, case.batch())
    other.load_adapter(str(tmp_path), "loaded")
    other.eval()
    assert torch.equal(outputs(other, case.batch()), expected)
    other.set_adapter("loaded")
    assert torch.equal(outputs(other, case.batch()), outputs(model, case.batch()))


@pytest.mark.parametrize("method", OPTIONS)
def test_state_dict_functions_are_inverse(method):
    case = Case("c_attn", method)
    source, target = case.adapted(), case.adapted(fill_seed=3)
    result = set_peft_model_state_dict(target, get_peft_model_state_dict(source))
    assert not result.unexpected_keys
    assert torch.equal(outputs(target, case.batch()), outputs(source, case.batch()))


_FRESH = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from peft import PeftModel
from tuner_cases import Case, outputs
torch.manual_seed(12345)
for folder in sorted(Path(sys.argv[2]).iterdir()):
    place, _, method = folder.name.partition("+")
    case = Case(place, method)
    model = PeftModel.from_pretrained(case.base(), folder).eval()
    assert torch.equal(outputs(model, case.batch()), torch.load(folder / "expected.pt")), folder.name
print("equal")
"""


def test_reload_in_a_fresh_process_is_exact(tmp_path, request, console_environment):
    """Nothing but the file and the base weights is needed: no cache, no generator, no earlier layer."""
    for place in ("linear", "c_attn", "in_proj"):
        for method in OPTIONS:
            case, folder = Case(place, method), tmp_path / f"{place}+{method}"
            model = case.adapted()
            model.save_pretrained(folder)
            torch.save(outputs(model, case.batch()), folder / "expected.pt")
    command = [sys.executable, "-W", "ignore", "-c", _FRESH, str(request.path.parent.parent / "support"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=console_environment, check=False)
    assert result.stdout.endswith("equal\n"), result.stderr[-3000:]


@pytest.mark.parametrize("method", OPTIONS)
def test_modules_to_save_are_saved_whole(method, tmp_path):
    batch = token_batch()
    config = make_config(method, ["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    model = get_peft_model(seeded(tiny_classifier), config)
    fill(model)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(1.0)
    model.eval().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {n for n in stored if "classifier" in n} == {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }
    again = PeftModel.from_pretrained(seeded(tiny_classifier), tmp_path).eval()
    assert torch.equal(outputs(again, batch), outputs(model, batch))
    with model.disable_adapter():
        assert torch.equal(outputs(model, batch), outputs(seeded(tiny_classifier), batch))


def test_the_head_of_a_classification_task_is_saved_without_asking(tmp_path):
    model = get_peft_model(seeded(tiny_classifier), make_config("vera", ["query"], task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    assert "base_model.model.classifier.weight" in load_file(tmp_path / "adapter_model.safetensors")


# --- a basis of one matrix: its stream is stored, and what is stored wins over the path ---


class Renamed(nn.Module):
    """The same model under another path."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = FusedBlock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(x)


@pytest.mark.parametrize("method", ["nola-own-basis", "pranc"])
def test_stored_streams_win_over_a_new_path(method, tmp_path):
    case = Case("in_proj", method)
    model = case.adapted(share_basis=False)
    model.save_pretrained(tmp_path)
    moved = PeftModel.from_pretrained(seeded(Renamed), tmp_path, key_mapping={"^(qkv|in_proj)": r"outer.\1"}).eval()
    assert torch.equal(outputs(moved, vector_batch()), outputs(model, vector_batch()))
    renamed = {
        key.replace("base_model.model.", "base_model.model.outer."): value
        for key, value in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    derived = get_peft_model(seeded(Renamed), case.config(share_basis=False))
    own = {name: layer.matrices("default")[0].bound.site.streams for name, layer in adapted_layers(derived).items()}
    set_peft_model_state_dict(derived, renamed)
    now = {name: layer.matrices("default")[0].bound.site.streams for name, layer in adapted_layers(derived).items()}
    assert all(own[name] != now[name] for name in own)
    assert torch.equal(outputs(derived.eval(), vector_batch()), outputs(model, vector_batch()))


def test_stored_streams_survive_another_auto_class(tmp_path):
    """Saved from a model with a head, loaded into the one without: module paths differ by a prefix."""
    base = seeded(tiny_gpt2)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, make_config("nola-own-basis", ["c_attn[q,v]"]))
    fill(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    bare = GPT2Model.from_pretrained(tmp_path / "base")
    moved = get_peft_model(bare, make_config("nola-own-basis", ["c_attn[q,v]"])).eval()
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    set_peft_model_state_dict(moved, {key.replace(".transformer.", "."): value for key, value in stored.items()})
    expected = model(**token_batch(), output_hidden_states=True).hidden_states[-1]
    assert torch.equal(moved(**token_batch()).last_hidden_state, expected)


@pytest.mark.parametrize("low_memory", [False, True], ids=["usual", "low_cpu_mem_usage"])
def test_streams_in_the_file_are_integers_that_are_obeyed(low_memory, tmp_path):
    """Another path's streams, written into the file by hand, give another path's ΔW."""
    from safetensors.torch import save_file

    case = Case("linear", "nola-own-basis")
    model = case.adapted()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    stored = load_file(file)
    streams = sorted(name for name in stored if name.endswith("randbasis_streams.weight"))
    swapped = [stored[name].clone() for name in (streams[1], streams[0])]
    first = dict(stored.items()) | dict(zip(streams[:2], swapped, strict=True))
    save_file(first, file)
    again = PeftModel.from_pretrained(case.base(), tmp_path, low_cpu_mem_usage=low_memory).eval()
    layers = adapted_layers(again)
    values = [layers[name.removesuffix(".randbasis_streams.weight")].matrices("default")[0] for name in streams[:2]]
    assert [one.bound.site.streams for one in values] == [tuple(t[0].tolist()) for t in swapped]
    assert not torch.allclose(outputs(again, case.batch()), outputs(model, case.batch()), atol=1e-3)


def test_a_shared_basis_stores_no_stream(tmp_path):
    Case("linear", "nola").adapted().save_pretrained(tmp_path)
    assert not [n for n in load_file(tmp_path / "adapter_model.safetensors") if "stream" in n]


# --- copies ---


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_equal_and_independent(method, copied):
    case = Case("c_attn", method)
    model = case.adapted()
    expected = outputs(model, case.batch())  # fills the cache of factors
    twin = copied(model)
    assert torch.equal(outputs(twin, case.batch()), expected)
    fill(twin, seed=9)
    assert not torch.allclose(outputs(twin, case.batch()), expected, atol=1e-3)
    assert torch.equal(outputs(model, case.batch()), expected)
    twin.unload()
    assert torch.equal(outputs(model, case.batch()), expected)


@pytest.mark.parametrize("method", ONE_EACH)
def test_a_checkpoint_of_the_whole_model_reloads(method, tmp_path):
    case = Case("linear", method)
    model, other = case.adapted(), case.adapted(fill_seed=5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(outputs(other, case.batch()), outputs(model, case.batch()))


# --- configurations ---


def test_a_saved_configuration_is_plain_json(tmp_path):
    make_config("nola", ["c_attn[q,v]", "c_fc"]).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["peft_type"] == "RANDBASIS"
    assert content["method"] == "nola"
    assert content["seed"] == 11
    assert content["target_slices"] == {"c_attn": ["q", "v"]}
    assert sorted(content["target_modules"]) == ["c_attn", "c_fc"]
    again = RandbasisConfig.from_pretrained(tmp_path)
    assert isinstance(again, NolaConfig)
    assert NolaConfig.from_pretrained(tmp_path) == again


@pytest.mark.parametrize("method", OPTIONS)
def test_a_saved_configuration_names_the_package_that_reads_it(method, tmp_path):
    """Where nobody imports it, PEFT has but a key to complain of."""
    Case("linear", method).adapted().save_pretrained(tmp_path)
    assert "import randbasis" in json.loads((tmp_path / "adapter_config.json").read_text())["requires"]
    code = "import sys; from peft import PeftConfig; PeftConfig.from_pretrained(sys.argv[1])"
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "KeyError: 'RANDBASIS'" in result.stderr


def test_shapes_of_the_base_are_recorded_by_pattern(tmp_path):
    model = get_peft_model(seeded(tiny_gpt2), make_config("nola", ["c_attn[q]", "mlp.c_proj"]))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_shapes"] == {
        "transformer.h.*.attn.c_attn": [96, 32],
        "transformer.h.*.mlp.c_proj": [32, 128],
    }


def test_a_real_pretrained_model_reloads_exactly(data_dir, tmp_path):
    folder = data_dir / "llama_stories260k"
    batch = {"input_ids": torch.arange(3, 35).view(2, 16)}
    for method in OPTIONS:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), make_config(method, "all-linear"))
        fill(model, size=0.05)
        model.eval().save_pretrained(tmp_path / method)
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / method).eval()
        assert torch.equal(outputs(again, batch), outputs(model, batch))
        merged = model.merge_and_unload()
        torch.testing.assert_close(outputs(merged, batch), outputs(again, batch), rtol=1e-3, atol=1e-3)


def test_the_card_names_the_package_once(tmp_path):
    model = get_peft_model(seeded(tiny_llama), make_config("nola", ["q_proj"]))
    for _ in range(2):
        model.save_pretrained(str(tmp_path))
        assert (tmp_path / "README.md").read_text().count("import randbasis") == 1
    (tmp_path / "README.md").write_text("mine")
    model.peft_config["default"].save_pretrained(str(tmp_path))
    assert (tmp_path / "README.md").read_text() == "mine"

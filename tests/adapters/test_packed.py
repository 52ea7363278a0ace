"""PEFT directory ↔ packed file ↔ model: lossless at the stored precision, and a refusal leaves everything as it was."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification
from tuner_cases import (
    CASES,
    ONE_EACH,
    OPTIONS,
    Case,
    add_adapter,
    bits,
    fill,
    make_config,
    outputs,
    seeded,
    snapshot,
    tiny_llama,
    token_batch,
)

from benchmarks.packed_sizes import SIZES, Size
from randbasis import NolaConfig
from randbasis.adapter_file import PackedAdapter, read
from randbasis.adapters.packed import pack_adapter, unpack_adapter
from randbasis.adapters.putting import load_packed
from randbasis.errors import (
    AdapterFilesError,
    BaseMismatchError,
    CoefficientCountError,
    CoefficientValueError,
    DigestError,
    OutputExistsError,
    PrecisionError,
    SpecValueError,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LOWER = [(16, 0), (8, 0), (4, 0), (3, 5), (2, 0)]


def saved(case: Case, path: Path, **options) -> Path:
    case.adapted(**options).save_pretrained(path)
    return path


def config_of(path: Path) -> dict:
    found = json.loads((path / CONFIG).read_text())
    return {key: sorted(value) if key == "target_modules" else value for key, value in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_a_file_of_32_bits_gives_the_directory_back(case, tmp_path):
    source = saved(case, tmp_path / "source", dropout=0.25)
    pack_adapter(source, tmp_path / "file", bits=32)
    unpack_adapter(tmp_path / "file", tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
    assert config_of(tmp_path / "again") == config_of(source)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("precision", "group"), LOWER)
def test_what_a_file_was_unpacked_to_packs_into_the_same_bytes(case, precision, group, tmp_path):
    source = saved(case, tmp_path / "source")
    pack_adapter(source, tmp_path / "file", bits=precision, group=group)
    unpack_adapter(tmp_path / "file", tmp_path / "again")
    pack_adapter(tmp_path / "again", tmp_path / "second", bits=precision, group=group)
    assert (tmp_path / "second").read_bytes() == (tmp_path / "file").read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_a_packed_file_loads_into_a_model(case, tmp_path):
    model = case.adapted()
    model.save_pretrained(tmp_path / "source")
    found = pack_adapter(tmp_path / "source", tmp_path / "file", bits=32)
    again = load_packed(case.base(), tmp_path / "file").eval()
    assert torch.equal(outputs(again, case.batch()), outputs(model, case.batch()))
    planned = {one.name: one.method for one in found.contents.spec.matrices}
    assert all(again.peft_config["default"].method_for(name) == method for name, method in planned.items())


@pytest.mark.parametrize("method", [name for name, (kind, _) in OPTIONS.items() if not kind.method_cls.needs_base])
def test_a_matrix_of_the_file_is_what_its_layer_computes_with(method, tmp_path):
    """The spec alone, without PEFT and without a model, gives every ΔW."""
    case = Case("qkv_proj", method)
    model = case.adapted()
    model.save_pretrained(tmp_path / "source")
    adapter = PackedAdapter.from_contents(pack_adapter(tmp_path / "source", tmp_path / "file", bits=32).contents)
    for one, delta in adapter.matrices():
        layer = model.base_model.model.get_submodule(one.name)
        wanted = layer.get_delta_weight("default")[one.start : one.start + one.rows]
        torch.testing.assert_close(delta.matrix(), wanted, rtol=1e-5, atol=1e-6)


def test_quantized_coefficients_stay_near(tmp_path):
    source = saved(Case("linear", "nola"), tmp_path / "source")
    exact = PackedAdapter.from_contents(pack_adapter(source, tmp_path / "32", bits=32).contents).values()
    errors = [
        float(
            (PackedAdapter.from_contents(pack_adapter(source, tmp_path / f"{b}", bits=b).contents).values() - exact)
            .abs()
            .max()
        )
        for b in (16, 8, 4, 3, 2)
    ]
    assert errors == sorted(errors)
    assert errors[0] < 1e-3
    assert errors[1] <= float(exact.abs().max()) / 127 / 2 * 1.001


def test_half_precision_stays_what_it_is(tmp_path):
    source = saved(Case("linear", "vera"), tmp_path / "source")
    for dtype in (torch.bfloat16, torch.float16):
        save_file(
            {name: t.to(dtype) if t.is_floating_point() else t for name, t in load_file(source / WEIGHTS).items()},
            source / WEIGHTS,
            {"format": "pt"},
        )
        for precision in (32, 16):
            file = tmp_path / f"{dtype}-{precision}"
            assert (
                PackedAdapter.from_contents(pack_adapter(source, file, bits=precision).contents).coefficients.dtype
                == dtype
            )
            unpack_adapter(file, tmp_path / "again", overwrite=True)
            assert (tmp_path / "again" / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()


def test_bfloat16_on_request(tmp_path):
    source = saved(Case("linear", "vera"), tmp_path / "source")
    assert (
        PackedAdapter.from_contents(pack_adapter(source, tmp_path / "a", bfloat16=True).contents).coefficients.dtype
        == torch.bfloat16
    )
    with pytest.raises(PrecisionError, match="bits=4"):
        pack_adapter(source, tmp_path / "b", bits=4, bfloat16=True)


def tiny_classifier(labels: int = 3) -> BertForSequenceClassification:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=64, num_labels=labels))


def classifier(path: Path, **options) -> Path:
    """A trained classifier with its head beside the adapter, packed to `path / "file"`."""
    model = get_peft_model(seeded(tiny_classifier), make_config("nola", ["query"], task_type="SEQ_CLS", **options))
    fill(model)
    model.save_pretrained(path / "source")
    pack_adapter(path / "source", path / "file", bits=32)
    return path / "file"


def test_a_head_travels_with_the_adapter(tmp_path):
    file = classifier(tmp_path)
    assert read(file).spec.extra == ("base_model.model.classifier.bias", "base_model.model.classifier.weight")
    unpack_adapter(file, tmp_path / "again")
    assert bits(load_file(tmp_path / "again" / WEIGHTS)) == bits(load_file(tmp_path / "source" / WEIGHTS))
    head = load_file(tmp_path / "source" / WEIGHTS)["base_model.model.classifier.weight"]
    model = load_packed(seeded(tiny_classifier), file)
    assert torch.equal(model.base_model.model.classifier.modules_to_save["default"].weight, head)


def test_patterns_of_ranks_stand_in_the_file(tmp_path):
    case = Case("linear", "nola")
    model = get_peft_model(case.base(), case.config(rank_pattern={"v_proj": 2}, alpha_pattern={r"layers\.1\..*": 3}))
    fill(model)
    model.save_pretrained(tmp_path / "source")
    adapter = PackedAdapter.from_contents(pack_adapter(tmp_path / "source", tmp_path / "file", bits=32).contents)
    config = model.peft_config["default"]
    assert all(one.method == config.method_for(one.name) for one in adapter.spec.matrices)
    assert len({one.method for one in adapter.spec.matrices}) == 4
    unpack_adapter(tmp_path / "file", tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(tmp_path / "source")


def test_a_path_of_this_machine_is_not_written(tmp_path):
    source = saved(Case("linear", "nola"), tmp_path / "source")
    config = json.loads((source / CONFIG).read_text()) | {"base_model_name_or_path": "/home/me/models/tiny"}
    (source / CONFIG).write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="names the base model 'tiny' and not '/home/me"):
        found = pack_adapter(source, tmp_path / "file")
    assert found.contents.spec.base.name == "tiny"
    assert b"/home" not in (tmp_path / "file").read_bytes()
    assert pack_adapter(source, tmp_path / "b", base_name="acme/tiny").contents.spec.base.name == "acme/tiny"
    unpack_adapter(tmp_path / "file", tmp_path / "again", base_name="/elsewhere/tiny")
    assert config_of(tmp_path / "again")["base_model_name_or_path"] == "/elsewhere/tiny"


# --- what is refused ---


def test_directories_that_do_not_fit_are_refused(tmp_path):
    source = saved(Case("linear", "nola"), tmp_path / "source")
    good = load_file(source / WEIGHTS)
    name = next(iter(good))
    changes = [
        ({name: good[name][:-1]}, CoefficientCountError),
        ({name: good[name] * float("nan")}, CoefficientValueError),
        ({name: good[name].half()}, AdapterFilesError),
        ({name: good[name].double()}, AdapterFilesError),
        ({name.replace("nola_a", "nola_c"): good[name].clone()}, AdapterFilesError),
        ({name: None}, AdapterFilesError),
    ]
    for change, error in changes:
        tensors = {key: tensor for key, tensor in (good | change).items() if tensor is not None}
        save_file(tensors, source / WEIGHTS, {"format": "pt"})
        with pytest.raises(error):
            pack_adapter(source, tmp_path / "file")
        assert not (tmp_path / "file").exists()


def test_outputs_that_exist_are_kept(tmp_path):
    source = saved(Case("linear", "nola"), tmp_path / "source")
    pack_adapter(source, tmp_path / "file", bits=32)
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    with pytest.raises(OutputExistsError):
        unpack_adapter(tmp_path / "file", source)
    with pytest.raises(OutputExistsError):
        pack_adapter(source, tmp_path / "file")
    (source / "notes.txt").write_text("mine")
    unpack_adapter(tmp_path / "file", source, overwrite=True)
    after = {file.name: file.read_bytes() for file in source.iterdir()}
    assert after.pop("notes.txt") == b"mine"
    assert after.keys() == before.keys() - {"README.md"}  # PEFT's form of a card, which tells of the one before
    assert after[WEIGHTS] == before[WEIGHTS]


def resealed(file: Path, target: Path, **peft) -> Path:
    adapter = read(file)
    replace(adapter, spec=replace(adapter.spec, peft={**adapter.spec.peft, **peft})).write(target)
    return target


@pytest.mark.parametrize(
    "peft",
    [
        {"rank_pattern": {"q_proj": 2}},
        {"rank_pattern": {"(": 2}},
        {"seed": 5},
        {"layers_to_transform": 3, "target_modules": "x"},
        {"no_option": 1},
        {"target_modules": 5},
        {"target_slices": 5},
    ],
)
def test_options_that_contradict_the_spec_are_refused(peft, tmp_path):
    saved(Case("linear", "nola"), tmp_path / "source")
    pack_adapter(tmp_path / "source", tmp_path / "file")
    resealed(tmp_path / "file", tmp_path / "other", **peft)
    with pytest.raises(ValueError, match="other: ") as caught:
        unpack_adapter(tmp_path / "other", tmp_path / "out")
    assert type(caught.value).__module__ == SpecValueError.__module__
    assert not (tmp_path / "out").exists()


def test_a_refused_load_leaves_the_base_as_it_was(tmp_path):
    saved(Case("linear", "nola"), tmp_path / "source")
    file = tmp_path / "file"
    pack_adapter(tmp_path / "source", file)
    (tmp_path / "damaged").write_bytes(file.read_bytes()[:-1] + b"\x7f")
    wide = seeded(tiny_llama, intermediate_size=56)
    gpt2 = Case("conv1d", "nola").base()
    for base, path, error, message in (
        (
            wide,
            file,
            BaseMismatchError,
            r"2 of 6 layers differ .*layers\.0\.mlp\.down_proj is 32×48 there and 32×56 here",
        ),
        (gpt2, file, BaseMismatchError, r"'llama', this one is a 'gpt2'"),
        (seeded(tiny_llama), tmp_path / "damaged", DigestError, "damaged"),
    ):
        before = snapshot(base)
        with pytest.raises(error, match=message):
            load_packed(base, path)
        assert snapshot(base) == before


@pytest.mark.parametrize("method", ONE_EACH)
def test_a_refused_load_leaves_the_other_adapters_as_they_were(method, tmp_path):
    saved(Case("linear", method), tmp_path / "source")
    pack_adapter(tmp_path / "source", tmp_path / "file")
    model = get_peft_model(seeded(tiny_llama, intermediate_size=56), make_config("nola", ["q_proj"]))
    add_adapter(model, "second", make_config("vera", ["q_proj"]), 2)
    before, expected = snapshot(model), outputs(model, token_batch())
    with pytest.raises(BaseMismatchError):
        load_packed(model, tmp_path / "file", "third")
    assert snapshot(model) == before
    assert set(model.peft_config) == {"default", "second"}
    assert torch.equal(outputs(model, token_batch()), expected)


def test_a_second_packed_adapter_goes_beside_the_first(tmp_path):
    case = Case("linear", "vera")
    model = case.adapted()
    model.save_pretrained(tmp_path / "source")
    pack_adapter(tmp_path / "source", tmp_path / "file", bits=32)
    other = Case("linear", "nola").adapted()
    load_packed(other, tmp_path / "file", "packed")
    other.set_adapter("packed")
    assert torch.equal(outputs(other.eval(), case.batch()), outputs(model, case.batch()))


def test_a_head_of_another_size_is_refused(tmp_path):
    file = classifier(tmp_path)
    base = seeded(tiny_classifier, 5)
    before = snapshot(base)
    with pytest.raises(BaseMismatchError, match=r"'classifier.bias' of shape \[3\].*got shape \[5\]"):
        load_packed(base, file)
    assert snapshot(base) == before


# --- sizes ---


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_sizes_of_the_format_page(size: Size, tmp_path):
    """The coefficients of math §4 and a header below 2 KB, for the published shapes on the meta device."""
    size.write_directory(tmp_path / "source")
    counts = {"Llama-2-7b": 57_344, "Llama-2-13b": 143_360, "Llama-2-70b": 573_440}
    for precision, limits in ((16, (117_000, 1_152_000)), (4, (31_000, 289_000))):
        found = pack_adapter(tmp_path / "source", tmp_path / f"{precision}", bits=precision)
        assert found.contents.spec.count == counts[size.name] == size.coefficients
        assert found.bytes <= size.limit(precision)
        scales = 4 * found.contents.spec.run_count if precision == 4 else 0
        limit = dict(zip(("Llama-2-7b", "Llama-2-70b"), limits, strict=True)).get(size.name)
        assert limit is None or found.bytes - scales <= limit
    unpack_adapter(tmp_path / "4", tmp_path / "again")
    pack_adapter(tmp_path / "again", tmp_path / "second", bits=4)
    assert (tmp_path / "second").read_bytes() == (tmp_path / "4").read_bytes()


def test_the_base_that_an_adapter_was_made_for_is_saved_with_it(tmp_path):
    config = config_of(saved(Case("qkv_proj", "nola"), tmp_path))
    assert config["base_model_type"] == "phi3"
    assert config["base_rows"]["model.layers.*.self_attn.qkv_proj[v]"] == [48, 64]
    assert NolaConfig().to_dict()["base_rows"] is None

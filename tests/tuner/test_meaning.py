"""What coefficients mean travels with them: on every way into a model, those of another adapter are refused."""

import copy
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from tuner_cases import (
    ONE_EACH,
    OPTIONS,
    PLACES,
    Case,
    adapted_layers,
    bits,
    coefficients_of,
    fill,
    make_config,
    needs_pair,
    outputs,
    seeded,
    snapshot,
    tiny_llama,
)

from randbasis import METHODS, Nola, RandbasisConfig, RandLora, Vera
from randbasis.adapter_file import SpecMatrix
from randbasis.adapters.inspection import inspect_adapter
from randbasis.adapters.packed import pack_adapter, unpack_adapter
from randbasis.adapters.putting import load_packed
from randbasis.errors import AdapterFilesError, BaseMismatchError, MeaningError, StreamValueError
from randbasis.tuner.meaning import WIDTH, meaning_of

WEIGHTS = "adapter_model.safetensors"
PLACED = [pytest.param(Case(place, method), id=f"{place}-{method}") for place in PLACES for method in ONE_EACH]
#: Options that change ΔW and no shape of a coefficient, by method; the seed changes it for all of them.
OTHERWISE: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    *((method, {"seed": 42}, {"seed": 7}, "seed 42 there and 7 here") for method in OPTIONS),
    *((method, {"law": "uniform"}, {"law": "normal"}, "law 'uniform' there and 'normal' here") for method in OPTIONS),
    *((one, {"quantize_coefficients": 4}, {}, "quantize_coefficients 4 there and None here") for one in OPTIONS),
    ("nola", {"alpha": 4.0}, {"alpha": 8.5}, "alpha 4 there and 8.5 here"),
    ("nola", {"r": 3}, {"r": 4}, "r 3 there and 4 here"),
    ("nola", {}, {"parametrization": "plain"}, "parametrization 'offset' there and 'plain' here"),
    ("nola", {"rank_pattern": {r".*0.*q_proj": 2}}, {"rank_pattern": {r".*1.*q_proj": 2}}, "options of single layers"),
    ("nola", {"alpha_pattern": {"q_proj": 2.0}}, {}, "options of single layers"),
    ("randlora", {"scaling": "hf", "alpha": 3.0}, {"scaling": "hf"}, "alpha 3 there and 100 here"),
    ("randlora", {"scaling": "hf"}, {"scaling": "paper"}, "scaling 'hf' there and 'paper' here"),
    ("randlora", {"scaling": "hf", "alpha_pattern": {"q_proj": 2.0}}, {"scaling": "hf"}, "options of single layers"),
]
DIFFERENT = pytest.mark.parametrize(("method", "there", "here", "named"), OTHERWISE)


def two(method: str, there: dict[str, Any], here: dict[str, Any]) -> tuple[PeftModel, PeftModel]:
    case = Case("linear", method)
    return case.adapted(**there), case.adapted(fill_seed=2, **here)


def refused(model: nn.Module, load: Any, named: str = "seed 42 there and 7 here") -> None:
    """Refused with both values, and the model is as it was."""
    before = snapshot(model)
    with pytest.raises(MeaningError, match=named):
        load()
    assert snapshot(model) == before


# --- each way in ---


@DIFFERENT
def test_load_adapter_over_a_name(method, there, here, named, tmp_path):
    source, target = two(method, there, here)
    source.save_pretrained(tmp_path)
    refused(target, lambda: target.load_adapter(str(tmp_path), "default"), named)


@DIFFERENT
def test_state_dict_of_torch(method, there, here, named):
    source, target = two(method, there, here)
    for strict in (True, False):
        refused(target, lambda strict=strict: target.load_state_dict(source.state_dict(), strict=strict), named)


@pytest.mark.parametrize("case", PLACED)
def test_every_way_of_peft_and_torch(case, tmp_path):
    source, target = case.adapted(seed=42), case.adapted(seed=7, fill_seed=2)
    source.save_pretrained(tmp_path)
    refused(target, lambda: target.load_adapter(str(tmp_path), "default"))
    refused(target, lambda: target.load_adapter(str(tmp_path), "default", low_cpu_mem_usage=True))
    refused(target, lambda: set_peft_model_state_dict(target, get_peft_model_state_dict(source)))
    refused(target, lambda: target.load_state_dict(source.state_dict()))
    refused(target, lambda: target.load_state_dict(source.state_dict(), assign=True))
    refused(target, lambda: target.base_model.load_state_dict(source.base_model.state_dict(), strict=False))
    wrapped, theirs = nn.Sequential(nn.Identity(), target), nn.Sequential(nn.Identity(), source)
    refused(wrapped, lambda: wrapped.load_state_dict(theirs.state_dict()))


@pytest.mark.parametrize("method", ONE_EACH)
def test_all_adapters_are_compared_before_the_first_is_written(method):
    """The second adapter is refused, and the first, which would fit, has kept its coefficients too."""
    case = Case("linear", method)
    models = [case.adapted(fill_seed=seed) for seed in (1, 2)]
    for model, seed in zip(models, (42, 7), strict=True):
        model.add_adapter("late", make_config(method, ["down_proj"], seed=seed))
    refused(models[1], lambda: models[1].load_state_dict(models[0].state_dict()))


@pytest.mark.parametrize("method", ONE_EACH)
def test_the_trainer_resumes_no_other_adapter(method, tmp_path):
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 4

    def trainer(seed: int) -> Trainer:
        model = get_peft_model(seeded(tiny_llama), make_config(method, ["q_proj"], seed=seed, task_type="CAUSAL_LM"))
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=2,
            save_steps=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_only_model=False,
        )
        return Trainer(model, arguments, train_dataset=rows)

    trainer(42).train()
    other = trainer(7)
    checkpoint = str(tmp_path / "checkpoint-1")
    refused(other.model, lambda: other.train(resume_from_checkpoint=checkpoint))
    other.state.best_model_checkpoint = checkpoint
    refused(other.model, other._load_best_model)
    trainer(42).train(resume_from_checkpoint=checkpoint)


@needs_pair
@pytest.mark.parametrize("case", [one for one in PLACED if "in_proj" not in one.id])
def test_the_loader_of_transformers(case, tmp_path):
    """Its configuration says one seed and its tensors another: the model is as it was, without the adapter."""
    case.adapted(seed=42).save_pretrained(tmp_path)
    case.config(seed=7, inference_mode=True).save_pretrained(tmp_path)
    model = case.base().train()
    refused(model, lambda: model.load_adapter(str(tmp_path)))
    refused(model, lambda: model.load_adapter(str(tmp_path), is_trainable=True))
    model.load_adapter(peft_config=case.config(seed=42), adapter_state_dict=load_file(tmp_path / WEIGHTS))
    assert torch.equal(outputs(model.eval(), case.batch()), outputs(case.adapted(seed=42), case.batch()))
    refused(model, lambda: model.load_adapter(str(tmp_path), "second"))


@needs_pair
@pytest.mark.parametrize("method", ONE_EACH)
def test_auto_classes(method, tmp_path):
    base = seeded(tiny_llama)
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.add_adapter(make_config(method, ["q_proj"], seed=42, base_model_name_or_path=str(tmp_path / "base")))
    model.save_pretrained(tmp_path / "adapter")
    AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter" / WEIGHTS, lambda text: text.replace(b",42,", b",43,"))
    with pytest.raises(MeaningError, match="seed 43 there and 42 here"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("case", PLACED)
def test_a_configuration_and_tensors_that_do_not_belong_together(case, tmp_path):
    case.adapted(seed=42).save_pretrained(tmp_path)
    case.adapted(seed=7).peft_config["default"].save_pretrained(str(tmp_path))
    base = case.base()
    refused(base, lambda: PeftModel.from_pretrained(base, tmp_path))
    ways = [lambda: pack_adapter(tmp_path, tmp_path / "packed")]
    # Slices need the configuration of the base to be looked at, and ΔW of some methods its weights.
    if case.place in ("linear", "conv1d") and not METHODS[case.method].needs_base:
        ways.append(lambda: inspect_adapter(tmp_path))
    for read in ways:
        with pytest.raises(MeaningError, match="seed 42 there and 7 here"):
            read()
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("method", OPTIONS)
def test_a_packed_file_over_a_name(method, tmp_path):
    case = Case("qkv_proj", method)
    case.adapted(seed=42).save_pretrained(tmp_path / "source")
    pack_adapter(tmp_path / "source", tmp_path / "packed", bits=32)
    target = case.adapted(seed=7, fill_seed=2)
    refused(target, lambda: load_packed(target, tmp_path / "packed"))
    own = case.adapted(seed=42, fill_seed=2)
    load_packed(own, tmp_path / "packed")
    assert torch.equal(outputs(own, case.batch()), outputs(case.adapted(seed=42), case.batch()))


def test_another_method():
    nola, pranc = Case("linear", "nola").adapted(), Case("linear", "pranc").adapted()
    refused(nola, lambda: nola.load_state_dict(renamed(pranc), strict=False), "method 'pranc' there and 'nola' here")


def test_layers_of_another_shape():
    """NOLA has as many coefficients for every shape, so that no loader finds anything to complain of."""
    wide = seeded(tiny_llama, intermediate_size=64)
    source = get_peft_model(wide, make_config("nola", ["down_proj"]))
    target = get_peft_model(seeded(tiny_llama), make_config("nola", ["down_proj"]))
    refused(target, lambda: set_peft_model_state_dict(target, get_peft_model_state_dict(source)), "shapes and rows")


# --- what is equal stays equal ---


@pytest.mark.parametrize("case", PLACED)
def test_what_only_changes_cost_or_training_makes_no_difference(case, tmp_path):
    case.adapted().save_pretrained(tmp_path)
    target = case.adapted(fill_seed=2, basis_storage="recompute", contraction="weight", dropout=0.3, init_weights=False)
    target.load_adapter(str(tmp_path), "default")
    assert bits(coefficients_of(target)) == bits(coefficients_of(case.adapted()))


@pytest.mark.parametrize(
    ("written", "default"),
    [
        (Nola(r=3, num_basis=6, num_basis_b=6, alpha=8.0), Nola(r=3, num_basis=6, alpha=8)),
        (RandLora(r=5, alpha=100.0), RandLora(r=5)),
        (Vera(r=7, d_initial=0.2), Vera(r=7)),
        (Vera(r=7, law="sparse(3.0)"), Vera(r=7, law="sparse(3)")),
    ],
)
def test_a_default_written_out_means_the_same(written, default):
    matrices = [SpecMatrix("a.b", "", 0, 8, 8, 8, default)]
    ours = meaning_of(default, None, matrices)
    theirs = meaning_of(written, None, [replace(one, method=written) for one in matrices])
    assert torch.equal(ours.tensor(), theirs.tensor())
    assert not torch.equal(meaning_of(replace(default, seed=1), None, matrices).tensor(), ours.tensor())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", OPTIONS)
def test_a_directory_made_of_a_packed_file_says_what_the_saved_one_says(place, method, tmp_path):
    Case(place, method).adapted().save_pretrained(tmp_path / "saved")
    pack_adapter(tmp_path / "saved", tmp_path / "packed", bits=32)
    unpack_adapter(tmp_path / "packed", tmp_path / "unpacked")
    assert bits(load_file(tmp_path / "unpacked" / WEIGHTS)) == bits(load_file(tmp_path / "saved" / WEIGHTS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ONE_EACH)
def test_a_cast_keeps_it(method, dtype):
    case = Case("linear", method)
    model = case.adapted().to(dtype)
    assert text_of(model) == text_of(case.adapted())
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in case.adapted().state_dict().items()})
    other = case.adapted(seed=7)
    with pytest.raises(MeaningError, match="seed 11 there and 7 here"):
        other.load_state_dict({name: tensor.to(dtype) for name, tensor in model.state_dict().items()})


CASTS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])


@CASTS
@pytest.mark.parametrize("place", ["linear", "conv1d", "qkv_proj", "in_proj"])
def test_streams_that_were_cast_are_refused_on_every_way(place, dtype, tmp_path):
    """A basis of each layer's own lies in the streams: those of another dtype would name other matrices."""
    case = Case(place, "nola-own-basis")
    source, target = case.adapted(), case.adapted(fill_seed=2)
    whole = {name: tensor.to(dtype) for name, tensor in source.state_dict().items()}
    saved = {name: tensor.to(dtype) for name, tensor in get_peft_model_state_dict(source).items()}
    before = snapshot(target)
    for load in (
        lambda: target.load_state_dict(whole),
        lambda: target.load_state_dict(whole, assign=True),
        lambda: nn.Sequential(target).load_state_dict({f"0.{name}": tensor for name, tensor in whole.items()}),
        lambda: set_peft_model_state_dict(target, saved),
    ):
        with pytest.raises(StreamValueError, match="must be int64"):
            load()
        assert snapshot(target) == before
    source.save_pretrained(tmp_path)
    save_file(saved, tmp_path / WEIGHTS)
    with pytest.raises(StreamValueError, match="must be int64"):
        PeftModel.from_pretrained(seeded(PLACES[place].build), tmp_path)


@needs_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])  # float64 holds 32 bits
def test_the_loader_of_transformers_takes_no_streams_that_were_cast(dtype, tmp_path):
    case = Case("linear", "nola-own-basis")
    source = case.adapted()
    source.save_pretrained(tmp_path)
    save_file({name: tensor.to(dtype) for name, tensor in load_file(tmp_path / WEIGHTS).items()}, tmp_path / WEIGHTS)
    base = seeded(tiny_llama)
    before = snapshot(base)
    with pytest.raises(StreamValueError):
        base.load_adapter(str(tmp_path))
    assert snapshot(base) == before
    assert not adapted_layers(base)


def test_an_average_that_takes_streams_for_numbers_is_refused():
    """With its buffers, a mean of equal models has the streams of none: they were rounded on their way."""
    case = Case("linear", "nola-own-basis")
    model = case.adapted()
    right = AveragedModel(model)
    wrong = AveragedModel(model, avg_fn=lambda mean, new, n: mean + (new - mean) / (n + 1), use_buffers=True)
    for _ in range(3):
        right.update_parameters(model)
        wrong.update_parameters(model)
    assert torch.equal(outputs(right.module, case.batch()), outputs(model, case.batch()))
    with pytest.raises(StreamValueError, match=r"rounded to torch\.float32"):
        outputs(wrong.module, case.batch())


@pytest.mark.parametrize("method", [*ONE_EACH, "nola-own-basis"])
def test_streams_and_coefficients_move_with_a_model_that_is_cast(method):
    case = Case("linear", method)
    model, target = case.adapted(), case.adapted(fill_seed=2)
    target.load_state_dict(copy.deepcopy(model).to(torch.bfloat16).float().state_dict())
    assert text_of(target) == text_of(model)


@pytest.mark.parametrize("method", ONE_EACH)
def test_copies_and_the_meta_device_keep_it(method):
    case = Case("linear", method)
    model = case.adapted()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert text_of(twin) == text_of(model)
        refused(twin, lambda twin=twin: twin.load_state_dict(case.adapted(seed=7).state_dict()), "seed 7 there and 11")
    with torch.device("meta"):
        hollow = get_peft_model(PLACES["linear"].build(), case.config())
    if METHODS[method].needs_base:  # no digest can be compared before the weights are there
        with pytest.raises(MeaningError, match=r"base_weights '[0-9a-f]{16}' there and None here"):
            hollow.load_state_dict(model.state_dict(), assign=True)
        return
    hollow.load_state_dict(model.state_dict(), assign=True)
    assert not any(
        tensor.is_meta for tensor in (*hollow.state_dict().values(), *hollow.buffers()) if tensor.numel() == WIDTH
    )
    assert text_of(hollow.to_empty(device="cpu")) == text_of(model)


@pytest.mark.parametrize("method", ONE_EACH)
def test_one_small_tensor_an_adapter_that_nothing_trains(method):
    case = Case("linear", method)
    model = case.adapted()
    trainable = model.get_nb_trainable_parameters()
    model.add_adapter("other", case.config(seed=3))
    named = {name: t for name, t in model.state_dict().items() if "randbasis_meaning" in name}
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in named.values()] == [(torch.uint8, (WIDTH,))] * 2
    assert (
        model.get_nb_trainable_parameters()[0]
        == trainable[0]
        == sum(p.numel() for p in coefficients_of(model).values())
    )
    model.delete_adapter("other")
    assert list(text_of(model)) == [name for name in named if ".default." in name]
    sums = case.adapted()
    sums.add_weighted_adapter(["default"], [2.0], "sum")
    assert len(set(text_of(sums).values())) == 1


def test_the_widest_options_fit():
    method = Nola(
        seed=2**64 - 1,
        law="sparse(6.1234567890123456)",
        r=65535,
        num_basis=65536,
        num_basis_b=65535,
        alpha=-1.2345678901234567e-300,
        parametrization="offset",
        share_basis=False,
    )
    assert meaning_of(method, 8, [SpecMatrix("a", "", 0, 8, 8, 8, method)]).tensor().shape == (WIDTH,)


@pytest.mark.parametrize("method", ONE_EACH)
def test_an_unloaded_model_keeps_nothing_of_it(method):
    model = Case("linear", method).adapted().merge_and_unload()
    assert not model._load_state_dict_pre_hooks
    assert not [name for name in model.state_dict() if "randbasis" in name]


# --- files without it, and damaged ones ---


@pytest.mark.parametrize("method", OPTIONS)
def test_files_without_it_go_on_loading_with_one_warning(method, tmp_path):
    case = Case("linear", method)
    model = case.adapted()
    model.save_pretrained(tmp_path)
    expected = outputs(model, case.batch())
    drop(tmp_path / WEIGHTS)
    stored = {name: t for name, t in case.adapted().state_dict().items() if "randbasis_meaning" not in name}
    target, native = case.adapted(fill_seed=2), case.base()
    ways = {
        "from_pretrained": lambda: PeftModel.from_pretrained(case.base(), tmp_path),
        "load_adapter": lambda: target.load_adapter(str(tmp_path), "default"),
        "load_state_dict": lambda: target.load_state_dict(stored),
        "transformers": lambda: native.load_adapter(str(tmp_path)),
        "pack": lambda: pack_adapter(tmp_path, tmp_path / "packed"),
    }
    for way, load in ways.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = load()
        told = [str(one.message) for one in caught if one.category is UserWarning]
        assert len(told) == 1, way
        assert "do not say what they mean" in told[0], way
        assert "seed=11" in told[0], way
        loaded = {"from_pretrained": result, "transformers": native, "pack": target}.get(way, target)
        assert torch.equal(outputs(loaded.eval(), case.batch()), expected), way
    PeftModel.from_pretrained(case.base(), resaved(target, tmp_path / "again"))


@pytest.mark.parametrize("method", ONE_EACH)
def test_a_tensor_that_says_nothing_is_refused(method, tmp_path):
    case = Case("linear", method)
    case.adapted().save_pretrained(tmp_path)
    for content in (bytes(WIDTH), b"[]".ljust(WIDTH), b"\xff" * WIDTH, b"7".ljust(WIDTH)):
        edit(tmp_path / WEIGHTS, lambda _, content=content: content)
        base = case.base()
        before = snapshot(base)
        with pytest.raises(AdapterFilesError, match="must be text that says what they mean"):
            PeftModel.from_pretrained(base, tmp_path)
        assert snapshot(base) == before


@needs_pair
@pytest.mark.parametrize("method", ONE_EACH)
def test_the_loader_of_transformers_takes_no_half_of_an_adapter(method, tmp_path):
    """A tensor that is missing was a line in a log; one too many too."""
    case = Case("linear", method)
    case.adapted().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    last = max(name for name in tensors if "meaning" not in name)
    for changed, error, message in (
        ({name: t for name, t in tensors.items() if name != last}, AdapterFilesError, "complete, 1 are missing"),
        (tensors | {last.replace("layers.1", "layers.5"): tensors[last].clone()}, BaseMismatchError, "1 tensors for"),
    ):
        save_file(changed, tmp_path / WEIGHTS, {"format": "pt"})
        model = case.base()
        before = snapshot(model)
        with pytest.raises(error, match=message):
            model.load_adapter(str(tmp_path))
        assert snapshot(model) == before


def text_of(model: nn.Module) -> dict[str, bytes]:
    state = {name: t for name, t in model.state_dict().items() if "randbasis_meaning" in name}
    return {name: bytes(tensor.tolist()) for name, tensor in state.items()}


def renamed(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of another method with its meaning where this one has its own."""
    return {name: tensor for name, tensor in model.state_dict().items() if "pranc" not in name}


def edit(file: Path, change: Any) -> None:
    tensors = load_file(file)
    name = next(name for name in tensors if "randbasis_meaning" in name)
    tensors[name] = torch.tensor(list(change(bytes(tensors[name].tolist()))), dtype=torch.uint8)
    save_file(tensors, file, {"format": "pt"})


def drop(file: Path) -> None:
    tensors = load_file(file)
    save_file({name: t for name, t in tensors.items() if "randbasis_meaning" not in name}, file, {"format": "pt"})


def resaved(model: PeftModel, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(folder)
    return folder


def test_the_meaning_is_on_the_first_layer_alone():
    model = Case("linear", "nola").adapted()
    holders = [name for name, layer in adapted_layers(model).items() if len(layer.randbasis_meaning)]
    assert holders == ["base_model.model.model.layers.0.mlp.down_proj"]
    assert isinstance(model.peft_config["default"], RandbasisConfig)
    fill(model)

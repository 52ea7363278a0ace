"""Weighted sums of adapters, against sums of their tensors, PEFT's own call, and ΔW by the formulas."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_bases import adapted, bert
from torch import Tensor
from tuner_cases import CASES, Case, add_adapter, bits, fill, make_config, naive_deltas, outputs, seeded, tiny_llama

from randbasis import NolaConfig
from randbasis.adapter_file import read
from randbasis.adapters.packed import pack_adapter
from randbasis.adapters.putting import load_packed
from randbasis.arithmetic import average_adapters
from randbasis.errors import (
    BaseMismatchError,
    BasisMismatchError,
    CoefficientValueError,
    HeadMismatchError,
    MatrixMismatchError,
    OutputExistsError,
    WeightsError,
)

WEIGHTS = "adapter_model.safetensors"


def saved(case: Case, folder: Path, fill_seed: int = 1, **options: Any) -> dict[str, Tensor]:
    """An adapter in a folder, and its ΔW by the formulas."""
    model = case.adapted(fill_seed=fill_seed, **options)
    model.save_pretrained(str(folder))
    return naive_deltas(model, case)


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weights", [None, (1.5, -0.25)], ids=["mean", "arithmetic"])
def test_coefficients_and_distance(case: Case, weights: tuple[float, float] | None, tmp_path: Path):
    deltas = [saved(case, tmp_path / f"{seed}", fill_seed=seed) for seed in (1, 2)]
    done = average_adapters([tmp_path / "1", tmp_path / "2"], tmp_path / "out", weights=weights)
    first, second = weights or (0.5, 0.5)
    mine, theirs, made = (tensors(tmp_path / name) for name in ("1", "2", "out"))
    assert made.keys() == mine.keys()
    for name, values in made.items():
        expected = first * mine[name] + second * theirs[name] if values.is_floating_point() else mine[name]
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-7)
    reached = naive_deltas(PeftModel.from_pretrained(case.base(), str(tmp_path / "out")), case)
    wanted = {key: first * deltas[0][key] + second * deltas[1][key] for key in deltas[0]}
    size = math.hypot(*(float(delta.norm()) for delta in wanted.values()))
    apart = math.hypot(*(float((wanted[key] - reached[key]).norm()) for key in wanted))
    if case.method == "loraxs":  # linear in its coefficients, but the files do not tell its ΔW
        assert (done.norm, done.distance, done.relative) == (None, None, None)
        assert apart < 1e-6 * size
        return
    assert done.norm == pytest.approx(size, rel=1e-5)
    assert done.distance == pytest.approx(apart, rel=1e-4, abs=1e-6 * size)
    # Bilinear in two vectors each, but for PRANC, which is linear.
    assert (done.distance > 1e-2 * size) == (not case.method.startswith("pranc"))


@pytest.mark.parametrize("method", ["nola", "vera", "randlora", "pranc"])
def test_the_same_as_in_a_model_of_peft(method: str, tmp_path: Path):
    case = Case("linear", method)
    for seed in (1, 2):
        saved(case, tmp_path / f"{seed}", fill_seed=seed)
    average_adapters([tmp_path / "1", tmp_path / "2"], tmp_path / "out", weights=[0.75, -0.5])
    model = case.adapted(fill_seed=1)
    add_adapter(model, "second", make_config(method, case.targets), 2)
    model.add_weighted_adapter(["default", "second"], [0.75, -0.5], "sum", combination_type="linear")
    model.set_adapter("sum")
    loaded = PeftModel.from_pretrained(case.base(), str(tmp_path / "out")).eval()
    torch.testing.assert_close(outputs(loaded, case.batch()), outputs(model, case.batch()), rtol=1e-4, atol=1e-5)


def test_one_adapter_times_one_is_itself(tmp_path: Path):
    saved(Case("linear", "nola-own-basis"), tmp_path / "1")
    done = average_adapters([tmp_path / "1"], tmp_path / "out")
    assert bits(tensors(tmp_path / "out")) == bits(tensors(tmp_path / "1"))
    assert done.weights == (1.0,)
    assert done.distance < 1e-12 * done.norm


def test_files_and_directories_may_be_mixed(tmp_path: Path):
    case = Case("c_attn", "vera")
    for seed in (1, 2):
        saved(case, tmp_path / f"{seed}", fill_seed=seed)
    pack_adapter(tmp_path / "2", tmp_path / "2.safetensors", bits=32)
    average_adapters([tmp_path / "1", tmp_path / "2"], tmp_path / "out")
    average_adapters([tmp_path / "1", tmp_path / "2.safetensors"], tmp_path / "out.safetensors")
    spec = read(tmp_path / "out.safetensors").spec
    assert (spec.bits, spec.method.name) == (32, "vera")
    model = load_packed(case.base(), tmp_path / "out.safetensors").eval()
    loaded = PeftModel.from_pretrained(case.base(), str(tmp_path / "out")).eval()
    assert torch.equal(outputs(model, case.batch()), outputs(loaded, case.batch()))


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 12}, "seed=11 and 12"),
    "law": ({"law": "uniform"}, "law='sign' and 'uniform'"),
    "rank": ({"r": 4}, "r=3 and 4"),
    "scale": ({"alpha": 2.0}, "alpha=8.0 and 2.0"),
    "one layer": ({"rank_pattern": {"down_proj": 2}}, r"down_proj'.*r=3 and 2"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_basis_is_refused(name: str, tmp_path: Path):
    options, message = OTHERS[name]
    saved(Case("linear", "nola"), tmp_path / "1")
    Case("linear", "nola").adapted(**options).save_pretrained(str(tmp_path / "2"))
    with pytest.raises(BasisMismatchError, match=rf"{message}.*multiply different frozen matrices"):
        average_adapters([tmp_path / "1", tmp_path / "2"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_method_and_other_streams_are_refused(tmp_path: Path):
    saved(Case("linear", "nola-own-basis"), tmp_path / "1")
    saved(Case("linear", "vera"), tmp_path / "2")
    with pytest.raises(BasisMismatchError, match="method 'nola' and 'vera'"):
        average_adapters([tmp_path / "1", tmp_path / "2"], tmp_path / "out")
    saved(Case("linear", "nola-own-basis"), tmp_path / "3")
    renamed = {name: t + 1 if "streams" in name else t for name, t in tensors(tmp_path / "3").items()}
    save_file(renamed, tmp_path / "3" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(BasisMismatchError, match="those stored differ"):
        average_adapters([tmp_path / "1", tmp_path / "3"], tmp_path / "out")


def test_other_matrices_and_other_bases_are_refused(tmp_path: Path):
    saved(Case("linear", "nola"), tmp_path / "1")
    saved(Case("linear", "nola"), tmp_path / "2", target_modules=("q_proj", "o_proj"))
    with pytest.raises(MatrixMismatchError, match=r"2 has no 'model\.layers\.0\.mlp.*1 has no .*o_proj'"):
        average_adapters([tmp_path / "1", tmp_path / "2"], tmp_path / "out")
    saved(Case("conv1d", "nola"), tmp_path / "3")
    with pytest.raises(BaseMismatchError, match="type 'llama' and 'gpt2'"):
        average_adapters([tmp_path / "1", tmp_path / "3"], tmp_path / "out")

    wide = get_peft_model(seeded(tiny_llama, intermediate_size=56), Case("linear", "nola").config())
    fill(wide)
    wide.save_pretrained(str(tmp_path / "4"))
    with pytest.raises(BaseMismatchError, match=r"down_proj' is \(32, 48.*\(32, 56"):
        average_adapters([tmp_path / "1", tmp_path / "4"], tmp_path / "out")


def test_bases_of_other_names_are_one_if_the_caller_says_so(tmp_path: Path):
    case = Case("linear", "nola")
    saved(case, tmp_path / "1")
    for name in ("llama-a", "llama-b"):
        pack_adapter(tmp_path / "1", tmp_path / f"{name}.safetensors", base_name=name)
    files = [tmp_path / "llama-a.safetensors", tmp_path / "llama-b.safetensors"]
    with pytest.raises(BaseMismatchError, match="the name 'llama-a' and 'llama-b'; say base_name"):
        average_adapters(files, tmp_path / "out.safetensors")
    average_adapters(files, tmp_path / "out.safetensors", base_name="llama-c")
    assert read(tmp_path / "out.safetensors").spec.base.name == "llama-c"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"one finite number for each adapter, got \[1\.0\] for 2"),
        ([0.5, math.nan], "one finite number"),
        ([0.5, 0.25, 0.25], "for 2 adapters"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: list[float], message: str, tmp_path: Path):
    with pytest.raises(WeightsError, match=message):
        average_adapters(["a", "b"], tmp_path / "out", weights=weights)


def test_other_arguments_that_do_not_fit_are_refused(tmp_path: Path):
    case = Case("linear", "nola")
    saved(case, tmp_path / "1")
    before = bits(tensors(tmp_path / "1"))
    with pytest.raises(WeightsError, match="at least one"):
        average_adapters([], tmp_path / "out")
    with pytest.raises(WeightsError, match=r"heads must be one of.*got 'best'"):
        average_adapters([tmp_path / "1"], tmp_path / "out", heads="best")
    with pytest.raises(OutputExistsError):
        average_adapters([tmp_path / "1"], tmp_path / "1")
    with pytest.raises(CoefficientValueError):
        average_adapters([tmp_path / "1"], tmp_path / "out", weights=[1e300])
    assert bits(tensors(tmp_path / "1")) == before
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputExistsError, match="for both"):
        average_adapters([tmp_path / "1"], tmp_path / "1", weights=[2.0], overwrite=True)
    assert bits(tensors(tmp_path / "1")) == before
    average_adapters([tmp_path / "1"], tmp_path / "2", weights=[2.0])
    average_adapters([tmp_path / "1"], tmp_path / "2", weights=[3.0], overwrite=True)
    assert bits(tensors(tmp_path / "2")) != before


HEAD = "base_model.model.classifier.weight"


@pytest.fixture
def classifiers(tmp_path: Path) -> list[Path]:
    """Two adapters with a head of their own."""
    config = NolaConfig(r=2, num_basis=3, target_modules=["query"], modules_to_save=["classifier"])
    folders = [tmp_path / "1", tmp_path / "2"]
    for seed, folder in enumerate(folders):
        adapted(bert(seed, classes=3), config, folder)
    return folders


def test_heads_are_averaged_or_taken_from_the_first(classifiers: list[Path], tmp_path: Path):
    mine, theirs = (tensors(folder)[HEAD] for folder in classifiers)
    done = average_adapters(classifiers, tmp_path / "out", weights=[0.25, 0.75])
    assert done.head == 2
    torch.testing.assert_close(tensors(tmp_path / "out")[HEAD], 0.25 * mine + 0.75 * theirs)
    average_adapters(classifiers, tmp_path / "first", weights=[1.0, -1.0], heads="first")
    assert torch.equal(tensors(tmp_path / "first")[HEAD], mine)
    model = PeftModel.from_pretrained(bert(classes=3), str(tmp_path / "out"))
    trained = model.base_model.model.classifier.modules_to_save["default"].weight
    assert torch.equal(trained, tensors(tmp_path / "out")[HEAD])


def test_whole_numbers_beside_adapters_must_be_the_same(classifiers: list[Path], tmp_path: Path):
    for count, folder in enumerate(classifiers):
        steps = {"base_model.model.classifier.steps": torch.tensor([count])}
        save_file(tensors(folder) | steps, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(HeadMismatchError, match=r"steps' is of torch\.int64 and not the same in all"):
        average_adapters(classifiers, tmp_path / "out")
    assert average_adapters([classifiers[1]] * 2, tmp_path / "out").head == 3


def test_heads_that_cannot_be_averaged_are_refused(classifiers: list[Path], tmp_path: Path):
    with pytest.raises(HeadMismatchError, match=r"sum to 0, and heads are weights.*heads='first'"):
        average_adapters(classifiers, tmp_path / "out", weights=[1.0, -1.0])
    other = tmp_path / "4 classes"
    config = NolaConfig(r=2, num_basis=3, target_modules=["query"], modules_to_save=["classifier"])
    adapted(bert(classes=4), config, other)
    with pytest.raises(HeadMismatchError, match=r"classifier\.bias' differs in shape"):
        average_adapters([classifiers[0], other], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert average_adapters([classifiers[0], other], tmp_path / "out", heads="first").head == 2

"""Norms, distances and cosines of ΔW, against the matrices written out in float64 by the formulas."""

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tuner_cases import CASES_OF_SEEDS, Case, coefficients_of, naive_deltas, seeded, tiny_llama

from randbasis import Nola, Vera
from randbasis.adapter_file import Base, PackedAdapter, Spec, SpecMatrix, group_matrices
from randbasis.adapters.packed import pack_adapter
from randbasis.arithmetic import difference
from randbasis.errors import AdapterFilesError, AdapterMissingError, BaseMismatchError


def saved(case: Case, folder: Path, fill_seed: int = 1, **options: Any) -> dict[str, Tensor]:
    """An adapter in a folder, and its ΔW by the formulas."""
    model = case.adapted(fill_seed=fill_seed, **options)
    model.save_pretrained(str(folder))
    return naive_deltas(model, case)


def agree(found: Any, first: Tensor, second: Tensor) -> None:
    assert found.first == pytest.approx(float(first.norm()), rel=1e-5)
    assert found.second == pytest.approx(float(second.norm()), rel=1e-5)
    assert found.distance == pytest.approx(float((first - second).norm()), rel=1e-5)
    assert found.relative == pytest.approx(float((first - second).norm() / first.norm()), rel=1e-5)
    cosine = float((first * second).sum() / (first.norm() * second.norm()))
    assert found.cosine == pytest.approx(cosine, abs=1e-5)


def whole(deltas: dict[str, Tensor]) -> Tensor:
    return torch.cat([deltas[key].flatten() for key in sorted(deltas)])


@pytest.mark.parametrize("case", CASES_OF_SEEDS)
def test_two_adapters_of_one_basis(case: Case, tmp_path: Path):
    first, second = (saved(case, tmp_path / f"{seed}", fill_seed=seed) for seed in (1, 2))
    found = difference(tmp_path / "1", tmp_path / "2")
    assert found.other_basis is None
    assert {one.name for one in found.layers} == set(first)
    for one in found.layers:
        agree(one.change, first[one.name], second[one.name])
        assert (one.out_features, one.in_features) == tuple(first[one.name].shape)
    agree(found.total, whole(first), whole(second))
    own = [coefficients_of(case.adapted(fill_seed=seed)) for seed in (1, 2)]
    agree(found.coefficients, *(torch.cat([c.detach().double().flatten() for c in one.values()]) for one in own))


@pytest.mark.parametrize("pair", [("nola", "vera"), ("vera", "randlora"), ("pranc", "nola-own-basis")], ids="-".join)
def test_across_methods_and_seeds(pair: tuple[str, str], tmp_path: Path):
    first = saved(Case("linear", pair[0]), tmp_path / "1")
    second = saved(Case("linear", pair[1]), tmp_path / "2", seed=99)
    found = difference(tmp_path / "1", tmp_path / "2")
    for one in found.layers:
        agree(one.change, first[one.name], second[one.name])
        assert one.coefficients is None
    assert found.methods == (pair[0].removesuffix("-own-basis"), pair[1].removesuffix("-own-basis"))
    assert found.coefficients is None
    assert "multiply different frozen matrices" in str(found.other_basis)


def test_layers_of_one_alone_count_in_full(tmp_path: Path):
    case = Case("linear", "nola")
    first = saved(case, tmp_path / "1", target_modules=("q_proj", "v_proj"))
    second = saved(case, tmp_path / "2", fill_seed=2, target_modules=("v_proj", "down_proj"))
    found = difference(tmp_path / "1", tmp_path / "2")
    assert {one.name.rpartition(".")[2] for one in found.layers} == {"v_proj"}
    for alone, deltas in ((found.only_first, first), (found.only_second, second)):
        assert len(alone) == 2
        for name, size in alone.items():
            assert size == pytest.approx(float(deltas[name].norm()), rel=1e-5)
    nothing = {key: torch.zeros_like(delta) for key, delta in (first | second).items()}
    agree(found.total, whole(nothing | first), whole(nothing | second))
    assert "no 'model.layers.0.mlp.down_proj'" in str(found.other_basis)
    json.dumps(found.as_json())


def test_a_slice_against_the_whole_projection(tmp_path: Path):
    part, all_ = Case("c_attn", "nola"), Case("conv1d", "vera")
    first, second = saved(part, tmp_path / "1"), saved(all_, tmp_path / "2")
    found = difference(tmp_path / "1", tmp_path / "2")
    for one in found.layers:
        agree(one.change, first[one.name], second[one.name])
    assert len(found.layers) == 2
    assert len(found.only_second) == 6


def test_a_packed_file_is_its_directory(tmp_path: Path):
    case = Case("qkv_proj", "randlora")
    saved(case, tmp_path / "dir")
    for bits, largest in ((32, 0.0), (8, 0.05)):
        pack_adapter(tmp_path / "dir", tmp_path / f"{bits}.safetensors", bits=bits)
        found = difference(tmp_path / "dir", tmp_path / f"{bits}.safetensors")
        assert found.total.relative is not None
        assert found.total.relative <= largest
        assert found.total.cosine == pytest.approx(1, abs=0.01)
        assert (found.total.distance == 0) == (bits == 32)


def test_against_a_lora_of_peft(tmp_path: Path):
    case = Case("linear", "nola")
    first = saved(case, tmp_path / "1")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(5)
        config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(seeded(tiny_llama), config)
    model.save_pretrained(str(tmp_path / "2"))
    found = difference(tmp_path / "1", tmp_path / "2")
    for one in found.layers:
        second = model.get_base_model().get_submodule(one.name).get_delta_weight("default").detach().double()
        agree(one.change, first[one.name], second)
    assert (len(found.layers), len(found.only_first)) == (2, 4)
    assert found.methods == ("nola", "PEFT's LoRA")


class LargestTensor(TorchDispatchMode):
    """Remembers the most entries of any tensor that an operation gives."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, Tensor):
                self.entries = max(self.entries, one.numel())
        return result


def test_no_matrix_of_a_layers_size_is_made(tmp_path: Path):
    sides = (11008, 4096)
    methods = (Nola(r=4, num_basis=3, alpha=1.0), Vera(r=8, seed=4))
    for number, method in enumerate(methods):
        groups = group_matrices([SpecMatrix("up_proj", "", 0, *sides[:1], *sides, method)])
        spec = Spec(method, Base(), groups, 32)
        values = torch.randn(spec.count, generator=torch.Generator().manual_seed(number))
        PackedAdapter.of(spec, values).write(tmp_path / f"{number}.safetensors")
    with LargestTensor() as largest:
        found = difference(tmp_path / "0.safetensors", tmp_path / "1.safetensors")
    assert largest.entries < sides[0] * sides[1] // 100
    assert found.total.distance == pytest.approx(math.hypot(found.total.first, found.total.second), rel=0.1)


def test_what_cannot_be_compared_is_refused(tmp_path: Path):
    saved(Case("linear", "nola"), tmp_path / "1")
    spec_of = [SpecMatrix("model.layers.0.self_attn.q_proj", "", 0, 16, 16, 32, Nola(r=2, num_basis=2, alpha=1.0))]
    spec = Spec(spec_of[0].method, Base(), group_matrices(spec_of), 32)
    PackedAdapter.of(spec, torch.ones(4)).write(tmp_path / "narrow.safetensors")
    with pytest.raises(BaseMismatchError, match=r"q_proj' is \(32, 32\) and \(16, 32\)"):
        difference(tmp_path / "1", tmp_path / "narrow.safetensors")
    with pytest.raises(AdapterMissingError):
        difference(tmp_path / "1", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterFilesError):
        difference(tmp_path / "1", tmp_path / "empty")

"""Coefficients shared over blocks, math (26), against untied adapters with equal coefficients and the same streams."""

import copy
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from support.tuner_cases import (
    TIED,
    TIED_CASES,
    Case,
    adapted_layers,
    add_adapter,
    coefficients_of,
    fill,
    loss_of,
    make_config,
    naive_deltas,
    outputs,
    seeded,
    shared_coefficients,
    snapshot,
    tiny_llama,
)
from torch import Tensor, nn

from randbasis import LoraXsConfig, NolaConfig, PrancConfig, RandLoraConfig, VeraConfig, stream_of
from randbasis.errors import CombinationError, MeaningError, TieError


def untied(case: Case, tied: PeftModel, **options: Any) -> PeftModel:
    """An adapter whose matrices have coefficients of their own, equal to those that the other's share."""
    config = case.config(**({"tie": "matrix", "share_basis": False} | options))
    model = get_peft_model(case.base(), config)
    tie = tied.peft_config["default"].tie
    with torch.no_grad():
        for key, parameter in coefficients_of(model).items():
            path, _, rest = key.removeprefix("base_model.model.").partition(".randbasis_")
            name = "_".join(rest.split(".")[0].split("_")[:2])
            parameter.copy_(shared_coefficients(tied, tie, path, name))
    return model.eval()


def own_of(key: str) -> tuple[str, str]:
    path, _, rest = key.removeprefix("base_model.model.").partition(".randbasis_")
    return path, "_".join(rest.split(".")[0].split("_")[:2])


def streams_of(model: nn.Module) -> dict[str, list[tuple[int, ...]]]:
    return {name: list(layer.randbasis_streams["default"].values) for name, layer in adapted_layers(model).items()}


@pytest.mark.parametrize("case", TIED_CASES)
def test_the_count_is_that_of_one_matrix_a_group(case):
    model = get_peft_model(case.base(), case.config())
    one = {"nola-tied": 11, "nola-tied-blocks": 12, "pranc-tied": 6, "pranc-tied-whole": 6}[case.method]
    blocks = {path.split(".")[2] if "." in path else "" for path in adapted_layers(model.get_base_model())}
    groups = len(blocks) if TIED[case.method][1]["tie"] == "block:1" else 1
    assert model.get_nb_trainable_parameters()[0] == groups * one
    assert sum(p.numel() for p in coefficients_of(model).values()) == groups * one
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == groups * one


@pytest.mark.parametrize("case", TIED_CASES)
def test_streams_are_those_of_the_paths(case):
    model = get_peft_model(case.base(), case.config())
    method = model.peft_config["default"].method_for("")
    for name, layer in adapted_layers(model.get_base_model()).items():
        for one in layer.matrices("default"):
            path = f"{name}[{one.part.name}]" if one.part.name else name
            assert one.bound.site.streams == tuple(stream_of(f"{method.name}/{role}/{path}") for role in method.roles)


@pytest.mark.parametrize("case", TIED_CASES)
def test_every_delta_is_the_formulas_and_the_untied_adapters(case):
    model = case.adapted()
    other = untied(case, model)
    assert streams_of(model) == streams_of(other)
    expected, layers = naive_deltas(model, case), adapted_layers(other.get_base_model())
    for name, layer in adapted_layers(model.get_base_model()).items():
        found = layer._full_delta("default", None)
        torch.testing.assert_close(found.double(), expected[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(found, layers[name]._full_delta("default", None))
    assert torch.equal(outputs(model, case.batch()), outputs(other, case.batch()))


@pytest.mark.parametrize("case", TIED_CASES)
def test_the_gradient_is_the_sum_of_the_untied_ones(case):
    model, tie = case.adapted(), TIED[case.method][1]["tie"]
    other = untied(case, model).train()
    loss_of(other, case.batch()).backward()
    loss_of(model.train(), case.batch()).backward()
    sums: dict[int, Tensor] = {}
    for key, parameter in coefficients_of(other).items():
        shared = shared_coefficients(model, tie, *own_of(key))
        sums[id(shared)] = sums.get(id(shared), torch.zeros(())) + parameter.grad.double()
    found = coefficients_of(model)
    assert set(sums) == {id(parameter) for parameter in found.values()}
    for key, parameter in found.items():
        assert bool((parameter.grad != 0).all()), key
        torch.testing.assert_close(parameter.grad.double(), sums[id(parameter)], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_training_at_few_bits_rounds_the_one_vector(bits):
    case = Case("linear", "nola-tied")
    model = case.adapted(quantize_coefficients=bits)
    other = untied(case, model, quantize_coefficients=bits)
    assert torch.equal(outputs(model, case.batch()), outputs(other, case.batch()))
    loss_of(model.train(), case.batch()).backward()
    assert all(bool((p.grad != 0).all()) for p in coefficients_of(model).values())


# --- one owner ---


@pytest.mark.parametrize("case", TIED_CASES)
def test_the_file_has_each_tensor_once_and_loads_again(case, tmp_path):
    model = case.adapted()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    names = {key.replace(".default.weight", ".weight") for key in coefficients_of(model)}
    assert {name for name in stored if "meaning" not in name and "streams" not in name} == names
    again = PeftModel.from_pretrained(case.base(), tmp_path)
    assert again.peft_config["default"].tie == model.peft_config["default"].tie
    assert coefficients_of(again).keys() == coefficients_of(model).keys()
    assert torch.equal(outputs(again, case.batch()), outputs(model, case.batch()))


def test_the_owner_is_the_first_layer_by_number():
    base = seeded(tiny_llama, num_hidden_layers=12)
    names = coefficients_of(get_peft_model(base, make_config("nola-tied", ["q_proj"])))
    assert {name.split(".randbasis_")[0] for name in names} == {"base_model.model.model.layers.0.self_attn.q_proj"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_coefficients_of_its_own(copied):
    case = Case("linear", "nola-tied")
    model = case.adapted()
    other = copied(model)
    assert torch.equal(outputs(other, case.batch()), outputs(model, case.batch()))
    before = outputs(model, case.batch())
    fill(other, seed=9)
    torch.testing.assert_close(outputs(other, case.batch()), outputs(case.adapted(fill_seed=9), case.batch()))
    assert torch.equal(outputs(model, case.batch()), before)


def test_other_coefficients_take_effect_in_every_layer_at_once():
    case = Case("linear", "nola-tied")
    model = case.adapted()
    outputs(model, case.batch())  # what may be kept is kept
    fill(model, seed=9)
    assert torch.equal(outputs(model, case.batch()), outputs(case.adapted(fill_seed=9), case.batch()))
    for parameter in coefficients_of(model).values():
        parameter.data = parameter.data * 2  # as fused optimizers and loaders write
    doubled = case.adapted(fill_seed=9)
    with torch.no_grad():
        for parameter in coefficients_of(doubled).values():
            parameter.mul_(2)
    assert torch.equal(outputs(model, case.batch()), outputs(doubled, case.batch()))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_give_the_same_gradient(use_reentrant):
    case = Case("linear", "nola-tied")
    found = []
    for checkpointed in (False, True):
        model = case.adapted().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        loss_of(model, case.batch()).backward()
        found.append({name: p.grad for name, p in coefficients_of(model).items()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


def test_a_compiled_model_gives_the_same_output_and_gradient():
    case = Case("in_proj", "nola-tied")
    model, other = case.adapted().train(), case.adapted().train()
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=False)
    for each in (model, compiled):
        loss_of(each, case.batch()).backward()
    found = [{name: p.grad for name, p in coefficients_of(each).items()} for each in (model, other)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


# --- several adapters ---


def test_adapters_of_several_ties_do_not_disturb_each_other():
    case = Case("linear", "nola-tied")
    model = case.adapted()
    for name, seed, tie in (("blocks", 5, "block:1"), ("own", 6, "matrix")):
        add_adapter(model, name, case.config(tie=tie, **({"share_basis": False} if tie == "matrix" else {})), seed)
    alone = {}
    for name, seed, options in (
        ("default", 1, {}),
        ("blocks", 5, {"tie": "block:1"}),
        ("own", 6, {"tie": "matrix", "share_basis": False}),
    ):
        model.set_adapter(name)
        alone[name] = outputs(case.adapted(fill_seed=seed, **options), case.batch())
        torch.testing.assert_close(outputs(model, case.batch()), alone[name], rtol=1e-5, atol=1e-6)
    names = ["own", "default", "__base__", "blocks"]
    for _ in range(2):  # planned, then kept
        mixed = outputs(model, case.batch(), adapter_names=names)
        for row, name in enumerate(names):
            wanted = outputs(case.base(), case.batch()) if name == "__base__" else alone[name]
            torch.testing.assert_close(mixed[row], wanted[row], rtol=1e-4, atol=1e-5)
    fill(model, "default", seed=8)
    mixed = outputs(model, case.batch(), adapter_names=names)
    torch.testing.assert_close(mixed[1], outputs(case.adapted(fill_seed=8), case.batch())[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[0], alone["own"][0], rtol=1e-4, atol=1e-5)
    model.set_adapter("own")
    model.delete_adapter("default")
    assert not coefficients_of(model, "default")
    torch.testing.assert_close(outputs(model, case.batch()), alone["own"], rtol=1e-5, atol=1e-6)
    add_adapter(model, "default", case.config(), 1)
    model.set_adapter("default")
    torch.testing.assert_close(outputs(model, case.batch()), alone["default"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", TIED_CASES)
def test_merged_and_unmerged(case):
    model = case.adapted()
    before, wanted = outputs(case.base(), case.batch()), outputs(model, case.batch())
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, case.batch()), wanted, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(outputs(model, case.batch()), wanted)
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged, case.batch()), wanted, rtol=1e-4, atol=1e-5)
    assert not any("randbasis" in name for name, _ in merged.named_parameters())
    assert torch.equal(outputs(case.adapted().unload(), case.batch()), before)


def test_a_weighted_sum_is_one_of_the_shared_vectors():
    case = Case("linear", "pranc-tied")
    model = case.adapted()
    add_adapter(model, "other", case.config(), 2)
    model.add_weighted_adapter(["default", "other"], [0.25, 2.0], "sum")
    first, second, total = (coefficients_of(model, name) for name in ("default", "other", "sum"))
    assert len(total) == 2
    for mine, one, two in zip(total.values(), first.values(), second.values(), strict=True):
        torch.testing.assert_close(mine, 0.25 * one + 2.0 * two)
    add_adapter(model, "whole", case.config(tie="model"), 3)
    with pytest.raises(CombinationError, match="tie="):
        model.add_weighted_adapter(["default", "whole"], [1.0, 1.0], "none")


def test_a_state_goes_from_model_to_model():
    case = Case("linear", "nola-tied-blocks")
    model, other = case.adapted(), case.adapted(fill_seed=5)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert torch.equal(outputs(other, case.batch()), outputs(model, case.batch()))
    third = case.adapted(fill_seed=6)
    third.load_state_dict(model.state_dict())
    assert torch.equal(outputs(third, case.batch()), outputs(model, case.batch()))


def test_a_state_of_another_tie_is_refused_by_name():
    case = Case("linear", "nola-tied")
    model, other = case.adapted(), untied(case, case.adapted())
    with pytest.raises(MeaningError, match="tie 'model' there and 'matrix' here"):
        other.load_state_dict(model.state_dict(), strict=False)
    with pytest.raises(MeaningError, match="tie 'matrix' there and 'model' here"):
        model.load_state_dict(other.state_dict(), strict=False)
    with pytest.raises(MeaningError, match="tie 'block:1' there and 'model' here"):
        model.load_state_dict(case.adapted(tie="block:1").state_dict(), strict=False)


# --- what is refused ---


@pytest.mark.parametrize("config", [VeraConfig, RandLoraConfig, LoraXsConfig])
def test_methods_without_streams_of_their_own_are_refused(config):
    with pytest.raises(TieError, match="nola, pranc"):
        config(tie="model")


@pytest.mark.parametrize("config", [NolaConfig, PrancConfig])
def test_one_vector_on_one_basis_is_refused(config):
    with pytest.raises(TieError, match="share_basis"):
        config(tie="model", share_basis=True)
    assert config(tie="model").share_basis is False
    assert config(tie="matrix").share_basis is True


def test_coefficients_of_several_lengths_are_refused_and_the_model_stays_as_it_was():
    base = seeded(tiny_llama)
    before = snapshot(base)
    config = make_config("nola-tied", ["q_proj", "v_proj"], num_basis_pattern={"v_proj": 4})
    with pytest.raises(TieError, match=r"q_proj.*v_proj|v_proj.*q_proj"):
        get_peft_model(base, config)
    assert snapshot(base) == before


# --- two processes ---

_WORKER = """
import sys, torch
import torch.distributed as dist
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tuner_cases import Case, TIED, coefficients_of, loss_of
from randbasis.errors import TieError
dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = init_device_mesh("cpu", (2,))

def sharded(model):
    fully_shard(model, mesh=mesh)
    return model

for method in TIED:
    for wrap in (DistributedDataParallel, sharded):
        case = Case("in_proj", method)
        whole, model = case.adapted().train(), case.adapted().train()
        parallel = wrap(model)
        steps = [torch.optim.AdamW(coefficients_of(m).values(), lr=0.1) for m in (whole, model)]
        for step in range(3):
            x = torch.randn(4, 6, 24, generator=torch.Generator().manual_seed(step))
            loss_of(whole, {"x": x}).backward()
            loss_of(parallel, {"x": x[2 * rank : 2 * rank + 2]}).backward()
            for optimizer in steps:
                optimizer.step()
                optimizer.zero_grad()
        for mine, single in zip(coefficients_of(model).values(), coefficients_of(whole).values(), strict=True):
            mine = mine.full_tensor() if hasattr(mine, "full_tensor") else mine
            torch.testing.assert_close(mine, single, rtol=1e-4, atol=1e-5)

model = Case("in_proj", "nola-tied").adapted().train()
for layer in (model.get_base_model().qkv, model.get_base_model().in_proj):
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
try:
    loss_of(model, {"x": torch.randn(2, 6, 24)})
    raise SystemExit("units of single layers were not refused")
except TieError as error:
    assert "one unit" in str(error)
dist.barrier()
dist.destroy_process_group()
print(f"equal {rank}")
"""


def test_two_processes_train_one_vector(request, console_environment, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    command = [sys.executable, "-W", "ignore", str(script), str(request.path.parent.parent / "support")]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + os.getpid() % 20_000), "WORLD_SIZE": "2"}
    workers = [
        subprocess.Popen(
            command,
            env=console_environment | common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, (out, err) in enumerate([worker.communicate(timeout=240) for worker in workers]):
        assert out.endswith(f"equal {rank}\n"), err[-3000:]

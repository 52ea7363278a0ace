"""Ways to store a trained run: against the float64 singular values of merged matrices, codes, and real files."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, BertModel

from randbasis import NolaConfig, put
from randbasis.adapter_file import read
from randbasis.adapters import pack_adapter
from randbasis.adapters.budget import stored_bytes
from randbasis.codes import quantize
from randbasis.compare.budgets import adapted_shapes
from randbasis.compare.lora_precision import settle, train_at_bits
from randbasis.compare.points import as_stored, bytes_of, header_bytes, lora_layers
from randbasis.compare.rivals import configuration
from randbasis.compare.study import PointSpec
from randbasis.methods import METHODS
from randbasis.train.trained_parameters import save_parameters
from randbasis.train.trainer import parameter_groups

TARGETS = ("query", "value")


def bert() -> BertModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(BertConfig(vocab_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=32))  # fmt: skip
    model.config._name_or_path = model.name_or_path = "bert"
    return model


def adapted(method: str, **options):
    """A model with an adapter whose numbers are not those of its start."""
    base = bert()
    shapes = adapted_shapes(bert(), TARGETS)
    config = configuration(method, options, shapes, targets=TARGETS, seed=3, task_type="FEATURE_EXTRACTION", head=[])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameter_groups(model)["adapter"].values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def deltas(model) -> list[torch.Tensor]:
    return [layer.get_delta_weight("default").detach().double() for layer in lora_layers(model)]


@pytest.mark.parametrize("rank", [1, 3])
def test_a_truncated_lora_is_the_leading_terms_of_the_svd(rank: int):
    model = adapted("lora", rank=6)
    before = deltas(model)
    with as_stored(model, PointSpec(32, rank)):
        for found, whole in zip(deltas(model), before, strict=True):
            u, s, vt = torch.linalg.svd(whole)
            assert torch.allclose(found, u[:, :rank] * s[:rank] @ vt[:rank], atol=1e-6)
    for found, whole in zip(deltas(model), before, strict=True):
        assert torch.equal(found, whole)


def test_a_truncated_lora_of_few_bits_has_one_scale_a_vector():
    model = adapted("lora", rank=6)
    with as_stored(model, PointSpec(4, 2)):
        for layer in lora_layers(model):
            a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
            assert not a[2:].any()
            assert not b[:, 2:].any()
            for vector in (*a[:2], *b[:, :2].T):
                scale = vector.abs().max() / 7
                codes = vector / scale
                assert torch.allclose(codes, codes.round(), atol=1e-4)
                assert len(codes.round().unique()) > 3


def test_more_bits_and_more_ranks_lose_less():
    model = adapted("lora", rank=6)
    whole = deltas(model)

    def error(spec: PointSpec) -> float:
        with as_stored(model, spec):
            return sum(float((a - b).square().sum()) for a, b in zip(deltas(model), whole, strict=True))

    errors = [error(PointSpec(bits, rank)) for bits, rank in ((32, 6), (8, 6), (4, 6), (4, 3), (2, 1))]
    assert errors == sorted(errors)
    assert errors[0] < 1e-9


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_coefficients_are_what_codes_give_back(bits: int):
    model = adapted("nola", basis=5)
    before = {n: p.detach().clone() for n, p in parameter_groups(model)["adapter"].items()}
    with as_stored(model, PointSpec(bits)):
        for name, parameter in parameter_groups(model)["adapter"].items():
            codes, scales = quantize(before[name].flatten(), [before[name].numel()], bits)
            assert torch.equal(parameter.detach().flatten(), codes.float() * scales)
    for name, parameter in parameter_groups(model)["adapter"].items():
        assert torch.equal(parameter.detach(), before[name])


@pytest.mark.parametrize("bits", [32, 16, 8, 4, 2])
def test_bytes_of_ours_are_those_of_the_file(bits: int, tmp_path: Path):
    model = adapted("nola", basis=5)
    model.save_pretrained(tmp_path / "a")
    pack_adapter(tmp_path / "a", tmp_path / "a.rba", bits=bits)
    found = bytes_of(model, PointSpec(bits), 0, overhead=0, saved=0)
    assert (found.total, found.head) == ((tmp_path / "a.rba").stat().st_size, 0)


@pytest.mark.parametrize("bits", [16, 4, 2])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_scored_with_the_coefficients_of_its_file(method: str, bits: int, tmp_path: Path):
    model = adapted(method, **({"basis": 8} if method in ("nola", "pranc") else {"rank": 4}))
    model.save_pretrained(tmp_path / "adapter")
    pack_adapter(tmp_path / "adapter", tmp_path / "file.safetensors", bits=bits)
    there = put(bert(), read(tmp_path / "file.safetensors"))
    stored = {name: one.detach() for name, one in there.named_parameters() if ".randbasis_" in name}
    with as_stored(model, PointSpec(bits)):
        scored = parameter_groups(model)["adapter"]
        assert scored.keys() == stored.keys()
        for name, one in scored.items():
            torch.testing.assert_close(one.detach(), stored[name], rtol=1e-6, atol=0.0)


def test_bytes_of_rivals():
    overhead = header_bytes(bert(), TARGETS, [])
    lora = adapted("lora", rank=6)
    assert bytes_of(lora, PointSpec(), 10, overhead, 12_345).total == 12_345
    assert bytes_of(lora, PointSpec(4, 2), 10, overhead, 0).total == overhead + 4 * 2 * 48 // 2 + 4 * 4 * 4 + 40
    assert bytes_of(lora, PointSpec(16), 0, overhead, 0).total == overhead + 4 * 6 * 48 * 2
    dora = adapted("dora", rank=1)
    assert bytes_of(dora, PointSpec(8), 0, overhead, 0).total == overhead + 4 * (48 + 24) + 4 * 3 * 4
    uni = adapted("unilora", theta_d_length=50, r=1)
    assert bytes_of(uni, PointSpec(8), 0, overhead, 200 + 128).total == 128 + 50 + 4
    assert bytes_of(uni, PointSpec(8), 0, overhead, 10_000).total == overhead + 50 + 4
    assert bytes_of(bert(), PointSpec(), 3, overhead, 999).head == 12


def test_the_header_is_what_a_packed_file_has_beside_its_coefficients(tmp_path: Path):
    model = get_peft_model(
        bert(), NolaConfig(r=1, num_basis=7, target_modules=list(TARGETS), task_type="FEATURE_EXTRACTION")
    )
    model.save_pretrained(tmp_path / "a")
    pack_adapter(tmp_path / "a", tmp_path / "a.rba", bits=16)
    size = (tmp_path / "a.rba").stat().st_size
    assert header_bytes(bert(), TARGETS, []) == pytest.approx(size - stored_bytes(4 * 14, 0, 16), abs=8)


def test_peft_files_are_measured_as_they_are_saved(tmp_path: Path):
    model = adapted("lora", rank=6)
    save_parameters(model, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert file.stat().st_size >= 4 * 6 * 48 * 4


def test_lora_trains_at_few_bits_by_the_straight_through_estimator():
    model, plain = adapted("lora", rank=2), adapted("lora", rank=2)
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(2))
    train_at_bits(model, 3)
    with as_stored(plain, PointSpec(3)):
        kept = {n: p.detach().clone() for n, p in parameter_groups(plain)["adapter"].items()}
    with torch.no_grad():
        for name, parameter in parameter_groups(plain)["adapter"].items():
            parameter.copy_(kept[name])
    ours, theirs = next(lora_layers(model)), next(lora_layers(plain))
    assert torch.equal(ours(x), theirs(x))
    for layer in (ours, theirs):
        layer(x).square().mean().backward()
    original = ours.lora_B["default"].parametrizations.weight.original
    assert torch.equal(original.grad, theirs.lora_B["default"].weight.grad)
    settle(model)
    names = {n for n, _ in plain.named_parameters()}
    assert {n for n, _ in model.named_parameters()} == names
    assert torch.equal(ours.lora_A["default"].weight, theirs.lora_A["default"].weight)

"""Training of quantized coefficients: math (11) as oracle, the straight-through gradient, packing without loss."""

import copy

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tuner_cases import (
    CASES,
    ONE_EACH,
    OPTIONS,
    Case,
    adapted_layers,
    add_adapter,
    bits,
    coefficients_of,
    fill,
    loss_of,
    make_config,
    naive_deltas,
    outputs,
    seeded,
    tiny_llama,
    token_batch,
)

from randbasis import NolaConfig
from randbasis.adapter_file import read
from randbasis.adapters.inspection import inspect_adapter
from randbasis.adapters.packed import pack_adapter, unpack_adapter
from randbasis.adapters.putting import load_packed
from randbasis.codes import rounded
from randbasis.errors import PrecisionError
from randbasis.tuner.coefficients import straight_through

WEIGHTS = "adapter_model.safetensors"


def by_formula(values: torch.Tensor, precision: int) -> torch.Tensor:
    """Math (11), plainly, in float64."""
    exact = values.detach().double()
    scale = exact.abs().max() / (2 ** (precision - 1) - 1)
    return scale * torch.round(exact / scale) if scale else exact


def frozen_at(model: PeftModel, precision: int) -> PeftModel:
    """The same model with plain coefficients that are the quantized ones."""
    plain = copy.deepcopy(model)
    for layer in adapted_layers(plain).values():
        for options in layer.options.values():
            object.__setattr__(options, "quantize_coefficients", None)
    with torch.no_grad():
        for parameter in coefficients_of(plain).values():
            parameter.copy_(rounded(parameter.flatten(), [parameter.numel()], precision).view(parameter.shape))
    return plain


# --- the estimator ---


@pytest.mark.parametrize("precision", [8, 4, 3, 2])
@pytest.mark.parametrize("shape", [(1,), (7,), (5, 9)])
def test_against_the_formula_in_float64(precision, shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(precision))
    found = straight_through(values, precision)
    torch.testing.assert_close(found.double(), by_formula(values, precision), rtol=2**-15, atol=0)
    assert len(found.unique()) <= 2**precision - 1


@pytest.mark.parametrize("precision", [8, 4, 3, 2])
def test_equals_what_a_file_gives_back(precision):
    generator = torch.Generator().manual_seed(3)
    for size in (1e-38, 1e-30, 1e-3, 1.0, 1e30):
        values = size * torch.randn(6, 11, generator=generator)
        stored = rounded(values.flatten(), [66], precision).view(6, 11)
        assert torch.equal(straight_through(values, precision), stored)
        assert torch.equal(straight_through(stored, precision), stored)


def test_gradient_is_that_of_the_identity():
    values = torch.randn(9, dtype=torch.float64, requires_grad=True)
    straight_through(values, 2).backward(torch.arange(9.0, dtype=torch.float64))
    assert torch.equal(values.grad, torch.arange(9.0, dtype=torch.float64))


def test_zeros_stay_zeros_and_get_their_gradient():
    values = torch.zeros(5, requires_grad=True)
    found = straight_through(values, 3)
    assert torch.equal(found, torch.zeros(5))
    found.sum().backward()
    assert torch.equal(values.grad, torch.ones(5))


def test_what_is_not_finite_is_not_hidden():
    for bad in (float("nan"), float("inf")):
        assert bool(straight_through(torch.tensor([1.0, bad]), 3).isnan().any())


def test_half_precision_coefficients_are_computed_with_in_float32():
    values = torch.randn(20).bfloat16()
    found = straight_through(values, 3)
    assert found.dtype == torch.float32
    assert torch.equal(found, rounded(values.float(), [20], 3))


# --- in a model ---


@pytest.mark.parametrize("case", CASES)
def test_delta_against_the_naive_formula_at_rounded_coefficients(case):
    model = case.adapted(quantize_coefficients=3)
    expected = naive_deltas(frozen_at(model, 3), case)
    for name, layer in adapted_layers(model.get_base_model()).items():
        delta = layer.get_delta_weight("default").double()
        torch.testing.assert_close(delta.T if layer.transposed else delta, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["token", "weight"])
@pytest.mark.parametrize("case", [Case("linear", m) for m in OPTIONS] + [Case("c_attn", m) for m in ONE_EACH], ids=str)
def test_output_and_gradients_are_those_of_the_unquantized_adapter_at_the_rounded_point(case, order):
    model = case.adapted(quantize_coefficients=3, contraction=order)
    plain = frozen_at(model, 3)
    assert torch.equal(outputs(model, case.batch()), outputs(plain, case.batch()))
    for one in (model.train(), plain.train()):
        loss_of(one, case.batch()).backward()
    found = {n: p.grad for n, p in coefficients_of(model).items()}
    assert all(bool(gradient.any()) for gradient in found.values())
    torch.testing.assert_close(found, {n: p.grad for n, p in coefficients_of(plain).items()}, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["nola", "vera", "randlora"])
def test_a_fresh_adapter_changes_nothing_and_learns(method):
    case = Case("linear", method)
    base = case.base()
    expected = outputs(base, case.batch())
    model = get_peft_model(base, case.config(quantize_coefficients=2)).train()
    assert torch.equal(outputs(model, case.batch()), expected)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first = float(loss_of(model, case.batch()).detach())
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model, case.batch()).backward()
        optimizer.step()
    assert float(loss_of(model, case.batch()).detach()) < first
    for parameter in coefficients_of(model).values():
        assert bool(parameter.isfinite().all())
    assert any(len(p.detach().unique()) > 3 for p in coefficients_of(model).values()), "full precision is updated"


def test_mode_and_merging_change_no_coefficient():
    case = Case("linear", "nola")
    model = case.adapted(quantize_coefficients=3)
    before, expected = bits(coefficients_of(model)), outputs(model, case.batch())
    torch.testing.assert_close(outputs(model.train(), case.batch()), expected, rtol=1e-4, atol=1e-5)
    model.eval()
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, case.batch()), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(outputs(model, case.batch()), expected)
    assert bits(coefficients_of(model)) == before


@pytest.mark.parametrize("method", ONE_EACH)
def test_mixed_batches_beside_an_adapter_in_full_precision(method):
    model = Case("linear", method).adapted(quantize_coefficients=3)
    add_adapter(model, "plain", make_config(method, ["q_proj", "v_proj", "down_proj"]), seed=1)
    batch = token_batch(2)
    mixed = outputs(model, batch, adapter_names=["default", "plain"])
    alone = []
    for name in ("default", "plain"):
        model.set_adapter(name)
        alone.append(outputs(model, batch))
    torch.testing.assert_close(mixed, torch.stack([alone[0][0], alone[1][1]]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone[0], alone[1], atol=1e-4)


def test_kept_factors_follow_the_trained_coefficients():
    model = Case("linear", "nola").adapted(quantize_coefficients=4)
    before = outputs(model, token_batch())
    assert torch.equal(outputs(model, token_batch()), before)
    fill(model, seed=9)
    after = outputs(model, token_batch())
    assert not torch.equal(after, before)
    assert torch.equal(after, outputs(Case("linear", "nola").adapted(9, quantize_coefficients=4), token_batch()))


@pytest.mark.parametrize("method", ONE_EACH)
def test_compiled_without_graph_breaks(method):
    case = Case("linear", method)
    model = case.adapted(quantize_coefficients=3).train()
    name, layer = next(iter(adapted_layers(model).items()))
    x = torch.randn(2, 9, layer.in_features)
    found = []
    torch.compiler.reset()
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = call(x).square().mean()
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in coefficients_of(model).items() if name in n}))
    torch.compiler.reset()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    found = []
    for checkpointing in (False, True):
        model = Case("linear", "nola").adapted(quantize_coefficients=2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        loss_of(model, token_batch()).backward()
        found.append({n: p.grad for n, p in coefficients_of(model).items()})
    # A reentrant segment runs again with factors of its own layer alone, whose sums are added in another order.
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if reentrant else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(found[1], found[0], **tolerance)


@pytest.mark.parametrize("order", ["token", "weight"])
@pytest.mark.parametrize("method", ONE_EACH)
def test_a_base_in_half_precision_with_coefficients_of_its_dtype(method, order):
    base = seeded(tiny_llama).bfloat16()
    config = make_config(method, ["q_proj", "v_proj"], quantize_coefficients=4, contraction=order)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    fill(model)
    assert {p.dtype for p in coefficients_of(model).values()} == {torch.bfloat16}
    loss_of(model.train(), token_batch()).backward()
    assert all(bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in coefficients_of(model).values())


def test_weighted_sums_are_of_the_trained_coefficients():
    model = Case("linear", "nola").adapted(quantize_coefficients=3)
    add_adapter(model, "other", make_config("nola", ["q_proj", "v_proj", "down_proj"], quantize_coefficients=3), seed=2)
    model.base_model.add_weighted_adapter(["default", "other"], [0.25, 0.75], "mean")
    first, second, mean = (list(coefficients_of(model, name).values()) for name in ("default", "other", "mean"))
    for a, b, c in zip(first, second, mean, strict=True):
        torch.testing.assert_close(c, 0.25 * a + 0.75 * b)
    assert model.peft_config["mean"].quantize_coefficients == 3


# --- files ---


@pytest.mark.parametrize("case", CASES)
def test_saved_in_full_precision_and_packed_without_loss(case, tmp_path):
    model = case.adapted(quantize_coefficients=3)
    expected = outputs(model, case.batch())
    model.save_pretrained(tmp_path / "source")
    saved = load_file(tmp_path / "source" / WEIGHTS)
    assert bits(saved) == bits({n.replace(".default", ""): p for n, p in coefficients_of(model).items()} | {
        n: t for n, t in saved.items() if "streams" in n or "meaning" in n
    })  # fmt: skip
    loaded = PeftModel.from_pretrained(case.base(), str(tmp_path / "source")).eval()
    assert loaded.peft_config["default"].quantize_coefficients == 3
    assert torch.equal(outputs(loaded, case.batch()), expected)

    pack_adapter(tmp_path / "source", tmp_path / "file", bits=3)
    for one, delta in read(tmp_path / "file").matrices():
        layer = model.base_model.model.get_submodule(one.name)
        mine = next(m for m in layer.matrices("default") if (m.part.name, m.bound.site) == (one.part, delta.bound.site))
        computed = {n: c.detach() for n, c in layer.coefficients("default", mine).items()}
        assert bits(computed) == bits(delta.coefficients)
    assert torch.equal(outputs(load_packed(case.base(), tmp_path / "file").eval(), case.batch()), expected)


@pytest.mark.parametrize("precision", [32, 16])
def test_a_file_of_more_bits_holds_what_the_model_computes_with(precision, tmp_path):
    case = Case("linear", "nola")
    model = case.adapted(quantize_coefficients=3)
    expected = outputs(model, case.batch())
    model.save_pretrained(tmp_path / "source")
    pack_adapter(tmp_path / "source", tmp_path / "file", bits=precision)
    again = outputs(load_packed(case.base(), tmp_path / "file").eval(), case.batch())
    tolerance = 0 if precision == 32 else 2e-3
    torch.testing.assert_close(again, expected, rtol=tolerance, atol=tolerance)
    unpack_adapter(tmp_path / "file", tmp_path / "again")
    assert PeftConfig.from_pretrained(str(tmp_path / "again")).quantize_coefficients is None
    pack_adapter(tmp_path / "again", tmp_path / "second", bits=precision)
    assert (tmp_path / "second").read_bytes() == (tmp_path / "file").read_bytes()


def test_inspection_is_of_what_the_model_computes_with(tmp_path):
    model = Case("linear", "vera").adapted(quantize_coefficients=2)
    model.save_pretrained(tmp_path)
    found = inspect_adapter(tmp_path, None)
    layer = model.base_model.model.get_submodule(found.matrices[0].name)
    assert found.matrices[0].norm == pytest.approx(float(layer.get_delta_weight("default").detach().norm()), rel=1e-5)


# --- what is refused ---


@pytest.mark.parametrize("value", [1, 5, 16, 32, 0, True, 3.0, "3"])
def test_other_bits_are_refused(value):
    with pytest.raises(PrecisionError, match="quantize_coefficients must be one of"):
        NolaConfig(quantize_coefficients=value)
    assert NolaConfig().quantize_coefficients is None

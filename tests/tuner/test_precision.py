"""Bases in half precision, coefficients in float32, with autocast and without."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tuner_cases import (
    CASES,
    ONE_EACH,
    PLAIN_CASES,
    Case,
    adapted_layers,
    coefficients_of,
    fill,
    loss_of,
    naive_deltas,
    outputs,
)

HALF = [torch.bfloat16, torch.float16]


def half_model(case: Case, dtype: torch.dtype, **options) -> PeftModel:
    model = get_peft_model(case.base().to(dtype), case.config(**options))
    fill(model)
    return model.eval()


def batch_in(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.batch().items()}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", CASES)
def test_coefficients_stay_float32_and_outputs_follow_the_base(case, dtype):
    model = half_model(case, dtype)
    assert {p.dtype for p in coefficients_of(model).values()} == {torch.float32}
    result = outputs(model, batch_in(case, dtype))
    assert result.dtype == dtype
    rounded = case.base()
    for parameter in rounded.parameters():
        parameter.data.copy_(parameter.to(dtype))
    exact = get_peft_model(rounded, case.config())
    fill(exact)
    wanted = outputs(exact.eval(), batch_in(case, dtype) if dtype == torch.float32 else case.batch())
    assert (result.float() - wanted).abs().max() < 0.1 * wanted.abs().max()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", PLAIN_CASES)
def test_training_a_half_precision_base(case, dtype):
    model = half_model(case, dtype).train()
    loss_of(model, batch_in(case, dtype)).backward()
    for name, parameter in coefficients_of(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert bool(torch.isfinite(parameter.grad).all())
        assert bool((parameter.grad != 0).any())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast(case, base_dtype):
    model = half_model(case, base_dtype).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, batch_in(case, base_dtype))
    loss.backward()
    grads = [p.grad for p in coefficients_of(model).values()]
    assert all(g is not None and g.dtype == torch.float32 and bool(torch.isfinite(g).all()) for g in grads)
    exact = case.adapted().train()
    exact_loss = loss_of(exact, case.batch())
    assert abs(loss.item() - exact_loss.item()) < 0.05 * exact_loss.item()
    exact_loss.backward()
    mine = torch.cat([g.flatten() for g in grads])
    theirs = torch.cat([p.grad.flatten() for p in coefficients_of(exact).values()])
    assert torch.cosine_similarity(mine, theirs, dim=0) > 0.9


@pytest.mark.parametrize("method", ONE_EACH)
def test_autocast_computes_in_half_precision(method):
    case = Case("linear", method)
    layer = next(iter(adapted_layers(case.adapted()).values()))
    x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("order", ["token", "weight"])
@pytest.mark.parametrize("method", ONE_EACH)
def test_forced_orders_agree_on_a_half_precision_base(method, order):
    case = Case("c_attn", method)
    model, usual = half_model(case, torch.bfloat16, contraction=order), half_model(case, torch.bfloat16)
    torch.testing.assert_close(outputs(model, case.batch()), outputs(usual, case.batch()), rtol=5e-2, atol=3e-2)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", PLAIN_CASES)
def test_merging_into_half_precision_rounds_the_sum_once(case, dtype):
    model = half_model(case, dtype)
    layers = adapted_layers(model.get_base_model())
    before = {name: layer.get_base_layer().weight.detach().double() for name, layer in layers.items()}
    deltas = naive_deltas(model, case)
    model.merge_adapter()
    step = torch.finfo(dtype).eps
    for name, layer in layers.items():
        delta = deltas[name].T if layer.transposed else deltas[name]
        exact = before[name] + delta
        error = (layer.get_base_layer().weight.double() - exact).abs()
        assert bool((error <= 0.51 * step * exact.abs() + 1e-6).all())


@pytest.mark.parametrize("method", ONE_EACH)
def test_coefficients_in_the_dtype_of_the_base_on_request(method):
    case = Case("linear", method)
    model = get_peft_model(case.base().to(torch.bfloat16), case.config(), autocast_adapter_dtype=False)
    assert {p.dtype for p in coefficients_of(model).values()} == {torch.bfloat16}
    fill(model)
    loss_of(model.train(), case.batch()).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in coefficients_of(model).values())


@pytest.mark.parametrize("law", ["sign", "uniform", "normal", "sparse(6)"])
@pytest.mark.parametrize("method", ONE_EACH)
def test_float16_coefficients_overflow_nowhere(method, law):
    """Entries of the uniform law reach 255, their products 65025: a sum of two of them is infinite in float16."""
    case = Case("linear", method)
    wide = {"r": 200} if method == "vera" else {}
    model = get_peft_model(case.base().half(), case.config(law=law, **wide), autocast_adapter_dtype=False)
    fill(model)
    results = [outputs(model.eval(), case.batch())]
    model.merge_adapter(safe_merge=True)
    results.append(outputs(model, case.batch()))
    assert {p.dtype for p in coefficients_of(model).values()} == {torch.float16}
    torch.testing.assert_close(results[0], results[1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("method", ONE_EACH)
def test_reload_onto_a_half_precision_base_is_exact(method, tmp_path):
    case = Case("linear", method)
    model = half_model(case, torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(case.base().to(torch.bfloat16), tmp_path).eval()
    assert {p.dtype for p in coefficients_of(again).values()} == {torch.float32}
    assert torch.equal(outputs(again, case.batch()), outputs(model, case.batch()))


@pytest.mark.parametrize("case", PLAIN_CASES)
def test_double_precision_model(case):
    """In float64 both orders agree to float64, so no factor was rounded to float32 on the way."""
    found = []
    for order in ("token", "weight"):
        model = get_peft_model(case.base().double(), case.config(contraction=order))
        model.double()
        fill(model)
        found.append(outputs(model.eval(), batch_in(case, torch.float64)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-10)

"""torch.jit.trace and torch.func: right, before and after the first forward pass; what cannot be right is refused."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from transformers import BertConfig, BertModel
from tuner_cases import ONE_EACH, OPTIONS, Case, adapted_layers, coefficients_of, make_config, outputs, seeded

from randbasis import contraction
from randbasis.errors import DifferentiationError

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")

ORDERS = ["auto", "token", "weight"]
STORAGES = ["auto", "packed", "recompute"]


def poison() -> None:
    """Memory that is given back full of large numbers."""
    junk = [torch.full((n,), 1e30) for n in (64, 128, 256, 512, 1024, 2304) for _ in range(100)]
    del junk


# --- torch.jit.trace ---


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("method", OPTIONS)
def test_a_traced_module_computes_what_the_module_does(method, gradients, warm, order, storage):
    seed = 1000 + 100 * ORDERS.index(order) + 10 * STORAGES.index(storage) + 2 * warm + gradients  # a basis of its own
    case = Case("in_proj", method)
    model = case.adapted(contraction=order, basis_storage=storage, seed=seed).base_model.model
    x = case.batch(3)["x"]
    if warm:
        outputs(model, {"x": x})
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, x)  # traces again without gradients, and compares
    poison()
    for batch in (x, case.batch(5)["x"]):
        torch.testing.assert_close(outputs(traced, {"x": batch}), outputs(model, {"x": batch}), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ONE_EACH)
def test_a_traced_module_follows_its_coefficients_and_nothing_traced_is_kept(method):
    case = Case("in_proj", method)
    model = case.adapted().base_model.model
    x = case.batch(3)["x"]
    outputs(model, {"x": x})
    traced = torch.jit.trace(model, x)
    for parameter in coefficients_of(model).values():
        parameter.data.mul_(1.5)
    torch.testing.assert_close(outputs(traced, {"x": x}), outputs(model, {"x": x}), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ONE_EACH)
def test_a_traced_encoder(method):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(**sizes, vocab_size=64, return_dict=False, attn_implementation="eager")
    model = get_peft_model(seeded(BertModel, config), make_config(method, ["query", "dense"], init_weights=False))
    base = model.eval().base_model.model
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    traced = torch.jit.trace(base, ids)
    poison()
    with torch.no_grad():
        torch.testing.assert_close(traced(ids)[0], base(ids)[0], rtol=1e-4, atol=1e-5)


# --- torch.func ---


def loss_of(model: nn.Module, coefficients: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return functional_call(model, coefficients, (x,)).square().mean()


def in_double(method: str, order: str, storage: str = "auto"):
    """A model without attention, whose fused kernels have no forward derivative, and its coefficients and input."""
    base = seeded(lambda: nn.Sequential(nn.Linear(24, 36), nn.Tanh(), nn.Linear(36, 20)))
    options = {"contraction": order, "basis_storage": storage, "init_weights": False}
    model = get_peft_model(base, make_config(method, ["0", "2"], **options)).eval().double()
    x = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return model, {name: p.detach() for name, p in coefficients_of(model).items()}, x


def by_backward(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in coefficients_of(model).items()}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("method", OPTIONS)
def test_gradients_of_torch_func(method, warm, order, storage):
    model, coefficients, x = in_double(method, order, storage)
    if warm:
        outputs(model, {"input": x})
    found = grad(lambda c: loss_of(model, c, x))(coefficients)
    expected = by_backward(model, x)
    torch.testing.assert_close(found, expected)
    each = vmap(lambda row: grad(lambda c: loss_of(model, c, row[None]))(coefficients))(x)
    torch.testing.assert_close({name: values.mean(0) for name, values in each.items()}, expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("method", OPTIONS)
def test_forward_and_second_derivatives_of_torch_func(method, order):
    model, coefficients, x = in_double(method, order)
    generator = torch.Generator().manual_seed(2)
    along = {n: torch.randn(c.shape, dtype=c.dtype, generator=generator) for n, c in coefficients.items()}
    _, slope = jvp(lambda c: loss_of(model, c, x), (coefficients,), (along,))
    expected = grad(lambda c: loss_of(model, c, x))(coefficients)
    torch.testing.assert_close(slope, sum((expected[n] * along[n]).sum() for n in along))
    _, found = jvp(grad(lambda c: loss_of(model, c, x)), (coefficients,), (along,))
    step = 1e-5
    ahead, behind = (
        grad(lambda c: loss_of(model, c, x))({n: c + sign * step * along[n] for n, c in coefficients.items()})
        for sign in (1, -1)
    )
    torch.testing.assert_close(found, {n: (ahead[n] - behind[n]) / (2 * step) for n in along}, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", OPTIONS)
def test_nothing_of_a_transform_is_kept(method):
    model, coefficients, x = in_double(method, "auto")
    model.requires_grad_(False)
    expected = outputs(model, {"input": x})
    for layer in adapted_layers(model).values():
        layer._forget()
    with torch.no_grad():
        vmap(lambda row: functional_call(model, coefficients, (row[None],)))(x)
        vmap(lambda row: model(row[None]))(x)
    torch.testing.assert_close(outputs(model, {"input": x}), expected)
    torch.testing.assert_close(model(x), expected)


# --- second derivatives without torch.func ---


@pytest.mark.parametrize("order", ["token", "weight"])
@pytest.mark.parametrize("method", OPTIONS)
def test_second_derivatives_are_right(method, order):
    """By tokens, the way out that the refusal names, and wherever a layer is small, which has no pass of our own."""
    model, coefficients, x = in_double(method, order)
    parameters = list(coefficients_of(model).values())
    first = torch.autograd.grad(model(x).square().mean(), parameters, create_graph=True)
    along = [torch.ones_like(p) for p in parameters]
    found = torch.autograd.grad(sum((g * a).sum() for g, a in zip(first, along, strict=True)), parameters)
    tangents = dict(zip(coefficients, along, strict=True))
    _, expected = jvp(grad(lambda c: loss_of(model, c, x)), (coefficients,), (tangents,))
    torch.testing.assert_close(dict(zip(coefficients, found, strict=True)), expected)


@pytest.mark.parametrize("method", ONE_EACH)
def test_a_graph_of_the_fused_backward_pass_is_refused(method, monkeypatch):
    """Even where the gradient that comes in needs none: torch would take the result for a constant."""
    monkeypatch.setattr(contraction, "SMALL_WORK", 0)
    model, _, x = in_double(method, "weight")
    with pytest.raises(DifferentiationError, match="contraction='token'"):
        torch.autograd.grad(model(x).sum(), list(coefficients_of(model).values()), create_graph=True)
    assert by_backward(model, x)

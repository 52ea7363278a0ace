"""Our VeRA with PEFT's own frozen matrices in place of ours: the same ΔW, the same h, the same gradients."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from method_cases import draw
from torch import Tensor, nn

from randbasis.contraction import weight_order
from randbasis.laws import parse_law
from randbasis.methods import Site, Vera

peft = pytest.importorskip("peft")
WIDE, NARROW = (40, 56), (24, 32)
RANK = 9


@pytest.fixture
def layers() -> dict[str, Any]:
    """PEFT's VeRA on two layers of different shapes, with coefficients as if trained."""
    with torch.random.fork_rng(devices=[]):
        model = nn.ModuleDict({"wide": nn.Linear(WIDE[1], WIDE[0]), "narrow": nn.Linear(NARROW[1], NARROW[0])})
        config = peft.VeraConfig(r=RANK, target_modules=["wide", "narrow"], projection_prng_key=7)
        found = dict(peft.get_peft_model(model, config).double().base_model.model.items())
    with torch.no_grad():
        for place, layer in enumerate(found.values()):
            layer.vera_lambda_d["default"].copy_(draw(RANK, seed=place))
            layer.vera_lambda_b["default"].copy_(draw(layer.out_features, seed=10 + place))
    return found


@pytest.fixture(params=["wide", "narrow"])
def pair(request: pytest.FixtureRequest, layers: dict[str, Any], inject: Callable[..., None]) -> tuple[Any, ...]:
    """PEFT's layer, and our method with that layer's slices of PEFT's matrices injected."""
    layer = layers[request.param]
    method = Vera(r=RANK, basis_storage="dense")
    site = Site(layer.out_features, layer.in_features, method.streams())
    # Ours are of unit variance and scaled by √(2/in) and √(2/r) of the layer; theirs have a scale already.
    a = layer.vera_A["default"][:, : layer.in_features].double() / math.sqrt(2 / layer.in_features)
    b = layer.vera_B["default"][: layer.out_features].double() / math.sqrt(2 / RANK)
    inject(method, site, a.unsqueeze(0), b.T.contiguous().unsqueeze(0))
    coefficients = {
        "vera_d": layer.vera_lambda_d["default"].detach().clone().requires_grad_(),
        "vera_b": layer.vera_lambda_b["default"].detach().clone().requires_grad_(),
    }
    return layer, method, site, coefficients


def test_delta(pair: tuple[Any, ...]) -> None:
    layer, method, site, coefficients = pair
    expected = layer.get_delta_weight("default")
    assert expected.abs().max().item() > 0.01
    torch.testing.assert_close(method.bind(site).matrix(coefficients), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(method.bind(site).factors(coefficients).matrix(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("order", ["token", "weight"])
def test_output_and_gradients(pair: tuple[Any, ...], order: str) -> None:
    layer, method, site, coefficients = pair
    x = draw(3, 5, site.in_features, seed=50)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = layer(theirs) - layer.base_layer(theirs)
    h = (
        method.bind(site).delta(coefficients).apply(ours)
        if order == "token"
        else weight_order(ours, method.bind(site).matrix(coefficients))
    )
    torch.testing.assert_close(h, expected, rtol=1e-6, atol=1e-6)
    weights = draw(*h.shape, seed=51)
    their_leaves: list[Tensor] = [layer.vera_lambda_d["default"], layer.vera_lambda_b["default"], theirs]
    wanted = torch.autograd.grad(expected, their_leaves, weights)
    found = torch.autograd.grad(h, [*coefficients.values(), ours], weights)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_counts_and_starts_are_theirs(layers: dict[str, Any]) -> None:
    method = Vera(r=RANK)
    for layer in layers.values():
        theirs = (layer.vera_lambda_d["default"], layer.vera_lambda_b["default"])
        shapes = method.coefficient_shapes(layer.out_features, layer.in_features)
        assert [tuple(tensor.shape) for tensor in theirs] == list(shapes.values())
        layer.reset_vera_parameters("default")
        starts = method.starts(layer.out_features, layer.in_features).values()
        for tensor, start in zip(theirs, starts, strict=True):
            torch.testing.assert_close(tensor.detach(), torch.full_like(tensor, start), rtol=1e-6, atol=0)


def test_where_we_differ_a_narrow_layer_keeps_its_own_scale(layers: dict[str, Any]) -> None:
    """PEFT slices one matrix of the widest layer and leaves its scale: too small by √(in / widest in) here."""
    deviation = layers["narrow"].vera_A["default"][:, : NARROW[1]].std().item()
    assert deviation == pytest.approx(math.sqrt(2 / WIDE[1]), rel=0.1)
    ours = Vera(r=200, law="uniform")
    site = Site(*NARROW, ours.streams())
    ones = {"vera_d": torch.ones(200), "vera_b": torch.ones(NARROW[0])}
    assert ours.bind(site).factors(ones).down.std().item() * parse_law(ours.law).unit == pytest.approx(1, rel=0.1)
    assert ours.bind(site).matrix(ones).square().mean().item() == pytest.approx(4 / NARROW[1], rel=0.15)

"""Our RandLoRA with PEFT's own frozen matrices in place of ours: the same ΔW, the same h, the same gradients.

PEFT flattens the terms of A as (rank, term) and those of B as (term, rank), so it pairs column ``j·r + k`` of B with
row ``k·n + j`` of Λ A Γ: not the pairs of the paper's sum, but a fixed permutation of them. To reproduce it, the
columns of B are put in the order in which PEFT uses them.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from method_cases import draw, trained
from torch import Tensor, nn

from randbasis.contraction import weight_order
from randbasis.methods import RandLora, Site

peft = pytest.importorskip("peft")
SHAPES = {"square": (24, 24), "tall": (40, 24), "wide": (20, 36), "ragged": (26, 22), "r>min": (9, 4)}
RANK = 5
ALPHA = 15


def their_layer(shape: tuple[int, int]) -> Any:
    """PEFT's RandLoRA on one layer in float64, with coefficients as if trained."""
    with torch.random.fork_rng(devices=[]):
        model = nn.ModuleDict({"layer": nn.Linear(shape[1], shape[0])})
        config = peft.RandLoraConfig(r=RANK, randlora_alpha=ALPHA, target_modules=["layer"], projection_prng_key=7)
        layer = peft.get_peft_model(model, config).double().base_model.model["layer"]
    with torch.no_grad():
        layer.randlora_lambda["default"].copy_(draw(*layer.randlora_lambda["default"].shape, seed=1))
        layer.randlora_gamma["default"].copy_(draw(*layer.randlora_gamma["default"].shape, seed=2))
    for frozen in (layer.randlora_A, layer.randlora_B):
        frozen["default"] = frozen["default"].double()
    return layer


def their_matrices(layer: Any, *, as_they_pair: bool) -> tuple[Tensor, Tensor]:
    """A ``[1, r, min]`` and B ``[n, r, max]``, Bⱼ transposed, in PEFT's order of use or in that of its tensor."""
    small, large = sorted((layer.in_features, layer.out_features))
    a = layer.randlora_A["default"][:, 0, :small]
    b = layer.randlora_B["default"][:large, : layer.num_bases]  # [max, n, r]
    if as_they_pair:
        n, r = b.shape[1:]
        flat = b.flatten(1)
        b = torch.stack([torch.stack([flat[:, k * n + j] for k in range(r)], -1) for j in range(n)], 1)
    return a.unsqueeze(0).contiguous(), b.permute(1, 2, 0).contiguous()


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def pair(request: pytest.FixtureRequest, inject: Callable[..., None]) -> tuple[Any, ...]:
    layer = their_layer(request.param)
    method = RandLora(r=RANK, alpha=ALPHA, basis_storage="dense")
    site = Site(*request.param, method.streams())
    inject(method, site, *their_matrices(layer, as_they_pair=True))
    coefficients = {
        "randlora_lambda": layer.randlora_lambda["default"].detach().T.contiguous().requires_grad_(),
        "randlora_gamma": layer.randlora_gamma["default"].detach().clone().requires_grad_(),
    }
    return layer, method, site, coefficients


def test_delta(pair: tuple[Any, ...]) -> None:
    layer, method, site, coefficients = pair
    expected = layer.get_delta_weight("default")
    torch.testing.assert_close(method.bind(site).matrix(coefficients), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(method.bind(site).factors(coefficients).matrix(), expected, rtol=1e-10, atol=1e-10)


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
    torch.testing.assert_close(h, expected, rtol=1e-10, atol=1e-9)
    weights = draw(*h.shape, seed=51)
    their_leaves = [layer.randlora_lambda["default"], layer.randlora_gamma["default"], theirs]
    lam, gamma, x_gradient = torch.autograd.grad(expected, their_leaves, weights)
    found = torch.autograd.grad(h, [*coefficients.values(), ours], weights)
    for one, two in zip(found, (lam.T, gamma, x_gradient), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-8)


def test_counts_and_starts_are_theirs() -> None:
    for shape in SHAPES.values():
        layer, method = their_layer(shape), RandLora(r=RANK)
        theirs = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
        assert method.terms(*shape) == layer.num_bases
        assert method.count(*shape) == sum(tensor.numel() for tensor in theirs)
        layer.reset_randlora_parameters("default")
        for tensor, start in zip(theirs, method.starts(*shape).values(), strict=True):
            torch.testing.assert_close(tensor.detach(), torch.full_like(tensor, start), rtol=1e-6, atol=0)


def test_default_scaling_is_theirs() -> None:
    default = peft.RandLoraConfig()
    ours, explicit = RandLora(r=default.r), RandLora(r=default.r, alpha=default.randlora_alpha)
    site = Site(40, 36, ours.streams())
    values = trained(ours, site)
    torch.testing.assert_close(ours.bind(site).matrix(values), explicit.bind(site).matrix(values), rtol=1e-12, atol=0)


def test_their_matrices_have_unit_variance_as_ours() -> None:
    layer = their_layer((64, 48))
    for tensor in (layer.randlora_A["default"], layer.randlora_B["default"]):
        assert tensor.std().item() == pytest.approx(1, rel=0.01)


def test_where_they_differ_from_the_paper(inject: Callable[..., None]) -> None:
    """With B in the order of its tensor our sum is the paper's, and PEFT's is not: equal in distribution alone."""
    shape = SHAPES["tall"]
    layer = their_layer(shape)
    method = RandLora(r=RANK, alpha=ALPHA, basis_storage="dense", seed=1)
    site = Site(*shape, method.streams())
    a, b = their_matrices(layer, as_they_pair=False)
    inject(method, site, a, b)
    lam = layer.randlora_lambda["default"].detach().T
    gamma = layer.randlora_gamma["default"].detach()
    paper = sum(b[j].T @ torch.diag(lam[j]) @ a[0] @ torch.diag(gamma[j]) for j in range(method.terms(*shape))) * (
        ALPHA / RANK
    )
    ours = method.bind(site).matrix({"randlora_lambda": lam, "randlora_gamma": gamma})
    theirs = layer.get_delta_weight("default").detach()
    torch.testing.assert_close(ours, paper, rtol=1e-10, atol=1e-10)
    assert (ours - theirs).abs().max().item() > 0.1 * theirs.abs().max().item()
    # The number of terms and the variance are the same, so is the size of ΔW.
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.25)

"""NOLA and PRANC on disjoint matrices, math (25): beside the contract, what is theirs alone."""

import math

import pytest
import torch
from method_cases import draw, leaves

from randbasis.methods import Method, Nola, Pranc, Site

METHODS = {
    "nola": Nola(r=4, num_basis=40, num_basis_b=7, alpha=6.0, law="hashed"),
    "nola plain": Nola(r=4, num_basis=40, num_basis_b=7, alpha=6.0, law="hashed", parametrization="plain"),
    "nola of one": Nola(r=4, num_basis=1, num_basis_b=9, alpha=6.0, law="hashed"),
    "pranc": Pranc(num_basis=30, law="hashed"),
}


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return request.param


def coefficients(method: Method, site: Site, *batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    shapes = method.coefficient_shapes(site.out_features, site.in_features)
    return {name: draw(*batch, *shape, seed=seed + at) for at, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("storage", ["auto", "packed", "dense", "recompute"])
def test_bases_are_kept_as_words(method: Method, storage: str) -> None:
    site = Site(60, 50, method.streams())
    bound = type(method)(**{**vars(method), "basis_storage": storage}).bind(site)
    bound.matrix(coefficients(method, site))
    for one in bound.bases:
        slab = one.slab
        assert slab.basis.law.name == f"hashed({slab.count})"
        if slab.count > 1:
            assert one.nbytes == (0 if storage == "recompute" else 16 * slab.rows * -(-slab.cols // 4))


def test_pranc_is_an_isometry_up_to_a_factor() -> None:
    """``‖ΔW‖² = Σ nᵢ aᵢ²``: (18) with its 1/√k, at about ``out · in / k`` places a coefficient."""
    method = Pranc(num_basis=100, law="hashed", seed=5)
    site = Site(80, 90, method.streams())
    a = draw(100)
    bound = method.bind(site)
    counts = torch.stack([bound.matrix({"pranc_a": one}).square().sum() for one in torch.eye(100, dtype=a.dtype)])
    assert torch.equal(counts.round(), counts.round(decimals=9))
    assert counts.sum().item() == pytest.approx(80 * 90)
    lengths = bound.matrix({"pranc_a": a}).square().sum()
    torch.testing.assert_close(lengths, (counts * a.square()).sum())
    assert lengths.item() == pytest.approx(72 * a.square().sum().item(), rel=4 / math.sqrt(72))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_that_share_nothing_but_words(method: Method, rows: int, dtype: torch.dtype) -> None:
    """``apply_shared``, math (23): each row by its own factors, in the dtype of the tokens."""
    site = Site(30, 50, method.streams())
    bound = method.bind(site)
    own, x = coefficients(method, site, rows), draw(3, 5, 50, seed=9)
    expected = torch.stack([
        x[row] @ bound.matrix({name: values[row % rows] for name, values in own.items()}).T for row in range(3)
    ])  # fmt: skip
    given = {name: values if dtype == torch.float64 else values.float() for name, values in own.items()}
    found = bound.apply_shared(x.to(dtype), given)
    assert found.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_the_price_of_rows_does_not_grow_with_k() -> None:
    site = Site(64, 64, (1, 2, 3))
    for small, large in (
        (Nola(r=4, num_basis=8, alpha=4.0, law="hashed"), Nola(r=4, num_basis=4096, alpha=4.0, law="hashed")),
        (Pranc(num_basis=8, law="hashed"), Pranc(num_basis=4096, law="hashed")),
    ):
        assert small.bind(site).shared_cost(100) == large.bind(site).shared_cost(100)
        assert small.bind(site).shared_cost(100) == 2 * small.bind(site).token_cost(100, training=False)
    assert Pranc(num_basis=8).bind(site).shared_cost(100) < Pranc(num_basis=4096).bind(site).shared_cost(100)


@pytest.mark.parametrize("k", [64, 65536])
@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
def test_float16_loses_nothing_to_the_root_of_k(k: int, size: float) -> None:
    """Coefficients, gradients and products as large as those of any other law, whatever k is."""
    for method in (Nola(r=4, num_basis=k, num_basis_b=k, alpha=4.0, law="hashed"), Pranc(num_basis=k, law="hashed")):
        site = Site(96, 512, method.streams())
        bound = method.bind(site)
        values = {name: size * one for name, one in coefficients(method, site).items()}
        exact, half = leaves(values), leaves({name: one.half() for name, one in values.items()})
        wanted, found = bound.factors(exact), bound.factors(half)
        pairs = [(wanted.down, found.down)] + ([] if wanted.up is None else [(wanted.up, found.up)])
        for one, other in pairs:
            assert other is not None
            assert other.dtype == torch.float16
            torch.testing.assert_close(other.double(), one, rtol=4e-3, atol=2e-4 * size)
        weights = [draw(*one.shape, seed=3) for one, _ in pairs]
        gradients = torch.autograd.grad([one for one, _ in pairs], list(exact.values()), weights)
        half_gradients = torch.autograd.grad(
            [one for _, one in pairs], list(half.values()), [w.half() for w in weights]
        )
        for one, other in zip(gradients, half_gradients, strict=True):
            torch.testing.assert_close(other.double(), one, rtol=4e-3, atol=4e-3)


def test_second_derivatives(method: Method) -> None:
    site = Site(5, 6, method.streams())
    bound, values = method.bind(site), leaves(coefficients(method, site))

    def run(*given: torch.Tensor) -> torch.Tensor:
        return bound.factors(dict(zip(values, given, strict=True))).matrix().square()

    weights = draw(5, 6, seed=6).requires_grad_()
    assert torch.autograd.gradgradcheck(run, tuple(values.values()), weights)


def test_transforms_of_torch_func(method: Method) -> None:
    site = Site(5, 6, method.streams())
    bound, values = method.bind(site), coefficients(method, site, 3)
    loss = lambda given: bound.matrix(given).pow(3).sum()  # noqa: E731
    together = torch.func.vmap(torch.func.grad(loss))(values)
    for row in range(3):
        alone = leaves({name: one[row] for name, one in values.items()})
        wanted = torch.autograd.grad(loss(alone), list(alone.values()))
        for one, other in zip(together.values(), wanted, strict=True):
            torch.testing.assert_close(one[row], other, rtol=1e-11, atol=1e-11)

"""Products in float16 against float64, for every method, law and storage, whatever the size of x."""

import pytest
import torch

from randbasis.basis import Basis, basis_entries
from randbasis.methods import Nola, Pranc, RandLora, Site, Vera
from randbasis.ops import Slab, entries, hold, project

LAWS = ("sign", "uniform", "normal", "sparse(3)", "sparse(40)")
STORAGES = ("dense", "packed", "recompute")
SIZES = (1e-4, 1.0, 60.0)
METHODS = {
    "nola": (Nola, {"r": 4, "num_basis": 8, "alpha": 4.0}),
    "vera": (Vera, {"r": 64}),
    "randlora": (RandLora, {"r": 32, "alpha": 8.0}),
    "pranc": (Pranc, {"num_basis": 4}),
}
#: Half of the distance of two neighbours in float16 is 2**-11; a handful follow each other, some of small numbers.
TOLERANCE = 4e-3


@pytest.fixture(params=["reference", "auto"], autouse=True)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANDBASIS_BACKEND", request.param)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, but to no less than the smallest number that float16 holds with all its bits."""
    least = torch.finfo(torch.float16).tiny * wanted.numel() ** 0.5
    return float((got.detach().double() - wanted).norm() / wanted.norm().clamp_min(least))


@pytest.mark.parametrize("shape", [(96, 512), (512, 96)], ids=["wide", "tall"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", METHODS)
def test_token_order_in_float16_is_the_float64_product(name: str, law: str, storage: str, shape: tuple[int, int]):
    """Tokens of a size of 1e-4 lose nothing to the subnormal numbers, large ones do not overflow."""
    made, options = METHODS[name]
    method = made(law=law, basis_storage=storage, seed=3, **options)
    site = Site(*shape, method.streams("a.layer"))
    bound = method.bind(site)
    coefficients = {
        key: 0.5 * draw(*size, seed=place)
        for place, (key, size) in enumerate(method.coefficient_shapes(*shape).items())
    }
    if name == "randlora":  # its full-rank change would leave float16 by itself
        coefficients["randlora_gamma"] = coefficients["randlora_gamma"] / 16
    delta = bound.matrix({key: value.double() for key, value in coefficients.items()})
    prepared = {key: value.half().unsqueeze(0) for key, value in bound.prepare(coefficients).items()}
    for size in SIZES:
        x = (size * draw(1, 12, shape[1], seed=9)).half().requires_grad_()
        got = bound.apply(x, prepared)
        gradient = draw(*got.shape, seed=11).half()
        (for_x,) = torch.autograd.grad(got, x, gradient)
        assert error(got, x.detach().double() @ delta.T) < TOLERANCE, size
        assert error(for_x, gradient.double() @ delta) < TOLERANCE, size
    assert {one.storage for one in bound.bases} == {storage}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("law", LAWS)
def test_a_sum_over_4096_columns_stays_in_float16(law: str, storage: str):
    """Plain integers of the uniform law would sum to 147 · 64 · 60, far beyond 65504."""
    slab = Slab(Basis.named(5, 7, law), 1, 40, 4096)
    held = hold(slab, storage)
    matrix = basis_entries(5, 7, law, (1, 40, 4096))[0].double() * slab.basis.law.power
    assert torch.equal(entries(held, torch.float16, torch.device("cpu"))[0].double(), matrix)
    for size in SIZES:
        x = (size * draw(3, 4096)).half()
        y = (size * draw(3, 40)).half()
        assert error(project(x, held), x.double() @ matrix.T) < TOLERANCE
        assert error(project(y, held, transpose=True), y.double() @ matrix) < TOLERANCE
    assert held.storage == storage

"""The nearest NOLA, VeRA and PRANC: each half against a dense solver, the whole against what was put in."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from randbasis import Nola, Pranc, RandLora, Vera
from randbasis.errors import HyperparameterError, UnknownMethodError
from randbasis.importing.least_squares import Bases, Fit, Stop, nearest
from randbasis.importing.nola_problem import NolaProblem
from randbasis.importing.vera_problem import VeraProblem
from randbasis.methods import Factors, Method, Site

OUT, IN = 24, 20
METHODS: dict[str, Method] = {
    "nola": Nola(r=3, num_basis=7, num_basis_b=9, alpha=6.0, seed=5),
    "nola-plain": Nola(r=3, num_basis=7, num_basis_b=9, alpha=6.0, parametrization="plain", law="normal"),
    "nola-own-basis": Nola(r=2, num_basis=6, alpha=1.0, share_basis=False, law="uniform"),
    "nola-hashed": Nola(r=3, num_basis=7, num_basis_b=9, alpha=6.0, law="hashed"),
    "nola-wide": Nola(r=22, num_basis=5, alpha=6.0),
    "vera": Vera(r=6, seed=3),
    "vera-sparse": Vera(r=8, law="sparse(3)", d_initial=0.0),
    "vera-wide": Vera(r=40, law="normal"),
}


@pytest.fixture(params=METHODS.values(), ids=METHODS.keys())
def method(request: pytest.FixtureRequest) -> Method:
    return request.param


def place(method: Method, out: int = OUT, in_: int = IN) -> Site:
    return Site(out, in_, method.streams("layer"))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(method: Method, matrix: Site) -> dict[str, Tensor]:
    shapes = method.coefficient_shapes(matrix.out_features, matrix.in_features)
    return {name: drawn(*shape, seed=place) for place, (name, shape) in enumerate(shapes.items())}


def any_lora(rank: int = 4, seed: int = 7) -> Factors:
    return Factors(drawn(OUT, rank, seed=seed), drawn(rank, IN, seed=seed + 1))


def problem(method: Method, wanted: Factors) -> NolaProblem | VeraProblem:
    matrix = place(method)
    if isinstance(method, Nola):
        return NolaProblem(method, Bases().nola(method, matrix), wanted)
    assert isinstance(method, Vera)
    return VeraProblem(method.bind(matrix), wanted)


def names(method: Method) -> tuple[str, str]:
    """Of the vector that a turn starts from, and of the other."""
    return ("nola_a", "nola_b") if isinstance(method, Nola) else ("vera_d", "vera_b")


def dense_half(method: Method, fixed: dict[str, Tensor], free: str, wanted: Tensor) -> Tensor:
    """The best vector by a dense solver on all entries: ΔW is affine in each vector, so its columns are differences."""
    matrix = place(method)
    shape = method.coefficient_shapes(OUT, IN)[free]

    def delta(values: Tensor) -> Tensor:
        return method.bind(matrix).factors(fixed | {free: values}).matrix().flatten()

    constant = delta(torch.zeros(shape, dtype=torch.float64))
    columns = [delta(one) - constant for one in torch.eye(shape[0], dtype=torch.float64)]
    system, right = torch.stack(columns, 1), (wanted.flatten() - constant).unsqueeze(1)
    return torch.linalg.lstsq(system, right, driver="gelsd").solution.squeeze(1)


def test_both_halves_of_a_turn_against_a_dense_solver(method: Method):
    wanted = any_lora()
    first, second = names(method)
    start = next(problem(method, wanted).starts())
    new_first, new_second, residual = problem(method, wanted).turn(start)
    expected = dense_half(method, {first: start}, second, wanted.matrix())
    torch.testing.assert_close(new_second, expected, rtol=1e-6, atol=1e-8)
    best = method.bind(place(method)).factors({first: new_first, second: new_second}).matrix()
    again = dense_half(method, {second: new_second}, first, wanted.matrix())
    against = method.bind(place(method)).factors({first: again, second: new_second}).matrix()
    torch.testing.assert_close(best, against, rtol=1e-6, atol=1e-8)
    assert residual == pytest.approx(float((wanted.matrix() - best).square().sum()), rel=1e-9)


def test_what_the_method_can_say_is_found_again(method: Method):
    matrix = place(method)
    wanted = method.bind(matrix).factors(trained(method, matrix))
    fit = nearest(method.bind(matrix), wanted)
    # With r above both sides the rows of A span everything, so no start finds them, and turns come near slowly.
    spans_all = isinstance(method, Nola) and method.r > min(OUT, IN)
    assert fit.residual < (1e-2 if spans_all else 1e-6)
    assert fit.norm == pytest.approx(float(wanted.matrix().norm()), rel=1e-12)


def test_of_an_offset_the_coefficients_themselves_are_found_again():
    method = METHODS["nola"]
    values = trained(method, place(method))
    fit = nearest(method.bind(place(method)), method.bind(place(method)).factors(values))
    for name, expected in values.items():
        torch.testing.assert_close(fit.coefficients[name].double(), expected, rtol=1e-5, atol=1e-5)


def test_what_it_cannot_say_is_left_near_1_and_told_exactly(method: Method):
    wanted = any_lora()
    fit = nearest(method.bind(place(method)), wanted)
    reached = method.bind(place(method)).matrix({name: values.double() for name, values in fit.coefficients.items()})
    assert fit.distance == pytest.approx(float((wanted.matrix() - reached).norm()), rel=1e-6)
    assert 0.5 < fit.residual < 1.0
    assert all(values.dtype == torch.float32 for values in fit.coefficients.values())


def test_no_turn_raises_the_residual(method: Method):
    residuals = nearest(method.bind(place(method)), any_lora(), stop=Stop(turns=40, tolerance=0.0)).residuals
    assert len(residuals) > 2
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(residuals))


def test_the_same_ΔW_gives_the_same_bits(method: Method):
    runs: list[Fit] = [nearest(method.bind(place(method)), any_lora()) for _ in range(2)]
    for name, values in runs[0].coefficients.items():
        assert torch.equal(values, runs[1].coefficients[name])


def test_it_stops_where_a_turn_gains_little(method: Method):
    short = nearest(method.bind(place(method)), any_lora(), stop=Stop(turns=100, tolerance=0.05))
    long = nearest(method.bind(place(method)), any_lora(), stop=Stop(turns=100, tolerance=1e-9))
    assert len(short.residuals) < len(long.residuals) <= 101
    assert short.residual >= long.residual


def test_no_change_gives_no_change(method: Method):
    nothing = Factors(torch.zeros(OUT, 2, dtype=torch.float64), drawn(2, IN))
    fit = nearest(method.bind(place(method)), nothing)
    assert (fit.norm, fit.distance, fit.residual) == (0.0, 0.0, 0.0)
    assert all(bool(torch.isfinite(values).all()) for values in fit.coefficients.values())


def test_free_scales_are_those_of_the_start():
    plain, vera = METHODS["nola-plain"], METHODS["vera"]
    fit = nearest(plain.bind(place(plain)), any_lora())
    assert isinstance(plain, Nola)
    assert fit.coefficients["nola_a"].norm() * plain.num_basis**0.5 == pytest.approx(
        float(fit.coefficients["nola_b"].norm()) * plain.basis_b**0.5, rel=1e-5
    )
    found = nearest(vera.bind(place(vera)), any_lora()).coefficients["vera_d"]
    assert found.square().mean().sqrt().item() == pytest.approx(0.1, rel=1e-5)
    assert found.sum() > 0


def test_bases_of_layers_that_share_them_are_made_once():
    bases, shared, own = Bases(), METHODS["nola"], METHODS["nola-own-basis"]
    for method in (shared, shared, own):
        nearest(method.bind(place(method)), any_lora(), bases=bases)
    assert len(bases.sides) == 2


def test_refusals():
    method = Nola(r=64, num_basis=300, alpha=1.0)
    with pytest.raises(HyperparameterError, match=r"r · num_basis must be below 16384 for a fit, got 64 · 300"):
        nearest(method.bind(place(method)), any_lora())
    wide = Pranc(num_basis=1 << 14)
    with pytest.raises(HyperparameterError, match=r"at most 268435456 for a fit of pranc, got 16384 · 200 · 100"):
        nearest(wide.bind(place(wide, 200, 100)), Factors(drawn(200, 2), drawn(2, 100)))
    other = RandLora(r=3)
    with pytest.raises(UnknownMethodError, match="'nola', 'vera', 'pranc', got 'randlora'"):
        nearest(other.bind(place(other)), any_lora())


PRANCS = {
    "sign": Pranc(num_basis=9, seed=4),
    "normal": Pranc(num_basis=30, law="normal", share_basis=False),
    "more than entries": Pranc(num_basis=OUT * IN + 5),
}


@pytest.mark.parametrize("method", PRANCS.values(), ids=PRANCS.keys())
def test_pranc_against_a_dense_solver(method: Pranc):
    wanted, bound = any_lora(), method.bind(place(method))
    fit = nearest(bound, wanted)
    columns = bound.factors({"pranc_a": torch.eye(method.num_basis, dtype=torch.float64)}).down.flatten(1).T.numpy()
    expected, *_ = np.linalg.lstsq(columns, wanted.matrix().flatten().numpy(), rcond=None)
    np.testing.assert_allclose(fit.coefficients["pranc_a"].double().numpy(), expected, rtol=1e-4, atol=1e-6)
    left = float(np.linalg.norm(columns @ expected - wanted.matrix().flatten().numpy()))
    assert fit.distance == pytest.approx(left, rel=1e-5, abs=1e-4)
    assert fit.residuals[0] ** 0.5 == pytest.approx(left, rel=1e-5, abs=1e-4)
    assert len(fit.residuals) == 1


def test_pranc_finds_its_own_coefficients_again():
    method = PRANCS["normal"]
    values = trained(method, place(method))
    delta = method.bind(place(method)).factors(values).down
    left, core, right = torch.linalg.svd(delta, full_matrices=False)
    fit = nearest(method.bind(place(method)), Factors(left * core, right))
    assert fit.residual < 1e-6
    torch.testing.assert_close(fit.coefficients["pranc_a"].double(), values["pranc_a"], rtol=1e-5, atol=1e-5)


def test_a_basis_of_pranc_is_kept_for_layers_of_one_shape():
    bases, method = Bases(), PRANCS["sign"]
    first = bases.pranc(method, place(method))
    assert bases.pranc(method, place(method)) is first
    assert bases.pranc(method, place(method, 8, 9)) is not first

"""Two by two, on paper: frozen matrices put in by hand, results multiplied out by hand."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from randbasis.methods import Method, Nola, Pranc, RandLora, Site, Vera

Inject = Callable[..., None]


def numbers(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_change(method: Method, site: Site, coefficients: dict[str, Tensor], expected: list[list[float]]) -> None:
    """ΔW as factors, as a matrix and as a map of the two unit vectors."""
    wanted = numbers(*expected)
    delta = method.bind(site).matrix(coefficients)
    torch.testing.assert_close(delta, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(method.bind(site).factors(coefficients).matrix(), wanted, rtol=0, atol=1e-12)
    columns = method.bind(site).delta(coefficients).apply(torch.eye(site.in_features, dtype=torch.float64))
    torch.testing.assert_close(columns.T, wanted, rtol=0, atol=1e-12)


def test_nola_with_offset(inject: Inject) -> None:
    """r = 1, k = l = 3, so 1/√3 from the deviation times 1/√3 from k is 1/3; alpha / r = 6.

    A = A⁰/√6 + (3·[1 1] + 0·[1 −1] + 6·[1 0])/3 = A⁰/√6 + [3 1]; with A⁰ = √6·[1 0] that is [4 1].
    B = (1·[1 2]ᵀ + 2·[0 1]ᵀ + 3·[1 1]ᵀ)/3 = [4 7]ᵀ/3, times 6 is [8 14]ᵀ.
    """
    method = Nola(r=1, num_basis=3, alpha=6.0, basis_storage="dense")
    site = Site(2, 2, method.streams())
    a = numbers([[1, 1]], [[1, -1]], [[1, 0]])
    b = numbers([[1, 2]], [[0, 1]], [[1, 1]])
    inject(method, site, a, b, math.sqrt(6) * numbers([[1, 0]]))
    assert_change(method, site, {"nola_a": numbers(3, 0, 6), "nola_b": numbers(1, 2, 3)}, [[32, 8], [56, 14]])


def test_nola_plain_with_more_on_one_side(inject: Inject) -> None:
    """r = 2 and in = out = 6, so √(3·6·2) = 6 on both sides; k = 2, l = 1, alpha / r = 18.

    Only the first column of A and the first two rows of B are not 0, so ΔW is 0 but for its first column.
    A = (2·[1 3]ᵀ + 1·[4 0]ᵀ)/6 = [6 6]ᵀ/6 = [1 1]ᵀ in column 0.
    B = 1·[[1 2] [3 4]]/6 in rows 0 and 1 (given transposed), times 18 is [[3 6] [9 12]].
    ΔW column 0 = [9 21].
    """
    method = Nola(r=2, num_basis=2, num_basis_b=1, alpha=36.0, parametrization="plain", basis_storage="dense")
    site = Site(6, 6, method.streams())
    a, b = torch.zeros(2, 2, 6, dtype=torch.float64), torch.zeros(1, 2, 6, dtype=torch.float64)
    a[0, :, 0], a[1, :, 0] = numbers(1, 3), numbers(4, 0)
    b[0, :, :2] = numbers([1, 3], [2, 4])
    inject(method, site, a, b)
    expected = [[0.0] * 6 for _ in range(6)]
    expected[0][0], expected[1][0] = 9, 21
    assert_change(method, site, {"nola_a": numbers(2, 1), "nola_b": numbers(1)}, expected)


def test_vera(inject: Inject) -> None:
    """in = r = 2, so both deviations are 1.

    Λ_d A = diag(2, 3)·[[1 −1] [1 1]] = [[2 −2] [3 3]]; B = [[1 1] [−1 1]] (given transposed);
    B Λ_d A = [[5 1] [1 5]]; Λ_b = diag(10, −1).
    """
    method = Vera(r=2, basis_storage="dense")
    site = Site(2, 2, method.streams())
    inject(method, site, numbers([[1, -1], [1, 1]]), numbers([[1, -1], [1, 1]]))
    assert_change(method, site, {"vera_d": numbers(2, 3), "vera_b": numbers(10, -1)}, [[50, 10], [-1, -5]])


def test_vera_deviation_is_of_the_layer(inject: Inject) -> None:
    """in = 8 makes √(2/in) = 1/2, r = 1 makes √(2/r) = √2."""
    method = Vera(r=1, basis_storage="dense")
    site = Site(1, 8, method.streams())
    inject(method, site, torch.ones(1, 1, 8, dtype=torch.float64), numbers([[1]]))
    expected = [[math.sqrt(2) / 2 * 3 * 5] * 8]
    assert_change(method, site, {"vera_d": numbers(3), "vera_b": numbers(5)}, expected)


def test_randlora(inject: Inject) -> None:
    """r = 1, so two terms; alpha / r = 2; A = [1 2], B₀ = [1 0]ᵀ, B₁ = [1 1]ᵀ.

    Term 0: 3·[1 0]ᵀ [1·1 2·(−1)] = [[3 −6] [0 0]]. Term 1: −1·[1 1]ᵀ [1·5 2·1] = [[−5 −2] [−5 −2]].
    """
    method = RandLora(r=1, alpha=2.0, basis_storage="dense")
    site = Site(2, 2, method.streams())
    inject(method, site, numbers([[1, 2]]), numbers([[1, 0]], [[1, 1]]))
    coefficients = {"randlora_lambda": numbers([3], [-1]), "randlora_gamma": numbers([1, -1], [5, 1])}
    assert_change(method, site, coefficients, [[-4, -16], [-10, -4]])


def test_randlora_transposed(inject: Inject) -> None:
    """One row, three columns: the sum is 3×1 and its transpose is ΔW. One term, so the paper's scaling is 2.

    B₀ Λ A Γ = [1 2 −1]ᵀ · 3 · 5 · (1/2); times 2 is [15 30 −15]ᵀ.
    """
    method = RandLora(r=1, scaling="paper", basis_storage="dense")
    site = Site(1, 3, method.streams())
    inject(method, site, numbers([[5]]), numbers([[1, 2, -1]]))
    assert_change(method, site, {"randlora_lambda": numbers([3]), "randlora_gamma": numbers([0.5])}, [[15, 30, -15]])


def test_pranc(inject: Inject) -> None:
    """k = 4 makes 1/√k = 1/2."""
    method = Pranc(num_basis=4, basis_storage="dense")
    site = Site(2, 2, method.streams())
    inject(method, site, numbers([[1, 0], [0, 0]], [[0, 1], [0, 0]], [[0, 0], [1, 1]], [[1, 1], [1, 1]]))
    assert_change(method, site, {"pranc_a": numbers(2, 4, 6, 8)}, [[5, 6], [7, 7]])

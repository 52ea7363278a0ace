"""Each method against its formula in docs/math.md, written naively in float64 from the integer entries."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from method_cases import LAWS, draw, leaves, trained
from torch import Tensor

from randbasis.basis import basis_entries
from randbasis.methods import Coefficients, Method, Nola, Pranc, RandLora, Site, Vera

SEED = 987654321987654321
VARIANCE = {"sign": 1.0, "uniform": 21845.0, "normal": 4.0, "sparse(3)": 2 * 21845 / 65536, "sparse(6)": 21846 / 65536}


def basis(name: str, law: str, count: int, rows: int, cols: int) -> Tensor:
    """Matrices of unit variance, (5); of the hashed law those of a basis of so many, (25)."""
    if law == "hashed":
        return math.sqrt(count) * basis_entries(SEED, name, f"hashed({count})", (count, rows, cols)).double()
    return basis_entries(SEED, name, law, (count, rows, cols)).double() / math.sqrt(VARIANCE[law])


# --- the formulas -----------------------------------------------------------------------------------------------------


def nola(c: Coefficients, law: str, out: int, in_: int, *, r: int, alpha: float, offset: bool, path: str) -> Tensor:
    a, b = c["nola_a"], c["nola_b"]
    k, n = len(a), len(b)
    random_a = basis(f"nola/A{path}", law, k, r, in_)
    random_b = basis(f"nola/B{path}", law, n, r, out)
    if offset:  # (6), (7)
        factor_a = basis(f"nola/A0{path}", law, 1, r, in_)[0] / math.sqrt(3 * in_)
        for i in range(k):
            factor_a = factor_a + a[i] * random_a[i] / math.sqrt(3) / math.sqrt(k)
        factor_b = torch.zeros(out, r, dtype=torch.float64)
        for j in range(n):
            factor_b = factor_b + b[j] * random_b[j].T / math.sqrt(3) / math.sqrt(n)
    else:  # (6), (8)
        factor_a = sum(a[i] * random_a[i] / math.sqrt(3 * in_ * r) for i in range(k))
        factor_b = sum(b[j] * random_b[j].T / math.sqrt(3 * out * r) for j in range(n))
    return alpha / r * factor_b @ factor_a


def vera(c: Coefficients, law: str, out: int, in_: int, *, r: int) -> Tensor:  # (12)
    random_a = basis("vera/A", law, 1, r, in_)[0] * math.sqrt(2 / in_)
    random_b = basis("vera/B", law, 1, r, out)[0].T * math.sqrt(2 / r)
    return torch.diag(c["vera_b"]) @ random_b @ torch.diag(c["vera_d"]) @ random_a


def randlora(
    c: Coefficients, law: str, out: int, in_: int, *, r: int, scaling: Callable[[int], float]
) -> Tensor:  # (14)
    small, large = min(out, in_), max(out, in_)
    n = math.ceil(small / r)
    random_a = basis("randlora/A", law, 1, r, small)[0]
    random_b = basis("randlora/B", law, n, r, large)
    total = torch.zeros(large, small, dtype=torch.float64)
    for j in range(n):
        lam, gamma = torch.diag(c["randlora_lambda"][j]), torch.diag(c["randlora_gamma"][j])
        total = total + random_b[j].T @ lam @ random_a @ gamma
    return scaling(n) * (total.T if in_ > out else total)


def pranc(c: Coefficients, law: str, out: int, in_: int, *, path: str) -> Tensor:  # (18)
    a = c["pranc_a"]
    random_w = basis(f"pranc/W{path}", law, len(a), out, in_)
    return sum(a[i] * random_w[i] for i in range(len(a))) / math.sqrt(len(a))  # type: ignore[return-value]


PATH = "/model.layers.7.mlp"
CASES: dict[str, tuple[type[Method], dict[str, Any], Callable[..., Tensor], dict[str, Any]]] = {
    "nola": (Nola, {"r": 4, "num_basis": 9, "alpha": 3.0}, nola, {"r": 4, "alpha": 3.0, "offset": True, "path": ""}),
    "nola k≠l": (
        Nola,
        {"r": 4, "num_basis": 12, "num_basis_b": 5, "alpha": 3.0},
        nola,
        {"r": 4, "alpha": 3.0, "offset": True, "path": ""},
    ),
    "nola unique": (
        Nola,
        {"r": 3, "num_basis": 4, "num_basis_b": 6, "alpha": 1.5, "share_basis": False},
        nola,
        {"r": 3, "alpha": 1.5, "offset": True, "path": PATH},
    ),
    "nola plain": (
        Nola,
        {"r": 4, "num_basis": 9, "alpha": 3.0, "parametrization": "plain"},
        nola,
        {"r": 4, "alpha": 3.0, "offset": False, "path": ""},
    ),
    "nola plain unique k≠l": (
        Nola,
        {"r": 2, "num_basis": 3, "num_basis_b": 8, "alpha": 3.0, "parametrization": "plain", "share_basis": False},
        nola,
        {"r": 2, "alpha": 3.0, "offset": False, "path": PATH},
    ),
    "vera": (Vera, {"r": 5}, vera, {"r": 5}),
    "vera wide rank": (Vera, {"r": 150}, vera, {"r": 150}),
    "randlora hf": (RandLora, {"r": 6}, randlora, {"r": 6, "scaling": lambda n: 20.0}),
    "randlora hf alpha": (RandLora, {"r": 6, "alpha": 9.0}, randlora, {"r": 6, "scaling": lambda n: 1.5}),
    "randlora paper": (
        RandLora,
        {"r": 7, "scaling": "paper"},
        randlora,
        {"r": 7, "scaling": lambda n: 2 / math.sqrt(n)},
    ),
    "pranc": (Pranc, {"num_basis": 6}, pranc, {"path": ""}),
    "pranc unique": (Pranc, {"num_basis": 6, "share_basis": False}, pranc, {"path": PATH}),
}
SHAPES = [(30, 30), (24, 140), (131, 20)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("name", "law"),
    [
        (name, law)
        for name, (make, *_) in CASES.items()
        for law in (*LAWS, "sparse(6)", *(["hashed"] if make.sums_its_basis else []))
    ],
)
def test_value_and_gradient_against_formula(name: str, law: str, shape: tuple[int, int]) -> None:
    make, options, formula, facts = CASES[name]
    method = make(seed=SEED, law=law, **options)
    site = Site(*shape, method.streams(PATH[1:]))
    values = trained(method, site)
    naive, ours, token = leaves(values), leaves(values), leaves(values)
    expected = formula(naive, law, *shape, **facts)
    weights = draw(*shape, seed=40)
    wanted = torch.autograd.grad(expected, list(naive.values()), weights)
    scale = expected.abs().max().item()

    delta = method.bind(site).matrix(ours)
    torch.testing.assert_close(delta, expected, rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(method.bind(site).factors(values).matrix(), expected, rtol=0, atol=1e-12 * scale)
    by_token = method.bind(site).delta(token).apply(torch.eye(shape[1], dtype=torch.float64)).T
    torch.testing.assert_close(by_token, expected, rtol=0, atol=1e-12 * scale)
    for found in (
        torch.autograd.grad(delta, list(ours.values()), weights),
        torch.autograd.grad(by_token, list(token.values()), weights),
    ):
        for one, two in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-12 * two.abs().max().item())


# --- starts, ranks and counts -----------------------------------------------------------------------------------------


def test_starts_by_formula() -> None:
    """(7), (8), §2.2, (14)."""
    assert Nola(r=8, num_basis=50, alpha=8.0).starts(64, 32) == {"nola_a": 0, "nola_b": 0}
    plain = Nola(r=8, num_basis=50, num_basis_b=20, alpha=8.0, parametrization="plain")
    assert plain.starts(64, 32) == {"nola_a": 1 / 50, "nola_b": 1 / 20}
    assert Vera(r=256).starts(64, 32) == {"vera_d": 0.1, "vera_b": 0}
    assert RandLora(r=8).starts(64, 32) == {"randlora_lambda": 0, "randlora_gamma": 1 / 32}
    assert RandLora(r=1).starts(3, 2) == {"randlora_lambda": 0, "randlora_gamma": 1 / 2}
    assert Pranc(num_basis=50).starts(64, 32) == {"pranc_a": 0}


@pytest.mark.parametrize(
    ("method", "shapes", "count"),
    [
        # (9): k + l a matrix, whatever its shape
        (Nola(r=8, num_basis=1000, alpha=8.0), [(1024, 1024)] * 48, 96_000),
        (Nola(r=8, num_basis=250, alpha=8.0), [(1280, 1280)] * 72, 36_000),
        (Nola(r=16, num_basis=128, alpha=8.0), [(4096, 4096)] * 128 + [(11008, 4096)] * 96, 57_344),
        (Nola(r=4, num_basis=1024, alpha=8.0), [(4096, 1024), (1024, 4096)] * 24, 98_304),
        (Nola(r=4, num_basis=10, num_basis_b=3, alpha=8.0), [(7, 5)] * 2, 26),
        # (13): r + out
        (Vera(r=1024), [(768, 768)] * 24, 43_008),
        (Vera(r=256), [(1024, 1024)] * 48, 61_440),
        (Vera(r=1024), [(1280, 1280)] * 72, 165_888),
        (Vera(r=1024), ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]) * 32, 1_589_248),
        # (16): ceil(min / r) · (r + min)
        (RandLora(r=64), ([(768, 768)] * 4 + [(3072, 768), (768, 3072)]) * 12, 718_848),
        (RandLora(r=100), ([(1024, 1024)] * 4 + [(4096, 1024), (1024, 4096)]) * 24, 1_780_416),
        (RandLora(r=3), [(7, 5), (5, 7)], 2 * 2 * (3 + 5)),
        (RandLora(r=30), [(7, 5)], 30 + 5),
        # (18): k
        (Pranc(num_basis=11), [(7, 5)] * 3, 33),
    ],
    ids=str,
)
def test_published_counts(method: Method, shapes: list[tuple[int, int]], count: int) -> None:
    assert sum(method.count(*shape) for shape in shapes) == count


@pytest.mark.parametrize("law", ["sign", "normal", "sparse(3)"])
@pytest.mark.parametrize(("shape", "r"), [((48, 96), 8), ((96, 48), 7), ((40, 40), 12)], ids=str)
def test_randlora_has_full_rank(law: str, shape: tuple[int, int], r: int) -> None:
    """(16): n_b · r >= min. Discrete laws need an r at which A has few equal columns and none of zeros."""
    method = RandLora(seed=SEED, r=r, law=law)
    site = Site(*shape, method.streams())
    delta = method.bind(site).matrix(trained(method, site))
    assert int(torch.linalg.matrix_rank(delta)) == min(shape)


def test_ranks_of_the_others() -> None:
    for method, rank in [(Nola(r=3, num_basis=50, alpha=1.0), 3), (Vera(r=4), 4), (Pranc(num_basis=1), 12)]:
        site = Site(12, 30, method.streams())
        assert int(torch.linalg.matrix_rank(method.bind(site).matrix(trained(method, site)))) == rank


def test_standard_deviation_of_a_randlora_step() -> None:
    """(15): std(ΔW) = scaling · ε / √min for λ = ε and γ at its start."""
    method = RandLora(seed=SEED, r=16, alpha=32.0, law="normal")
    out, in_, epsilon = 96, 128, 1e-2
    site = Site(out, in_, method.streams())
    shapes = method.coefficient_shapes(out, in_)
    gamma = torch.full(shapes["randlora_gamma"], method.starts(out, in_)["randlora_gamma"], dtype=torch.float64)
    coefficients = {
        "randlora_lambda": torch.full(shapes["randlora_lambda"], epsilon, dtype=torch.float64),
        "randlora_gamma": gamma,
    }
    assert method.bind(site).matrix(coefficients).std().item() == pytest.approx(2 * epsilon / math.sqrt(96), rel=0.05)


def test_variance_of_vera_does_not_depend_on_rank() -> None:
    """Var(ΔW) = 4 b² d² / in, whatever r: the reason why one learning rate fits all ranks."""
    for r in (16, 64, 512):
        method = Vera(seed=SEED, r=r, law="uniform")
        site = Site(200, 100, method.streams())
        coefficients = {
            "vera_d": torch.full((r,), 0.1, dtype=torch.float64),
            "vera_b": torch.full((200,), 0.5, dtype=torch.float64),
        }
        variance = method.bind(site).matrix(coefficients).square().mean().item()
        assert variance == pytest.approx(4 * 0.25 * 0.01 / 100, rel=0.05)

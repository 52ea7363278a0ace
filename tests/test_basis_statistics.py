"""The basis against probability: moments, independence and near-orthogonality, at fixed seeds so nothing is flaky."""

import math

import pytest
import torch

from randbasis.basis import basis_entries
from randbasis.laws import parse_law

LAWS = ("sign", "uniform", "normal", "sparse(6)", "sparse(100)")


@pytest.mark.parametrize("seed", [0, 2**63 + 12345])
@pytest.mark.parametrize("law", LAWS)
def test_mean_variance_and_kurtosis(law: str, seed: int) -> None:
    """Sample moments of 260,000 entries lie within four standard errors of the exact ones."""
    variance = parse_law(law).variance
    entries = basis_entries(seed, "statistics/moments", law, (4, 64, 1024)).double().flatten()
    count = entries.numel()
    fourth = {"sign": 1.0, "uniform": (3 * 256**4 - 10 * 256**2 + 7) / 15, "normal": 46.0}.get(law, variance)
    assert abs(entries.mean().item()) < 4 * math.sqrt(variance / count)
    assert abs(entries.square().mean().item() - variance) <= 4 * math.sqrt((fourth - variance**2) / count)
    eighth = entries.pow(8).mean().item()
    assert abs(entries.pow(4).mean().item() - fourth) <= 4 * math.sqrt(max(0.0, eighth - fourth**2) / count)


@pytest.mark.parametrize("law", LAWS)
def test_values_come_as_often_as_the_law_says(law: str) -> None:
    """Pearson's chi-squared over all values of the law."""
    entries = basis_entries(3, "statistics/values", law, (4, 64, 1024)).flatten()
    count = entries.numel()
    probability = {
        "sign": {-1: 0.5, 1: 0.5},
        "uniform": dict.fromkeys(range(-255, 256, 2), 1 / 256),
        "normal": {value: math.comb(16, value + 8) / 65536 for value in range(-8, 9)},
    }.get(law)
    if probability is None:
        t = parse_law(law).threshold / 65536
        probability = {-1: t, 0: 1 - 2 * t, 1: t}
    values, counts = entries.unique(return_counts=True)
    found = dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert set(found) <= set(probability)
    statistic = sum((found.get(v, 0) - count * p) ** 2 / (count * p) for v, p in probability.items())
    freedom = len(probability) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("law", LAWS)
def test_a_thousand_basis_matrices_are_nearly_orthogonal(law: str) -> None:
    """Cosines of all 499,500 pairs are as small as those of independent matrices."""
    rows, cols = 32, 128
    flat = basis_entries(1, "nola/A", law, (1000, rows, cols)).float().flatten(1)
    unit = flat / flat.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T)[*torch.triu_indices(1000, 1000, 1)]
    deviation = 1 / math.sqrt(rows * cols)
    assert cosines.abs().max().item() < 7 * deviation
    assert cosines.std().item() == pytest.approx(deviation, rel=0.02)
    assert abs(cosines.mean().item()) < 4 * deviation / math.sqrt(cosines.numel())


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("axis", ["index", "row", "col"])
def test_neighbours_are_uncorrelated(law: str, axis: str) -> None:
    """Along every axis of the counter, at distances within a word, across words and across blocks."""
    dim = ("index", "row", "col").index(axis)
    shape = [16, 16, 16]
    shape[dim] = 512
    entries = basis_entries(9, "statistics/neighbours", law, (shape[0], shape[1], shape[2])).double()
    variance = parse_law(law).variance
    for lag in (1, 2, 7, 8, 16, 31, 32, 64, 127, 128, 256):
        here = entries.narrow(dim, 0, 512 - lag)
        there = entries.narrow(dim, lag, 512 - lag)
        correlation = (here * there).mean().item() / variance
        assert abs(correlation) < 4.5 / math.sqrt(here.numel()), lag


def test_no_equal_rows_between_streams_seeds_or_indices() -> None:
    """Rows of one whole block: any two equal ones would mean that two counters or keys met."""
    places = [(seed, name) for seed in (0, 1, 2**32, 2**63) for name in ("nola/A", "nola/B", "vera/A", "randlora/B")]
    rows = torch.cat([basis_entries(seed, name, "sign", (8, 256, 128)).flatten(0, 1) for seed, name in places])
    assert len(rows.unique(dim=0)) == len(rows) == 16 * 8 * 256


@pytest.mark.parametrize("law", LAWS)
def test_streams_and_seeds_are_uncorrelated(law: str) -> None:
    places = [(seed, name) for seed in (0, 1, 2**32) for name in ("nola/A", "nola/B", "nola/A0", "pranc/W")]
    flat = torch.stack([basis_entries(s, n, law, (4, 64, 256)).double().flatten() for s, n in places])
    correlation = flat @ flat.T / (parse_law(law).variance * flat.shape[1])
    correlation.fill_diagonal_(0)
    assert correlation.abs().max().item() < 5 / math.sqrt(flat.shape[1])


@pytest.mark.parametrize("law", ["sign", "uniform", "normal", "sparse(6)", "sparse(25)"])
def test_random_matrices_have_full_rank(law: str) -> None:
    """What RandLoRA's full-rank statement (16) stands on, up to the s = 2√max of (17)."""
    entries = basis_entries(4, "randlora/B", law, (3, 40, 160)).double()
    assert torch.linalg.matrix_rank(entries).tolist() == [40, 40, 40]

"""Norms, sums and differences of ΔW by their factors, against the matrices themselves."""

import math

import pytest
import torch

from randbasis.low_rank import cores, distance, is_low_rank, norm, weighted_sum
from randbasis.methods import Factors


def factors(out: int, in_: int, rank: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((out, rank), (rank, in_))
    up, down = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return Factors(up, down)


#: Ranks that add up to less than a side, to a side, and to more; one ΔW without factors.
CASES = {
    "thin": (factors(20, 30, 3, 0), factors(20, 30, 5, 1)),
    "tall": (factors(30, 9, 3, 0), factors(30, 9, 5, 1)),
    "full": (factors(20, 30, 12, 0), factors(20, 30, 9, 1)),
    "whole": (factors(20, 30, 3, 0), Factors(None, factors(20, 30, 5, 1).matrix())),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def pair(request: pytest.FixtureRequest) -> tuple[Factors, Factors]:
    return request.param


def test_norms_and_products_of_the_cores_against_the_matrices(pair: tuple[Factors, Factors]):
    one, two = cores(*pair)
    first, second = (change.matrix() for change in pair)
    torch.testing.assert_close((one * two).sum(), (first * second).sum())
    assert norm(pair[0]) == pytest.approx(float(first.norm()), rel=1e-12)
    assert distance(*pair) == pytest.approx(float((first - second).norm()), rel=1e-12)


def test_weighted_sum_against_the_matrices(pair: tuple[Factors, Factors]):
    total = weighted_sum([(0.25, pair[0]), (-2.0, pair[1])])
    torch.testing.assert_close(total.matrix(), 0.25 * pair[0].matrix() - 2 * pair[1].matrix())
    assert (total.up is None) == (not is_low_rank(*pair))


def test_a_distance_far_below_the_norms_is_not_rounding():
    one = factors(40, 50, 4, 0)
    assert one.up is not None
    near = Factors(torch.cat([one.up, one.up[:, :1] * 1e-12], 1), torch.cat([one.down, one.down[1:2]]))
    expected = 1e-12 * float(one.up[:, 0].norm() * one.down[1].norm())
    assert distance(one, near) == pytest.approx(expected, rel=1e-2)
    assert math.isclose(norm(one), norm(near), rel_tol=1e-11)


def test_no_matrix_of_the_layers_size_is_made():
    meta = [Factors(torch.empty(1 << 20, 4, device="meta"), torch.empty(4, 1 << 20, device="meta")) for _ in range(2)]
    assert [tuple(core.shape) for core in cores(*meta)] == [(8, 8), (8, 8)]

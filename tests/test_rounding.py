"""Sums in half precision against float64: to a neighbour, right in the mean, repeatable, a NaN stays one."""

import pytest
import torch
from torch import Tensor

from randbasis.basis import Basis, block_words
from randbasis.errors import HyperparameterError
from randbasis.rounding import Rounding, check_rounding, round_to_neighbours

HALF = [torch.bfloat16, torch.float16]
SHAPE = (40, 27)


def numbers(seed: int, size: float) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * size


def neighbours(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest number of a dtype that is not above, and the least that is not below."""
    near = values.to(dtype)
    above, below = near.double() > values.double(), near.double() < values.double()
    low = torch.where(above, torch.nextafter(near, torch.full_like(near, -torch.inf)), near)
    high = torch.where(below, torch.nextafter(near, torch.full_like(near, torch.inf)), near)
    return low, high


@pytest.mark.parametrize("size", [1e-6, 1e-4, 0.03, 5.0])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_draw_leads_to_a_neighbour_and_the_mean_is_the_number(dtype: torch.dtype, size: float):
    """All 2¹⁶ draws of a few numbers: their mean is the number itself."""
    values = numbers(3, size).flatten()[:24]
    draws = torch.arange(1 << 16, dtype=torch.int32).unsqueeze(-1).expand(-1, len(values))
    rounded = round_to_neighbours(values.expand(1 << 16, -1).contiguous(), draws, dtype)
    low, high = neighbours(values, dtype)
    assert bool(((rounded == low) | (rounded == high)).all())
    step = (high.double() - low.double()).clamp_min(1e-300)
    assert ((rounded.double().mean(0) - values.double()).abs() / step).max() <= 2**-13


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_what_fits_stays_and_what_is_no_number_stays_none(dtype: torch.dtype):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    for draw in (0, 1, 0x7FFF, 0xFFFF):
        rounded = round_to_neighbours(every, torch.full(every.shape, draw, dtype=torch.int32), dtype)
        assert torch.equal(rounded.float().nan_to_num(7.0), every.nan_to_num(7.0))
        assert torch.equal(rounded.isnan(), every.isnan())
    of_a_gpu = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert bool(round_to_neighbours(of_a_gpu, torch.full((2,), 0xFFFF, dtype=torch.int32), dtype).isnan().all())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_nearest_is_one_rounding_of_the_sum(dtype: torch.dtype):
    weight, delta = numbers(1, 0.05).to(dtype), numbers(2, 1e-3)
    summed = Rounding("nearest", 0, "layer").with_draws_of([delta])
    exact = weight.double() + delta.double()
    low, high = neighbours(exact.float(), dtype)
    best = torch.where((low.double() - exact).abs() <= (high.double() - exact).abs(), low, high)
    assert ((summed(weight, delta).double() - exact).abs() <= (best.double() - exact).abs() + 1e-12).all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_changes_below_the_last_bit_are_lost_to_nearest_and_not_to_the_mean(dtype: torch.dtype):
    """Over steps in which the coefficients change, as a training's do."""
    weight, delta = numbers(1, 0.05).to(dtype), numbers(2, 1e-6)
    exact, changes, steps = weight.double() + delta.double(), 0.0, 600
    lost = Rounding("nearest", 0, "layer").with_draws_of([])(weight, delta)
    assert (lost.double() - exact).norm() > 0.9 * delta.double().norm()
    for step in range(steps):
        drawn = Rounding("stochastic", 0, "layer").with_draws_of([torch.tensor([0.1, step * 1e-7])])
        changes = changes + (drawn(weight, delta).double() - weight.double())
    mean, total = changes / steps, delta.double()
    assert float((mean * total).sum() / total.square().sum()) == pytest.approx(1.0, abs=0.3)


def test_draws_are_words_of_philox_and_follow_the_coefficients():
    weight, delta = numbers(1, 0.05).bfloat16(), numbers(2, 1e-3)
    rounding = Rounding("stochastic", 5, "fuse/layer")
    before = torch.random.get_rng_state()
    first = rounding.with_draws_of([delta])
    words = block_words(Basis.named(5, "fuse/layer", "normal"), (0, 1), (0, SHAPE[0]), (0, 4))[0]
    drawn = (words.unsqueeze(-1) >> torch.tensor([0, 16], dtype=torch.int32)).flatten(-2)[:, : SHAPE[1]]
    shifted = (drawn + first.shift) & 0xFFFF
    by_hand = round_to_neighbours(weight.float() + delta, shifted, torch.bfloat16)
    assert torch.equal(first(weight, delta), by_hand)
    assert torch.equal(rounding.with_draws_of([delta.clone()])(weight, delta), by_hand)
    one_bit = delta.clone()
    one_bit.view(torch.int32)[3, 4] ^= 1
    others = [
        rounding.with_draws_of([one_bit]),
        rounding.with_draws_of([delta, delta]),
        Rounding("stochastic", 6, "fuse/layer").with_draws_of([delta]),
        Rounding("stochastic", 5, "fuse/other").with_draws_of([delta]),
    ]
    for other in others:
        assert not torch.equal(other(weight, delta), by_hand)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_shifts_are_spread_evenly():
    """Of coefficients that differ in the last bits: that is how small the steps of a training can be."""
    start = torch.linspace(0.1, 1.0, 64)
    rounding = Rounding("stochastic", 0, "layer")
    steps = [start.view(torch.int32).add(step).view(torch.float32) for step in range(4096)]
    shifts = torch.stack([rounding.with_draws_of([step]).shift for step in steps])
    assert int(shifts.min()) >= 0
    assert int(shifts.max()) < 1 << 16
    assert torch.histc(shifts.float(), 16, 0, 1 << 16).sub(256).abs().max() < 80


def test_names():
    assert check_rounding("stochastic") == "stochastic"
    with pytest.raises(HyperparameterError, match=r"fuse_rounding must be one of .*got 'nearst'; did you mean"):
        check_rounding("nearst")

"""Codes and scales against math (11)."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given

from randbasis.codes import dequantize, quantize, rounded
from randbasis.errors import CoefficientValueError, PrecisionError
from randbasis.precision import CODED, check_precision, check_training_precision, largest_code, run_count, run_lengths

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def by_formula(values: list[float], bits: int) -> tuple[list[int], float]:
    """Math (11) in plain Python: `s = max|c| / (2^(bits-1) - 1)`, `round(c / s)`."""
    scale = max(abs(value) for value in values) / (2 ** (bits - 1) - 1)
    return [round(value / scale) if scale else 0 for value in values], scale


@pytest.mark.parametrize("bits", CODED)
@given(values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40))
def test_against_the_formula(bits: int, values: list[float]):
    codes, scales = quantize(torch.tensor(values), run_lengths([len(values)], 0), bits)
    expected, scale = by_formula(values, bits)
    if scale < 1e-30:
        return
    assert scale * (1 - 2**-16) <= float(scales) <= scale
    step = torch.tensor(values, dtype=torch.float64) / scale
    assert codes.abs().max() == largest_code(bits)
    assert bool(((codes - step).abs() <= 0.5 + largest_code(bits) * 2**-16).all())
    assert sum(found != right for found, right in zip(codes.tolist(), expected, strict=True)) <= 1 + len(values) // 8


@pytest.mark.parametrize("bits", CODED)
@given(values=st.lists(FLOATS, min_size=1, max_size=30), group=st.integers(0, 8))
@example(values=[3.4028234663852886e38, -3.4028234663852886e38], group=0)
@example(values=[1e-45, 1e-38, 0.0], group=0)
def test_quantizing_what_was_dequantized_changes_nothing(bits: int, values: list[float], group: int):
    runs = run_lengths([len(values)], group)
    codes, scales = quantize(torch.tensor(values), runs, bits)
    exact = dequantize(codes, scales, runs)
    assert bool(torch.isfinite(exact).all())
    assert torch.equal(exact.double(), codes.double() * torch.repeat_interleave(scales.double(), torch.tensor(runs)))
    again, scales_again = quantize(exact, runs, bits)
    assert torch.equal(codes, again)
    assert torch.equal(scales, scales_again)


def test_runs_never_cross_the_end_of_a_vector():
    assert run_lengths([5, 2, 4], 2) == [2, 2, 1, 2, 2, 2]
    assert run_lengths([5, 2, 4], 0) == [5, 2, 4]
    assert [run_count(5, 2), run_count(5, 0)] == [3, 1]


def test_each_vector_has_its_own_scale():
    values = torch.tensor([1.0, 100.0, 0.01, -0.03])
    codes, scales = quantize(values, run_lengths([2, 2], 0), 8)
    assert codes.tolist() == [1, 127, 42, -127]
    torch.testing.assert_close(scales, torch.tensor([100 / 127, 0.03 / 127]), rtol=2**-16, atol=0)


def test_a_vector_of_zeros_stays_zero():
    codes, scales = quantize(torch.zeros(3), run_lengths([3], 0), 2)
    assert codes.tolist() == [0, 0, 0]
    assert dequantize(codes, scales, run_lengths([3], 0)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float):
    with pytest.raises(CoefficientValueError):
        quantize(torch.tensor([1.0, value]), run_lengths([2], 0), 4)


def test_precisions_that_do_not_exist():
    for bits, group in ((5, 0), (64, 0), (16, 8), (4, -1)):
        with pytest.raises(PrecisionError):
            check_precision(bits, group)


@pytest.mark.parametrize("bits", CODED)
def test_rounded_is_codes_and_scales(bits: int):
    values = torch.linspace(-1, 3, 11)
    runs = run_lengths([4, 7], 3)
    assert torch.equal(rounded(values, [4, 7], bits, 3), dequantize(*quantize(values, runs, bits), runs))
    assert not torch.equal(rounded(values, [4, 7], bits), rounded(values, [11], bits))


def test_rounded_to_halves_and_not_at_all():
    values = torch.tensor([1.0, 1.0 + 2**-13, -3e-9])
    assert rounded(values, [3], 32) is values
    assert torch.equal(rounded(values, [3], 16), values.half())
    assert rounded(values.bfloat16(), [3], 16).dtype == torch.bfloat16
    with pytest.raises(PrecisionError, match="up to 1e\\+05 do not fit"):
        rounded(torch.tensor([1e5]), [1], 16)


def test_precisions_that_training_takes():
    for bits in (None, *CODED):
        check_training_precision(bits)
    for bits in (16, 32, 1, 0, -3, True, 3.0):
        with pytest.raises(PrecisionError, match=r"one of \[8, 4, 3, 2\] bits, or None"):
            check_training_precision(bits)

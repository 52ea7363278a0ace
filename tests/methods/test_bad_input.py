"""What a method refuses: one test for each rule, with the argument, the value and the way out in the message."""

from typing import Any

import pytest
import torch
from method_cases import MAKERS, Maker

from randbasis.errors import (
    CoefficientCountError,
    HyperparameterError,
    LawError,
    RandbasisError,
    RankError,
    SeedError,
    StorageError,
    UnknownMethodError,
)
from randbasis.methods import METHODS, Nola, Pranc, RandLora, Vera, check_coefficients, method_class
from randbasis.methods.method import RANK_LIMIT

SIZES = [
    (Nola, "r", {"num_basis": 4, "alpha": 1.0}),
    (Nola, "num_basis", {"r": 4, "alpha": 1.0}),
    (Nola, "num_basis_b", {"r": 4, "num_basis": 4, "alpha": 1.0}),
    (Vera, "r", {}),
    (RandLora, "r", {}),
    (Pranc, "num_basis", {}),
]


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8"])
@pytest.mark.parametrize(("make", "argument", "others"), SIZES, ids=lambda value: getattr(value, "name", str(value)))
def test_ranks_and_numbers_of_matrices_are_positive_integers(
    make: Any, argument: str, others: dict[str, Any], value: object
) -> None:
    with pytest.raises(RankError, match=f"^{argument} must be a positive integer, got {value!r}") as refusal:
        make(**{argument: value}, **others)
    assert f"use for example {argument}=8" in str(refusal.value)
    assert isinstance(refusal.value, ValueError)


@pytest.mark.parametrize(("make", "argument", "others"), SIZES, ids=lambda value: getattr(value, "name", str(value)))
def test_ranks_that_cannot_be_meant(make: Any, argument: str, others: dict[str, Any]) -> None:
    assert make(**{argument: RANK_LIMIT}, **others)
    with pytest.raises(RankError, match=f"^{argument} must be at most {RANK_LIMIT}") as refusal:
        make(**{argument: RANK_LIMIT + 1}, **others)
    assert f"got {RANK_LIMIT + 1}" in str(refusal.value)
    assert f"use for example {argument}=1024" in str(refusal.value)


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS.keys())
def test_what_every_method_checks(maker: Maker) -> None:
    with pytest.raises(SeedError, match="seed must be from 0"):
        maker.method(seed=-1)
    with pytest.raises(SeedError, match="seed must be an integer"):
        maker.method(seed=True)
    with pytest.raises(LawError, match="got 'sparse\\(1\\)'"):
        maker.method(law="sparse(1)")
    with pytest.raises(StorageError, match="got 'disk'"):
        maker.method(basis_storage="disk")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "8"])
@pytest.mark.parametrize(
    ("make", "argument", "others"),
    [(Nola, "alpha", {"r": 4, "num_basis": 4}), (RandLora, "alpha", {"r": 4}), (Vera, "d_initial", {"r": 4})],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_real_numbers_are_finite(make: Any, argument: str, others: dict[str, Any], value: object) -> None:
    with pytest.raises(HyperparameterError, match=f"^{argument} must be a finite number, got {value!r}") as refusal:
        make(**{argument: value}, **others)
    assert f"use for example {argument}=1.0" in str(refusal.value)


def test_parametrizations_of_nola() -> None:
    with pytest.raises(HyperparameterError) as refusal:
        Nola(r=4, num_basis=4, alpha=1.0, parametrization="ofset")  # type: ignore[arg-type]
    assert "parametrization must be one of ['offset', 'plain'], got 'ofset'" in str(refusal.value)
    assert "'offset' is the authors' language-model code" in str(refusal.value)


def test_scalings_of_randlora() -> None:
    with pytest.raises(HyperparameterError) as refusal:
        RandLora(r=4, scaling="vision")  # type: ignore[arg-type]
    assert "scaling must be one of ['hf', 'paper'], got 'vision'" in str(refusal.value)
    assert "'paper' is 2/√n, 'hf' is alpha / r" in str(refusal.value)


def test_alpha_beside_the_papers_scaling() -> None:
    with pytest.raises(HyperparameterError) as refusal:
        RandLora(r=4, scaling="paper", alpha=8.0)
    assert "alpha has no meaning with scaling='paper' (2/√n), got alpha=8.0" in str(refusal.value)
    assert "leave alpha out or use scaling='hf'" in str(refusal.value)


def test_unknown_method_lists_near_names() -> None:
    with pytest.raises(UnknownMethodError) as refusal:
        method_class("randlor")
    assert f"method must be one of {list(METHODS)}, got 'randlor'" in str(refusal.value)
    assert "did you mean randlora" in str(refusal.value)
    assert {name: method_class(name) for name in METHODS} == METHODS
    assert [kind.name for kind in METHODS.values()] == list(METHODS)


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS.keys())
def test_coefficients_of_another_shape(maker: Maker) -> None:
    shapes = maker.method().coefficient_shapes(maker.out, maker.in_)
    whole = {name: torch.zeros(shape) for name, shape in shapes.items()}
    check_coefficients(whole, shapes, "layers.0")
    check_coefficients({name: value.expand(3, 2, *value.shape) for name, value in whole.items()}, shapes, "layers.0")
    for name, shape in shapes.items():
        missing = {key: value for key, value in whole.items() if key != name}
        with pytest.raises(CoefficientCountError, match=f"layers.0: coefficients '{name}'.*got nothing"):
            check_coefficients(missing, shapes, "layers.0")
        longer = torch.zeros(*shape[:-1], shape[-1] + 1)
        with pytest.raises(CoefficientCountError) as refusal:
            check_coefficients({**whole, name: longer}, shapes, "layers.0")
        assert f"must have shape {list(shape)}, got shape {list(longer.shape)}" in str(refusal.value)
        assert "use the rank and basis that the adapter was made with" in str(refusal.value)
        with pytest.raises(CoefficientCountError):
            check_coefficients({**whole, name: torch.zeros(())}, shapes, "layers.0")


def test_a_refusal_is_one_of_ours_and_the_expected_builtin() -> None:
    for refused in (RankError, HyperparameterError, UnknownMethodError, CoefficientCountError):
        assert issubclass(refused, RandbasisError)
        assert issubclass(refused, ValueError)

"""``fuse_rounding``: one rounded matrix in training on a half-precision base, and nothing else anywhere else."""

import warnings
from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from tuner_cases import (
    CASES,
    ONE_EACH,
    OPTIONS,
    PLACES,
    Case,
    adapted_layers,
    add_adapter,
    bits,
    coefficients_of,
    fill,
    loss_of,
    naive_deltas,
    outputs,
)

from randbasis.errors import HyperparameterError
from randbasis.tuner.fused_rounding import say_exact
from randbasis.tuner.layer import RandbasisLinear
from randbasis.tuner.layer_adapters import frozen_weight

KINDS = ("nearest", "stochastic")
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half the distance of 1 to the next number: one rounding to nearest is off by at most that, relatively."""


@pytest.fixture(autouse=True)
def said_anew():
    say_exact.cache_clear()


def training(case: Case, kind: str, dtype: torch.dtype = torch.bfloat16, size: float = 0.3, **options) -> PeftModel:
    options = {"contraction": "weight", "fuse_rounding": kind, **options}
    model = get_peft_model(case.base().to(dtype), case.config(**options))
    fill(model, size=size)
    return model.train()


def inputs_of(layer: RandbasisLinear, dtype: torch.dtype, tokens: int = 96) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(2, tokens, layer.in_features, generator=generator).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_one_rounded_matrix_against_float64(case: Case, dtype: torch.dtype, kind: str):
    """Every entry of the sum is within one spacing of the exact one, and what ΔW itself is rounded by."""
    model = training(case, kind, dtype)
    deltas = naive_deltas(model, case)
    for name, layer in adapted_layers(model.get_base_model()).items():
        x = inputs_of(layer, dtype)
        whole = frozen_weight(layer).double() + deltas[name]
        bias = layer.base_layer.bias
        exact = x.double() @ whole.T + (0 if bias is None else bias.double())
        result = layer(x).detach()
        unit, sizes = UNIT[dtype], whole.abs() + deltas[name].abs()
        bound = x.double().abs() @ (4 * unit * sizes + 2.0**-24).T + 4 * unit * exact.abs() + 1e-6
        assert result.dtype == dtype
        assert bool(((result.double() - exact).abs() <= bound).all())
        assert float((result.double() - exact).norm() / exact.norm()) < 3 * unit
        assert layer._chosen.rounding.kind == kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("place", ["linear", "c_attn"])
def test_gradients_are_those_of_the_exact_product(place: str, method: str, kind: str):
    case = Case(place, method)
    wanted = training(case, "none")
    loss_of(wanted, case.batch()).backward()
    model = training(case, kind)
    loss_of(model, case.batch()).backward()
    apart = []
    for name, parameter in coefficients_of(model).items():
        exact = coefficients_of(wanted)[name].grad
        assert exact is not None
        assert parameter.grad is not None
        assert (parameter.grad - exact).norm() < 0.08 * exact.norm() + 1e-6
        apart.append(not torch.equal(parameter.grad, exact))
    assert any(apart)


@pytest.mark.parametrize("method", ONE_EACH)
def test_the_base_layer_makes_no_product_of_its_own(method: str, monkeypatch: pytest.MonkeyPatch):
    case, called = Case("linear", method), []
    based = RandbasisLinear._base_result
    monkeypatch.setattr(RandbasisLinear, "_base_result", lambda self, x: called.append(1) or based(self, x))
    for kind, products in (("none", 1), ("nearest", 0), ("stochastic", 0)):
        called.clear()
        model = training(case, kind)
        outputs(model, case.batch())
        assert len(called) == products * len(adapted_layers(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ONE_EACH)
def test_evaluation_and_merging_are_exact(method: str, kind: str):
    case = Case("linear", method)
    model, exact = training(case, kind).eval(), training(case, "none").eval()
    assert torch.equal(outputs(model, case.batch()), outputs(exact, case.batch()))
    with torch.enable_grad():
        assert torch.equal(model(**case.batch()).logits, exact(**case.batch()).logits)
    model.merge_adapter()
    exact.merge_adapter()
    own = {name: frozen_merged(layer) for name, layer in adapted_layers(model).items()}
    assert bits(own) == bits({name: frozen_merged(layer) for name, layer in adapted_layers(exact).items()})


def frozen_merged(layer: RandbasisLinear) -> Tensor:
    return layer.get_base_layer().weight.detach()


def test_what_is_below_the_last_bit_is_lost_to_nearest_alone():
    case = Case("linear", "nola")
    for kind, lost in (("nearest", True), ("stochastic", False)):
        for layer in adapted_layers(training(case, kind, size=1e-5)).values():
            weight = layer.base_layer.weight
            weight.data = weight.data.sign() * 0.05
            x = inputs_of(layer, torch.bfloat16)
            assert torch.equal(layer(x), layer.base_layer(x)) is lost


@pytest.mark.parametrize("method", ONE_EACH)
def test_the_same_coefficients_round_alike_and_others_anew(method: str):
    case = Case("linear", method)
    state = torch.random.get_rng_state()
    first, second = training(case, "stochastic"), training(case, "stochastic")
    torch.random.set_rng_state(state)
    once = outputs(first, case.batch())
    assert torch.equal(outputs(first, case.batch()), once)
    assert torch.equal(outputs(second, case.batch()), once)
    assert torch.equal(torch.random.get_rng_state(), state)
    for parameter in coefficients_of(second).values():
        parameter.data.mul_(1 + 2.0**-22)
    assert not torch.equal(outputs(second, case.batch()), once)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ONE_EACH)
def test_checkpointed_layers_round_alike_in_both_runs(method: str, reentrant: bool):
    case = Case("linear", method)
    wanted = training(case, "stochastic")
    loss_of(wanted, case.batch()).backward()
    model = training(case, "stochastic")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss_of(model, case.batch()).backward()
    for name, parameter in coefficients_of(model).items():
        torch.testing.assert_close(parameter.grad, coefficients_of(wanted)[name].grad, rtol=1e-3, atol=1e-7)


def test_several_adapters_in_one_sum():
    case = Case("linear", "nola")
    model = training(case, "stochastic")
    add_adapter(model, "other", case.config(fuse_rounding="stochastic", contraction="weight", seed=4), 2)
    model.base_model.set_adapter(["default", "other"])
    model.train()
    deltas, others = naive_deltas(model, case), naive_deltas(model, case, "other")
    for name, layer in adapted_layers(model.get_base_model()).items():
        x = inputs_of(layer, torch.bfloat16)
        exact = x.double() @ (frozen_weight(layer).double() + deltas[name] + others[name]).T
        result = layer(x).detach()
        assert layer._chosen.rounding is not None
        assert float((result.double() - exact).norm() / exact.norm()) < 3 * UNIT[torch.bfloat16]


# --- where it is exact, and says so ---


def exactly(model: PeftModel, case: Case, kind: str) -> bool:
    """Whether it computes in training as without the option."""
    result = outputs(model, case.batch())
    for layer in adapted_layers(model).values():
        for name, own in layer.options.items():
            layer.options[name] = replace(own, fuse_rounding="none")
    same = torch.equal(result, outputs(model, case.batch()))
    for layer in adapted_layers(model).values():
        for name, own in layer.options.items():
            layer.options[name] = replace(own, fuse_rounding=kind)
    return same


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_in_float32_needs_no_rounding(kind: str):
    case = Case("linear", "nola")
    model = training(case, kind, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert exactly(model, case, kind)


def test_what_cannot_be_one_matrix_says_so_once():
    case = Case("linear", "nola")
    model = training(case, "nearest", dropout=0.5)
    with pytest.warns(UserWarning, match=r"fuse_rounding has no effect here.*drops some of its inputs"):
        outputs(model, case.batch())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fuse_rounding")
        outputs(training(case, "nearest", dropout=0.5), case.batch())
    hooked = training(case, "nearest")
    for layer in adapted_layers(hooked).values():
        layer.base_layer.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="fuse_rounding has no effect here"):
        assert exactly(hooked, case, "nearest")


def test_autocast_to_another_dtype_is_exact():
    case = Case("linear", "nola")
    model = training(case, "nearest", torch.float16)
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="the product is computed in"):
        assert exactly(model, case, "nearest")


def test_adapters_that_disagree_are_exact():
    case = Case("linear", "nola")
    model = training(case, "nearest")
    add_adapter(model, "other", case.config(fuse_rounding="stochastic", contraction="weight"), 2)
    model.base_model.set_adapter(["default", "other"])
    model.train()
    with pytest.warns(UserWarning, match="different roundings of one sum: nearest, stochastic"):
        outputs(model, case.batch())
    assert all(layer._chosen.rounding is None for layer in adapted_layers(model).values())


# --- the option ---


def test_it_is_saved_and_never_the_default(tmp_path):
    case = Case("linear", "nola")
    assert case.config().fuse_rounding == "none"
    model = training(case, "stochastic")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base().bfloat16(), str(tmp_path), is_trainable=True).train()
    assert {layer.options["default"].fuse_rounding for layer in adapted_layers(loaded).values()} == {"stochastic"}
    assert torch.equal(outputs(loaded, case.batch()), outputs(model, case.batch()))
    with pytest.raises(HyperparameterError, match="fuse_rounding must be one of"):
        case.config(fuse_rounding="up")


@pytest.mark.parametrize("place", PLACES)
def test_training_learns(place: str):
    """Ten steps of an optimizer end near where the exact ones do."""
    case, ends = Case(place, "randlora"), []
    for kind in ("none", "stochastic"):
        model = training(case, kind, size=0.05)
        optimizer = torch.optim.Adam(coefficients_of(model).values(), lr=2e-2)
        losses = []
        batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in case.batch().items()}
        for _ in range(10):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        ends.append(losses[-1] / losses[0])
    assert ends[1] == pytest.approx(ends[0], rel=0.2)

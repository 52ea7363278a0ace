"""Factors are kept in evaluation, and forgotten whenever the coefficients may have changed."""

import pytest
import torch
from peft import PeftModel
from tuner_cases import ONE_EACH, OPTIONS, Case, adapted_layers, coefficients_of, fill, loss_of, outputs

from randbasis import METHODS
from randbasis.tuner.factor_cache import CAPACITY, FactorCache

CASE = Case("linear", "nola")


@pytest.fixture
def prepared(monkeypatch):
    """How many times a method turned coefficients into factors or into ΔW."""
    calls: list[str] = []
    for name, kind in METHODS.items():
        for what in ("prepare", "delta"):
            original = getattr(kind, what)

            def counted(self, *args, original=original, name=name):
                calls.append(name)
                return original(self, *args)

            monkeypatch.setattr(kind, what, counted)
    return calls


@pytest.mark.parametrize("order", ["auto", "token", "weight"])
@pytest.mark.parametrize("method", OPTIONS)
def test_evaluation_prepares_once(method, order, prepared):
    case = Case("qkv_proj", method)
    model = case.adapted(contraction=order)
    first = outputs(model, case.batch())
    assert prepared
    prepared.clear()
    for _ in range(3):
        assert torch.equal(outputs(model, case.batch()), first)
    assert not prepared


@pytest.mark.parametrize("method", OPTIONS)
def test_inference_mode_prepares_once(method, prepared):
    case = Case("linear", method)
    model = case.adapted()
    with torch.inference_mode():
        first = outputs(model, case.batch())
        prepared.clear()
        assert torch.equal(outputs(model, case.batch()), first)
    assert not prepared
    loss_of(model.train(), case.batch()).backward()  # what inference mode kept is not used where gradients flow


@pytest.mark.parametrize("method", OPTIONS)
def test_training_keeps_nothing(method, prepared):
    case = Case("linear", method)
    model = case.adapted(contraction="token").train()
    loss_of(model, case.batch())
    once = len(prepared)
    loss_of(model, case.batch())
    assert len(prepared) == 2 * once > 0
    assert all(not layer._cache._kept for layer in adapted_layers(model).values())


def test_gradients_flow_in_evaluation_mode_too():
    model = CASE.adapted()
    outputs(model, CASE.batch())
    loss_of(model, CASE.batch()).backward()
    assert all(p.grad is not None for p in coefficients_of(model).values())


def optimizer_step(model: PeftModel, optimizer: type[torch.optim.Optimizer], **options) -> None:
    stepper = optimizer(coefficients_of(model).values(), lr=0.1, **options)
    loss_of(model, CASE.batch()).backward()
    stepper.step()


def in_place(model: PeftModel) -> None:
    with torch.no_grad():
        for parameter in coefficients_of(model).values():
            parameter.mul_(0.5)


def new_storage(model: PeftModel) -> None:
    for parameter in coefficients_of(model).values():
        parameter.data = 0.5 * parameter.data


def new_parameter(model: PeftModel) -> None:
    for layer in adapted_layers(model).values():
        for attribute in layer.adapter_layer_names:
            leaf = layer.get_submodule(f"{attribute}.default")
            leaf.weight = torch.nn.Parameter(0.5 * leaf.weight.detach())


def loaded_state(model: PeftModel, assign: bool) -> None:
    state = {name: 0.5 * p.detach() for name, p in coefficients_of(model).items()}
    state |= {name: tensor for name, tensor in model.state_dict().items() if "randbasis_meaning" in name}
    model.load_state_dict(state, strict=False, assign=assign)


def from_file(model: PeftModel, folder) -> None:
    Case("linear", model.peft_config["default"].method).adapted(fill_seed=8).save_pretrained(folder)
    model.load_adapter(str(folder), "default")
    model.eval()


CHANGES = {
    "sgd": lambda m, _: optimizer_step(m, torch.optim.SGD),
    "adamw": lambda m, _: optimizer_step(m, torch.optim.AdamW),
    "adamw_foreach": lambda m, _: optimizer_step(m, torch.optim.AdamW, foreach=True),
    "adamw_fused": lambda m, _: optimizer_step(m, torch.optim.AdamW, fused=True),
    "in_place": lambda m, _: in_place(m),
    "new_storage": lambda m, _: new_storage(m),
    "new_parameter": lambda m, _: new_parameter(m),
    "load_state_dict": lambda m, _: loaded_state(m, assign=False),
    "load_state_dict_assign": lambda m, _: loaded_state(m, assign=True),
    "load_adapter": lambda m, folder: from_file(m, folder),
}


@pytest.mark.parametrize("order", ["token", "weight"])
@pytest.mark.parametrize("method", ONE_EACH)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_coefficients_are_seen(change, method, order, tmp_path):
    case = Case("linear", method)
    model = case.adapted(contraction=order)
    before = outputs(model, case.batch())
    CHANGES[change](model, tmp_path)
    fresh = case.adapted(contraction=order)
    with torch.no_grad():
        for mine, theirs in zip(coefficients_of(fresh).values(), coefficients_of(model).values(), strict=True):
            mine.copy_(theirs)
    after = outputs(model, case.batch())
    assert torch.equal(after, outputs(fresh, case.batch()))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("order", ["token", "weight"])
@pytest.mark.parametrize("method", ONE_EACH)
def test_a_dtype_and_back_is_seen(method, order):
    """The rounded coefficients may land where the old ones were, in the same version: the cache must not care."""
    case = Case("linear", method)
    model = case.adapted(contraction=order)
    before = outputs(model, case.batch())
    model.to(torch.bfloat16)
    model.to(torch.float32)
    fresh = case.adapted(contraction=order)
    fresh.to(torch.bfloat16).to(torch.float32)
    after = outputs(model, case.batch())
    assert torch.equal(after, outputs(fresh, case.batch()))
    assert not torch.equal(after, before)


def test_a_write_through_data_is_seen_after_training_mode():
    """The one change that torch's version counter does not see; entering training mode forgets everything."""
    model = CASE.adapted()
    outputs(model, CASE.batch())
    for parameter in coefficients_of(model).values():
        parameter.data.mul_(0.5)
    model.train()
    model.eval()
    fresh = CASE.adapted()
    for parameter in coefficients_of(fresh).values():
        parameter.data.mul_(0.5)
    assert torch.equal(outputs(model, CASE.batch()), outputs(fresh, CASE.batch()))


def test_merging_and_streams_are_seen():
    case = Case("linear", "nola-own-basis")
    model, other = case.adapted(), case.adapted()
    first = outputs(model, case.batch())
    streams = {n: t.clone() for n, t in model.state_dict().items() if "randbasis_streams" in n}
    model.load_state_dict({name: tensor + 1 for name, tensor in streams.items()}, strict=False)
    changed = outputs(model, case.batch())
    assert not torch.allclose(changed, first, atol=1e-3)
    model.load_state_dict(streams, strict=False)
    assert torch.equal(outputs(model, case.batch()), first)
    assert torch.equal(outputs(other, case.batch()), first)


def test_adapters_keep_their_own_factors(prepared):
    model = CASE.adapted()
    model.add_adapter("other", CASE.config(seed=3))
    fill(model, "other", 2)
    model.eval()
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = outputs(model, CASE.batch())
    prepared.clear()
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        assert torch.equal(outputs(model, CASE.batch()), expected[name])
    assert not prepared


def test_deleting_an_adapter_frees_its_factors():
    model = CASE.adapted()
    model.add_adapter("other", CASE.config(seed=3))
    model.set_adapter("other")
    outputs(model.eval(), CASE.batch())
    assert all(layer._cache._kept for layer in adapted_layers(model).values())
    model.delete_adapter("other")
    assert not any(layer._cache._kept for layer in adapted_layers(model).values())


def test_the_cache_is_bounded_and_forgets_the_oldest():
    cache, sources = FactorCache(), [torch.zeros(2)]
    for key in range(CAPACITY + 5):
        assert cache.get(key, sources, lambda key=key: key, usable=True) == key
    assert len(cache._kept) == CAPACITY
    assert cache.get(CAPACITY + 4, sources, lambda: "recomputed", usable=True) == CAPACITY + 4
    assert cache.get(0, sources, lambda: "recomputed", usable=True) == "recomputed"


def test_the_cache_is_not_used_when_it_may_not_be():
    cache, sources = FactorCache(), [torch.zeros(2)]
    assert cache.get("x", sources, lambda: 1, usable=False) == 1
    assert cache.get("x", sources, lambda: 2, usable=True) == 2
    assert cache.get("x", sources, lambda: 3, usable=True) == 2
    sources[0].add_(1)
    assert cache.get("x", sources, lambda: 4, usable=True) == 4
    assert cache.get("x", [torch.zeros(2)], lambda: 5, usable=True) == 5
    cache.clear()
    assert cache.get("x", sources, lambda: 6, usable=True) == 6

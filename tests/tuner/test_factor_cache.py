"""Factors are kept in evaluation, and forgotten whenever the coefficients may have changed."""

import copy

import pytest
import torch
from peft import PeftModel, inject_adapter_in_model
from tuner_cases import (
    BOUNDS,
    ONE_EACH,
    OPTIONS,
    PLACES,
    Case,
    adapted_layers,
    coefficients_of,
    fill,
    loss_of,
    outputs,
    token_batch,
)

from randbasis.tuner import snapshot
from randbasis.tuner.factor_cache import FactorCache, limit_of
from randbasis.tuner.prepared_pass import decodes

CASE = Case("linear", "nola")


@pytest.fixture
def prepared(monkeypatch):
    """How many times a method turned coefficients into factors or into ΔW, or was given the sums that factors are."""
    calls: list[str] = []
    for name, kind in BOUNDS.items():
        for what in ("prepare", "matrix", "factors_of"):
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


def through_data(model: PeftModel) -> None:
    """A step of zeroth-order training."""
    for parameter in coefficients_of(model).values():
        parameter.data.mul_(0.5)


def from_a_vector(model: PeftModel) -> None:
    """What a federated mean does on every client."""
    parameters = list(coefficients_of(model).values())
    torch.nn.utils.vector_to_parameters(0.5 * torch.nn.utils.parameters_to_vector(parameters), parameters)


def through_numpy(model: PeftModel) -> None:
    for parameter in coefficients_of(model).values():
        parameter.detach().numpy()[:] *= 0.5


def by_another_process(model: PeftModel) -> None:
    """Shared memory, written to from outside: here through a second tensor on it."""
    model.share_memory()
    outputs(model, CASE.batch())
    for parameter in coefficients_of(model).values():
        torch.tensor([], dtype=parameter.dtype).set_(parameter.untyped_storage(), 0, parameter.shape).mul_(0.5)


def new_module(model: PeftModel) -> None:
    for layer in adapted_layers(model).values():
        for attribute in layer.adapter_layer_names:
            container = layer.get_submodule(attribute)
            container["default"] = copy.deepcopy(container["default"])
            container["default"].weight.data.mul_(0.5)


def while_the_mode_is_set_by_hand(model: PeftModel) -> None:
    """Modes set around `train()`, as a block does that puts back the mode of every module."""
    for module in model.modules():
        module.training = True
    through_data(model)
    for module in model.modules():
        module.training = False


CHANGES = {
    "sgd": lambda m, _: optimizer_step(m, torch.optim.SGD),
    "adamw": lambda m, _: optimizer_step(m, torch.optim.AdamW),
    "adamw_foreach": lambda m, _: optimizer_step(m, torch.optim.AdamW, foreach=True),
    "adamw_fused": lambda m, _: optimizer_step(m, torch.optim.AdamW, fused=True),
    "in_place": lambda m, _: in_place(m),
    "through_data": lambda m, _: through_data(m),
    "through_numpy": lambda m, _: through_numpy(m),
    "from_a_vector": lambda m, _: from_a_vector(m),
    "by_another_process": lambda m, _: by_another_process(m),
    "mode_by_hand": lambda m, _: while_the_mode_is_set_by_hand(m),
    "new_storage": lambda m, _: new_storage(m),
    "new_parameter": lambda m, _: new_parameter(m),
    "new_module": lambda m, _: new_module(m),
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


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", OPTIONS)
def test_losses_of_zeroth_order_training_are_those_of_the_coefficients(place, method):
    case = Case(place, method)
    model = case.adapted()
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for parameter in coefficients_of(model).values():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        torch.testing.assert_close(outputs(model, case.batch(2)), outputs(copy.deepcopy(model), case.batch(2)))


@pytest.mark.parametrize("place", ["linear", "conv1d", "qkv_proj"])
@pytest.mark.parametrize("method", ONE_EACH)
def test_a_write_between_two_steps_of_decoding_is_seen(place, method):
    """Thin passes decide nothing anew, and still see other coefficients under a cache of keys and values."""
    model = Case(place, method).adapted()
    ids = token_batch(2)["input_ids"]

    def steps(model: PeftModel) -> list[torch.Tensor]:
        found, cache = [], None
        with torch.no_grad():
            for at in range(4):
                out = model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
                cache, _ = out.past_key_values, found.append(out.logits)
                if at >= 1:
                    for parameter in coefficients_of(model).values():
                        parameter.data.mul_(1.5)
        return found

    fresh = copy.deepcopy(model)
    for layer in adapted_layers(fresh).values():
        layer.register_forward_pre_hook(lambda layer, _: layer._forget())
    torch.testing.assert_close(steps(model), steps(fresh), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", OPTIONS)
def test_an_adapter_put_on_again_under_its_name(method):
    """Same name, same starts, another seed: nothing of the old one is used."""
    case = Case("linear", method)
    model = case.base()
    inject_adapter_in_model(case.config(init_weights=False), model)
    outputs(model.eval(), case.batch())
    inject_adapter_in_model(case.config(init_weights=False, seed=12), model)
    fill(model)
    fresh = case.base()
    inject_adapter_in_model(case.config(seed=12), fresh)
    fill(fresh)
    for rows in (1, 4, 8):
        assert torch.equal(outputs(model.eval(), case.batch(rows)), outputs(fresh.eval(), case.batch(rows)))


def test_streams_written_through_data_are_seen():
    case = Case("linear", "nola-own-basis")
    model, other = case.adapted(), case.adapted()
    before = outputs(model, case.batch())
    moved = {n: t + 1 for n, t in model.state_dict().items() if "randbasis_streams" in n}
    for name, values in model.state_dict().items():
        if name in moved:
            values.data.copy_(moved[name])
    other.load_state_dict(moved, strict=False)
    assert torch.equal(outputs(model, case.batch()), outputs(other, case.batch()))
    assert not torch.equal(outputs(model, case.batch()), before)


@pytest.mark.parametrize("order", ["auto", "token", "weight"])
@pytest.mark.parametrize("method", OPTIONS)
def test_a_gradient_through_a_frozen_adapter_after_inference_mode(method, order):
    """What inference mode kept may be saved for a backward pass: of the input, or of layers below."""
    case = Case("in_proj", method)
    model = case.adapted(contraction=order).requires_grad_(False)
    x = case.batch()["x"].requires_grad_()
    with torch.inference_mode():
        model(x)
        model(x[:1])
    model(x).square().mean().backward()
    assert x.grad is not None
    found, x.grad = x.grad, None
    case.adapted(contraction=order).requires_grad_(False)(x).square().mean().backward()
    torch.testing.assert_close(found, x.grad)


@pytest.mark.parametrize("order", ["auto", "token", "weight"])
@pytest.mark.parametrize("method", OPTIONS)
def test_a_pass_kept_without_autocast_is_not_used_under_it(method, order):
    case = Case("in_proj", method)
    model = case.adapted(contraction=order)
    layer = next(iter(adapted_layers(model).values()))
    x = case.batch(1)["x"][:, :2]
    with torch.no_grad():
        plain = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(x)
        layer._forget()
        with torch.autocast("cpu", torch.bfloat16):
            expected = layer(x)
        assert layer._prepared_pass is None
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)


def test_a_pass_kept_in_evaluation_is_not_used_where_inputs_are_dropped():
    case = Case("in_proj", "nola")
    model = case.adapted(dropout=0.9)
    layer = next(iter(adapted_layers(model).values()))
    with torch.no_grad():
        before = layer(case.batch(1)["x"])
        layer.training = True
        assert not torch.equal(layer(case.batch(1)["x"]), before)


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


KEEP = {"usable": True, "decoding": False}


def vectors(bytes_each: int):
    """Results of one size, and how often one was computed."""
    calls: list[int] = []

    def compute() -> torch.Tensor:
        calls.append(1)
        return torch.zeros(bytes_each // 4)

    return compute, calls


def test_the_cache_is_bounded_in_bytes_and_forgets_what_was_used_longest_ago():
    cache, sources = FactorCache(1000), [torch.zeros(2)]
    compute, calls = vectors(300)
    for key in "abc":
        cache.get(key, sources, compute, **KEEP)
    assert (len(calls), cache.nbytes) == (3, 900)
    cache.get("a", sources, compute, **KEEP)
    cache.get("d", sources, compute, **KEEP)  # b goes, not a
    assert (len(calls), cache.nbytes) == (4, 900)
    for key in "acd":
        cache.get(key, sources, compute, **KEEP)
    assert len(calls) == 4
    cache.get("b", sources, compute, **KEEP)
    assert (len(calls), cache.nbytes) == (5, 900)


def test_a_result_larger_than_the_limit_is_computed_and_evicts_nothing():
    cache, sources = FactorCache(1000), [torch.zeros(2)]
    small, kept = vectors(300)
    large, calls = vectors(2000)
    cache.get("small", sources, small, **KEEP)
    for _ in range(2):
        assert cache.get("large", sources, large, **KEEP).numel() == 500
    cache.get("small", sources, small, **KEEP)
    assert (len(calls), len(kept), cache.nbytes) == (2, 1, 300)


def test_a_changed_result_takes_the_place_of_the_old():
    cache, sources = FactorCache(1000), [torch.zeros(2)]
    compute, calls = vectors(400)
    for _ in range(4):
        cache.get("x", sources, compute, **KEEP)
        sources[0].data.add_(1)
    assert (len(calls), cache.nbytes, len(cache._kept)) == (4, 400, 1)


def test_equal_values_in_another_tensor_are_the_same_source():
    cache = FactorCache(1000)
    compute, calls = vectors(4)
    for source in (torch.ones(2), torch.ones(2), torch.ones(1, 2), torch.ones(2, dtype=torch.float64)):
        cache.get("x", [source], compute, **KEEP)
    assert len(calls) == 3


def test_no_layer_keeps_more_than_its_limit():
    case = Case("linear", "pranc")
    model = case.adapted(contraction="weight")
    for layer in adapted_layers(model).values():
        assert layer._cache.limit == limit_of(layer.out_features, layer.in_features)
        layer._cache.limit = 2 * 4 * layer.out_features * layer.in_features
    for number in range(5):
        model.add_adapter(f"n{number}", case.config(contraction="weight"))
        fill(model, f"n{number}", number)
        model.set_adapter(f"n{number}")
        outputs(model.eval(), case.batch())
    for layer in adapted_layers(model).values():
        assert layer._cache.nbytes == layer._cache.limit == sum(k.nbytes for k in layer._cache._kept.values())


def test_the_cache_is_not_used_when_it_may_not_be():
    cache, sources = FactorCache(1000), [torch.zeros(2)]
    numbers = {n: torch.tensor(n) for n in range(1, 7)}

    def get(number: int, sources=sources, **how) -> int:
        return int(cache.get("x", sources, lambda: numbers[number], **(KEEP | how)))

    assert get(1, usable=False) == 1
    assert get(2) == 2
    assert get(3) == 2
    sources[0].add_(1)
    assert get(4) == 4
    assert get(5, [torch.zeros(2)]) == 5
    cache.clear()
    assert get(6) == 6


def test_without_values_to_compare_only_decoding_keeps(monkeypatch):
    """Another device must not be waited for: there any pass but one of a token a row makes its factors anew."""
    monkeypatch.setattr("randbasis.tuner.snapshot._kind", lambda _: snapshot.Version)
    cache, sources = FactorCache(1000), [torch.zeros(2)]
    compute, calls = vectors(4)
    token = {"usable": True, "decoding": True}
    for expected, how in ((1, KEEP), (2, KEEP), (3, token), (3, token), (4, KEEP), (5, token), (5, token)):
        cache.get("x", sources, compute, **how)
        assert len(calls) == expected
    sources[0].add_(1)
    cache.get("x", sources, compute, **token)
    assert len(calls) == 6


@pytest.mark.parametrize("method", ONE_EACH)
def test_without_values_to_compare_a_new_prompt_sees_every_change(method, monkeypatch, prepared):
    monkeypatch.setattr("randbasis.tuner.snapshot._kind", lambda _: snapshot.Version)
    model = Case("linear", method).adapted()
    ids = token_batch(2)["input_ids"]

    def generated(model: PeftModel) -> list[torch.Tensor]:
        with torch.no_grad():
            out = model(input_ids=ids[:, :4], use_cache=True)
            cache, found = out.past_key_values, [out.logits]
            for at in range(4, 7):
                if at == 5:
                    prepared.clear()
                found.append(model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
        return found

    before = generated(model)
    assert not prepared  # the second and third token decide nothing
    for parameter in coefficients_of(model).values():
        parameter.data.mul_(1.5)
    after = generated(model)
    torch.testing.assert_close(after, generated(copy.deepcopy(model)), rtol=1e-6, atol=1e-6)
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_sequence_first_and_unknown_models_never_decode():
    """One row of many tokens looks like one token of many rows there."""
    x = torch.zeros(5, 1, 8)
    assert decodes(x, rows_first=True)
    assert not decodes(x, rows_first=False)
    assert not decodes(x.squeeze(1), rows_first=True)
    assert not decodes(x.transpose(0, 1), rows_first=True)
    for place, known in (("linear", True), ("in_proj", False)):
        layers = adapted_layers(Case(place, "nola").adapted())
        assert all(layer.rows_first is known for layer in layers.values())


def test_what_the_factors_of_a_layer_may_take():
    """Two matrices of float32 of the layer's own shape, and a mebibyte at least."""
    assert limit_of(512, 256) == 1_048_576
    assert limit_of(1024, 512) == 4_194_304
    assert limit_of(4096, 11008) == 360_710_144


def test_a_tensor_of_another_shape_is_another():
    values = torch.arange(6.0)
    seen = snapshot.Snapshot.of([values])
    assert seen is not None
    assert seen.stands()
    values.resize_(2, 3)
    assert not seen.stands()

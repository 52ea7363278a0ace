"""`get_peft_model`: what an adapter adds to a model, against the formulas of math §2 written by hand."""

import itertools
import random
from math import prod

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers.pytorch_utils import Conv1D
from tuner_cases import (
    CASES,
    ONE_EACH,
    OPTIONS,
    Case,
    FusedBlock,
    adapted_layers,
    coefficients_of,
    fill,
    loss_of,
    make_config,
    naive_deltas,
    outputs,
    seeded,
    tiny_gpt2,
    tiny_llama,
    token_batch,
)

from randbasis import METHODS, RandbasisLinear
from randbasis.ops import storage


@pytest.mark.parametrize("case", CASES)
def test_delta_against_the_formula(case):
    model = case.adapted()
    expected = naive_deltas(model, case)
    layers = adapted_layers(model.get_base_model())
    assert layers
    for name, layer in layers.items():
        delta = layer.get_delta_weight("default")
        assert delta.shape == layer.get_base_layer().weight.shape
        delta = delta.T if isinstance(layer.get_base_layer(), Conv1D) else delta
        torch.testing.assert_close(delta.double(), expected[name], rtol=1e-4, atol=1e-5)
        assert expected[name].abs().max() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_output_against_a_base_with_the_formula_added(case):
    model = case.adapted()
    by_hand = case.base()
    for name, delta in naive_deltas(model, case).items():
        layer = by_hand.get_submodule(name)
        with torch.no_grad():
            layer.weight += (delta.T if isinstance(layer, Conv1D) else delta).float()
    expected, plain = outputs(by_hand, case.batch()), outputs(case.base(), case.batch())
    assert not torch.allclose(expected, plain, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(outputs(model, case.batch()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_starts_as_the_base_model(case):
    model = get_peft_model(case.base(), case.config()).eval()
    started, plain = outputs(model, case.batch()), outputs(case.base(), case.batch())
    if case.method == "nola-plain":  # math (8): tiny at the start, but not 0
        assert 0 < (started - plain).abs().max() < 0.1
    else:
        assert torch.equal(started, plain)


@pytest.mark.parametrize("case", CASES)
def test_only_coefficients_train_and_their_count_is_the_formula(case):
    model = get_peft_model(case.base(), case.config())
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == coefficients_of(model)
    expected = 0
    for layer in adapted_layers(model).values():
        for one in layer.matrices("default"):
            out, in_ = one.part.rows, layer.in_features
            n = -(-min(out, in_) // 5)
            expected += {
                "nola": 11, "nola-plain": 12, "nola-own-basis": 12, "vera": 7 + out,
                "randlora": n * (5 + min(out, in_)), "pranc": 6, "loraxs": 16, "nola-hashed": 11, "pranc-hashed": 6,
            }[case.method]  # fmt: skip
    assert sum(p.numel() for p in trainable.values()) == expected == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("case", CASES)
def test_every_coefficient_learns_and_nothing_else_does(case):
    model = case.adapted().train()
    loss_of(model, case.batch()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert bool((parameter.grad != 0).all()), name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("case", CASES)
def test_both_orders_give_one_output_and_one_gradient(case):
    found = {}
    for order in ("token", "weight"):
        model = case.adapted(contraction=order).train()
        loss = loss_of(model, case.batch())
        loss.backward()
        found[order] = (loss.detach(), {name: p.grad for name, p in coefficients_of(model).items()})
    torch.testing.assert_close(found["token"], found["weight"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "orders", [("pair",), ("pair", "weight"), ("pair", "token"), ("weight", "pair", "token")], ids=str
)
@pytest.mark.parametrize("case", [case for case in CASES if not case.values[0].method.startswith("pranc")])
def test_parts_of_one_layer_may_take_different_orders(case, orders, monkeypatch):
    """The orders are dealt out in turn: to several parts of one layer where it is fused, else to layers."""
    wanted = case.adapted(contraction="token").train()
    expected = loss_of(wanted, case.batch())
    expected.backward()
    turn = itertools.cycle(orders)
    monkeypatch.setattr("randbasis.tuner.layer.choose_order", lambda *_, **options: next(turn))
    model = case.adapted().train()
    loss = loss_of(model, case.batch())
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    gradients = {name: p.grad for name, p in coefficients_of(wanted).items()}
    found = {name: p.grad for name, p in coefficients_of(model).items()}
    torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("storage", ["packed", "dense", "recompute"])
@pytest.mark.parametrize("method", ONE_EACH)
def test_storage_of_the_basis_changes_no_value(method, storage):
    law = {"law": "sign"} if storage == "packed" and method != "nola" else {}
    case = Case("qkv_proj", method)
    usual, other = case.adapted(**law), case.adapted(basis_storage=storage, **law)
    torch.testing.assert_close(outputs(other, case.batch()), outputs(usual, case.batch()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_global_random_states_are_untouched(case):
    base, batch = case.base(), case.batch()
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()
    model = get_peft_model(base, case.config(init_weights=False))
    loss_of(model.train(), batch).backward()
    outputs(model.eval(), batch)
    model.merge_adapter()
    model.unmerge_adapter()
    after = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("method", OPTIONS_OF_ALL := (*ONE_EACH, "nola-plain", "nola-own-basis"))
def test_init_weights_false_starts_away_from_the_base_and_the_same_each_time(method):
    case = Case("linear", method)
    first, second = (get_peft_model(case.base(), case.config(init_weights=False)).eval() for _ in range(2))
    assert torch.equal(outputs(first, case.batch()), outputs(second, case.batch()))
    assert not torch.allclose(outputs(first, case.batch()), outputs(case.base(), case.batch()), atol=1e-4)


@pytest.mark.parametrize("method", OPTIONS_OF_ALL)
def test_a_second_wider_target_changes_nothing_in_the_first(method):
    narrow = get_peft_model(seeded(tiny_llama), make_config(method, ["q_proj"]))
    wide = get_peft_model(seeded(tiny_llama), make_config(method, ["q_proj", "gate_proj", "down_proj", "lm_head"]))
    firsts = [{name: layer for name, layer in adapted_layers(m).items() if "q_proj" in name} for m in (narrow, wide)]
    assert len(firsts[0]) == 2
    for name, layer in firsts[0].items():
        other = firsts[1][name]
        for attribute in layer.adapter_layer_names:
            layer.get_submodule(f"{attribute}.default").weight.data.fill_(0.37)
            other.get_submodule(f"{attribute}.default").weight.data.fill_(0.37)
        assert torch.equal(layer.get_delta_weight("default"), other.get_delta_weight("default"))
        assert layer.get_delta_weight("default").abs().max() > 1e-3


@pytest.mark.parametrize("method", OPTIONS_OF_ALL)
def test_default_dtype_of_the_process_changes_no_basis(method):
    case = Case("in_proj", method)
    usual = case.adapted()
    deltas = {name: layer.get_delta_weight("default") for name, layer in adapted_layers(usual).items()}
    base = case.base()
    torch.set_default_dtype(torch.float64)
    try:
        other = get_peft_model(base, case.config())
    finally:
        torch.set_default_dtype(torch.float32)
    fill(other)
    for name, layer in adapted_layers(other).items():
        assert torch.equal(layer.get_delta_weight("default"), deltas[name])


def test_one_pair_serves_layers_of_one_shape_but_own_bases_differ():
    for share, equal in ((True, True), (False, False)):
        model = get_peft_model(seeded(tiny_llama), make_config("nola", ["q_proj"], share_basis=share))
        for parameter in coefficients_of(model).values():
            parameter.data.fill_(0.5)
        first, second = (layer.get_delta_weight("default") for layer in adapted_layers(model).values())
        assert torch.equal(first, second) is equal


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_seeds_of_64_bits_name_different_bases(seed):
    model = get_peft_model(seeded(FusedBlock), make_config("pranc", ["qkv"], seed=seed))
    fill(model)
    delta = adapted_layers(model)["base_model.model.qkv"].get_delta_weight("default")
    other = get_peft_model(seeded(FusedBlock), make_config("pranc", ["qkv"], seed=seed ^ (1 << 40)))
    fill(other)
    assert not torch.allclose(delta, adapted_layers(other)["base_model.model.qkv"].get_delta_weight("default"))


@pytest.mark.parametrize("method", ONE_EACH)
def test_dropout_works_in_training_alone(method):
    case = Case("linear", method)
    model, plain = case.adapted(dropout=0.5), case.adapted()
    assert torch.equal(outputs(model, case.batch()), outputs(plain, case.batch()))
    torch.manual_seed(0)
    model.train()
    first, second = outputs(model, case.batch()), outputs(model, case.batch())
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(outputs(model, case.batch()), first)


@pytest.mark.parametrize(("bias", "names"), [("none", 0), ("all", 13), ("randbasis_only", 2)])
def test_biases_that_train(bias, names):
    model = get_peft_model(seeded(tiny_gpt2), make_config("nola", ["c_attn[q]"], bias=bias))
    trained = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")]
    assert len(trained) == names


def test_a_model_prints_its_adapters():
    model = get_peft_model(seeded(tiny_gpt2), make_config("nola", ["c_attn[q]"]))
    layer = adapted_layers(model)["base_model.model.transformer.h.0.attn.c_attn"]
    assert isinstance(layer, RandbasisLinear)
    assert "randbasis_nola_a_q" in repr(layer)
    assert "shape=[6]" in repr(layer)


def test_no_tensor_is_larger_than_its_coefficients():
    """No basis lives in the model: neither as a parameter nor as a buffer."""
    for method, kind in METHODS.items():
        model = get_peft_model(seeded(tiny_llama), make_config(method, "all-linear"))
        ours = {n: t for n, t in model.state_dict(keep_vars=True).items() if "randbasis_" in n}
        counted = 0
        for layer in adapted_layers(model).values():
            counted += kind.count(layer.matrices("default")[0].bound.method, layer.out_features, layer.in_features)
        meanings = [ours.pop(name) for name in list(ours) if ".randbasis_meaning." in name]
        assert [tensor.numel() for tensor in meanings] == [160]
        assert sum(prod(tensor.shape) for tensor in ours.values()) == counted


def test_batches_of_any_leading_shape_and_of_no_rows():
    model = get_peft_model(seeded(FusedBlock), make_config("vera", ["qkv"]))
    fill(model)
    layer = adapted_layers(model)["base_model.model.qkv"].eval()
    x = torch.randn(2, 3, 4, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = layer(x)
        torch.testing.assert_close(layer(x.view(-1, 24)).view(whole.shape), whole, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer(x[0, 0, 0]), whole[0, 0, 0], rtol=1e-5, atol=1e-5)
        assert layer(x[:0]).shape == (0, 3, 4, 72)


def test_inputs_learn_too():
    """Gradients reach what lies below the adapted layers, for prompts and for stacked adapters."""
    for method in ONE_EACH:
        model = Case("linear", method).adapted()
        embedded = model.get_input_embeddings()(token_batch()["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.square().mean().backward()
        assert embedded.grad is not None
        merged = model.merge_and_unload()
        again = embedded.detach().requires_grad_()
        merged(inputs_embeds=again).logits.square().mean().backward()
        torch.testing.assert_close(embedded.grad, again.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("place", ["linear", "conv1d", "qkv_proj"])
@pytest.mark.parametrize("method", OPTIONS)
def test_hooks_on_the_base_layer_run_where_the_sum_of_weights_would_be_fused(method, place, kind):
    """In training, in weight order, the base layer's forward could be left out; not while somebody listens to it."""
    model = Case(place, method).adapted(contraction="weight").train()
    layers = adapted_layers(model)
    generator = torch.Generator().manual_seed(0)
    x = {name: torch.randn(3, layer.in_features, generator=generator) for name, layer in layers.items()}
    expected = {name: layer(x[name]) for name, layer in layers.items()}
    seen: list[str] = []
    for name, layer in layers.items():
        getattr(layer.get_base_layer(), kind)(lambda *_, name=name: seen.append(name))
    found = {name: layer(x[name]) for name, layer in layers.items()}
    assert seen == list(layers)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_auto_storage_asks_for_the_memory_of_the_device_that_has_the_base(monkeypatch):
    asked = []
    monkeypatch.setattr(storage, "free_bytes", asked.append)
    config = make_config("nola", ("q_proj",), share_basis=False, seed=297)  # no other test holds its basis
    model = get_peft_model(tiny_llama(), config)
    layer = next(iter(adapted_layers(model.get_base_model()).values()))
    assert set(asked) == {layer.get_base_layer().weight.device}
    assert all(one.bound.site.device == torch.device("cpu") for one in layer.matrices("default"))

"""Several adapters in one model: other seeds, ranks, laws and methods; on, off, gone, combined."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tuner_cases import (
    CASES,
    ONE_EACH,
    OPTIONS,
    PLAIN_CASES,
    Case,
    adapted_layers,
    add_adapter,
    coefficients_of,
    fill,
    make_config,
    naive_deltas,
    outputs,
    seeded,
    snapshot,
    tiny_llama,
    token_batch,
)

from randbasis.errors import AdapterNameError, CombinationError

TARGETS = Case("linear", "nola").targets


def four_methods() -> PeftModel:
    """One model with an adapter of each method, each on its own seed and named after its method."""
    model = get_peft_model(seeded(tiny_llama), make_config("nola", TARGETS), adapter_name="nola")
    fill(model, "nola", 1)
    for seed, method in enumerate(("vera", "randlora", "pranc"), start=2):
        add_adapter(model, method, make_config(method, TARGETS, seed=seed), seed)
    return model.eval()


def alone(method: str, seed: int, fill_seed: int) -> torch.Tensor:
    model = get_peft_model(seeded(tiny_llama), make_config(method, TARGETS, seed=seed))
    fill(model, seed=fill_seed)
    return outputs(model.eval(), token_batch())


def test_methods_side_by_side_are_each_as_if_alone():
    model = four_methods()
    for method, seed, fill_seed in (("nola", 11, 1), ("vera", 2, 2), ("randlora", 3, 3), ("pranc", 4, 4)):
        model.set_adapter(method)
        assert model.active_adapter == method
        assert torch.equal(outputs(model, token_batch()), alone(method, seed, fill_seed))


@pytest.mark.parametrize("case", CASES)
def test_adapters_of_other_rank_seed_and_law_do_not_disturb_each_other(case):
    model = case.adapted()
    expected = {"default": outputs(model, case.batch())}
    other = {"seed": 99, "law": "normal"} | ({} if case.method.startswith("pranc") else {"r": 4})
    add_adapter(model, "other", case.config(**other), 2)
    assert torch.equal(outputs(model, case.batch()), expected["default"])
    model.set_adapter("other")
    expected["other"] = outputs(model, case.batch())
    assert torch.equal(expected["other"], outputs(case.adapted(fill_seed=2, **other), case.batch()))
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        assert torch.equal(outputs(model, case.batch()), expected[name])


@pytest.mark.parametrize("case", CASES)
def test_set_adapter_decides_what_trains(case):
    model = case.adapted()
    add_adapter(model, "other", case.config(seed=1), 2)
    for name in ("other", "default"):
        model.set_adapter(name)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained == set(coefficients_of(model, name))


@pytest.mark.parametrize("case", CASES)
def test_delete_adapter_leaves_the_others_as_they_were(case):
    model = case.adapted()
    before, expected = snapshot(model), outputs(model, case.batch())
    add_adapter(model, "other", case.config(seed=1), 2)
    model.delete_adapter("other")
    assert snapshot(model) == before
    assert torch.equal(outputs(model, case.batch()), expected)
    add_adapter(model, "other", case.config(seed=1), 2)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(outputs(model, case.batch()), outputs(case.adapted(fill_seed=2, seed=1), case.batch()))
    assert not coefficients_of(model, "default")


def test_deleting_an_adapter_forgets_everything_about_it():
    model = four_methods()
    model.delete_adapter("pranc")
    for layer in adapted_layers(model).values():
        assert set(layer.adapted) == set(layer.options) == {"nola", "vera", "randlora"}
        assert layer.matrices("pranc") == []
    with pytest.raises(ValueError, match="pranc"):
        model.set_adapter("pranc")


def test_a_deleted_name_can_be_used_for_another_method():
    model = four_methods()
    model.delete_adapter("pranc")
    add_adapter(model, "pranc", make_config("vera", TARGETS, seed=5), 6)
    model.set_adapter("pranc")
    assert torch.equal(outputs(model, token_batch()), alone("vera", 5, 6))


@pytest.mark.parametrize("case", CASES)
def test_disable_adapter_is_the_base_model(case):
    model, plain = case.adapted(), outputs(case.base(), case.batch())
    expected = outputs(model, case.batch())
    with model.disable_adapter():
        assert torch.equal(outputs(model, case.batch()), plain)
    assert torch.equal(outputs(model, case.batch()), expected)
    assert not torch.allclose(expected, plain, atol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_unload_gives_the_base_model_back(case):
    bare = case.adapted().unload()
    assert not adapted_layers(bare)
    assert snapshot(bare)[:2] == snapshot(case.base())[:2]
    assert torch.equal(outputs(bare, case.batch()), outputs(case.base(), case.batch()))


@pytest.mark.parametrize("case", PLAIN_CASES)
def test_two_active_adapters_add_up(case):
    model = case.adapted()
    add_adapter(model, "other", case.config(seed=1), 2)
    by_hand = dict(naive_deltas(model, case).items())
    for name, delta in naive_deltas(model, case, "other").items():
        by_hand[name] = by_hand[name] + delta
    model.base_model.set_adapter(["default", "other"])
    base = case.base()
    for name, delta in by_hand.items():
        layer = base.get_submodule(name)
        with torch.no_grad():
            layer.weight += (delta if layer.weight.shape == delta.shape else delta.T).float()
    if case.place == "conv1d":  # a square Conv1D cannot be told from its transpose by its shape
        base = case.base()
        for name, delta in by_hand.items():
            with torch.no_grad():
                base.get_submodule(name).weight += delta.T.float()
    torch.testing.assert_close(outputs(model, case.batch()), outputs(base, case.batch()), rtol=1e-4, atol=1e-4)


def test_adapters_on_different_modules():
    model = get_peft_model(seeded(tiny_llama), make_config("nola", ["q_proj"]))
    fill(model)
    expected = outputs(model.eval(), token_batch())
    add_adapter(model, "mlp", make_config("vera", ["down_proj", "q_proj"]), 2)
    assert torch.equal(outputs(model, token_batch()), expected)
    model.set_adapter("mlp")
    lone = get_peft_model(seeded(tiny_llama), make_config("vera", ["down_proj", "q_proj"]))
    fill(lone, seed=2)
    assert torch.equal(outputs(model, token_batch()), outputs(lone.eval(), token_batch()))


def test_adapters_on_different_slices_of_one_layer():
    model = get_peft_model(Case("c_attn", "nola").base(), make_config("nola", ["c_attn[q]"]))
    fill(model)
    expected = outputs(model.eval(), token_batch())
    for name, target, seed in (("v", "c_attn[v]", 2), ("whole", "c_attn", 3)):
        add_adapter(model, name, make_config("nola", [target]), seed)
        lone = get_peft_model(Case("c_attn", "nola").base(), make_config("nola", [target]))
        fill(lone, seed=seed)
        model.set_adapter(name)
        assert torch.equal(outputs(model, token_batch()), outputs(lone.eval(), token_batch()))
    model.set_adapter("default")
    assert torch.equal(outputs(model, token_batch()), expected)


def test_an_adapter_that_exists_and_a_foreign_type_are_refused():
    model = four_methods()
    before = snapshot(model)
    with pytest.raises(ValueError, match="peft type"):
        model.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))
    assert "lora" not in model.peft_config
    assert snapshot(model) == before


# --- weighted combinations ---


@pytest.mark.parametrize("case", CASES)
def test_weighted_adapter_is_the_weighted_sum_of_coefficients(case):
    model = case.adapted()
    add_adapter(model, "other", case.config(), 2)
    model.add_weighted_adapter(["default", "other"], [0.75, -0.5], "mixed")
    mixed = coefficients_of(model, "mixed")
    assert mixed
    for name, parameter in mixed.items():
        first, second = (coefficients_of(model, a)[name.replace(".mixed", f".{a}")] for a in ("default", "other"))
        torch.testing.assert_close(parameter, 0.75 * first - 0.5 * second)
    model.set_adapter("mixed")
    assert not torch.allclose(outputs(model, case.batch()), outputs(case.base(), case.batch()), atol=1e-3)


def test_weighted_sum_of_one_adapter_with_weight_one_is_that_adapter():
    for method in OPTIONS:
        case = Case("in_proj", method)
        model = case.adapted()
        expected = outputs(model, case.batch())
        model.add_weighted_adapter(["default"], [1.0], "copy", combination_type="linear")
        model.set_adapter("copy")
        assert torch.equal(outputs(model, case.batch()), expected)


def test_weighted_sum_of_pranc_is_the_weighted_sum_of_deltas():
    """ΔW of PRANC is linear in its coefficients, math (18): here the sum has an exact meaning."""
    case = Case("linear", "pranc")
    model = case.adapted()
    add_adapter(model, "other", case.config(), 2)
    model.add_weighted_adapter(["default", "other"], [0.25, 2.0], "mixed")
    for layer in adapted_layers(model).values():
        expected = 0.25 * layer.get_delta_weight("default") + 2.0 * layer.get_delta_weight("other")
        torch.testing.assert_close(layer.get_delta_weight("mixed"), expected, rtol=1e-4, atol=1e-5)


def test_weighted_adapter_saves_and_reloads(tmp_path):
    case = Case("linear", "nola-own-basis")
    model = case.adapted()
    add_adapter(model, "other", case.config(), 2)
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mixed")
    model.set_adapter("mixed")
    model.save_pretrained(tmp_path, selected_adapters=["mixed"])
    again = PeftModel.from_pretrained(case.base(), tmp_path / "mixed").eval()
    assert torch.equal(outputs(again, case.batch()), outputs(model, case.batch()))


def test_weighted_adapter_takes_the_stored_streams_of_its_sources(tmp_path):
    """Sources whose streams came from a file and not from this model's paths: the sum lives on the same basis."""
    case = Case("in_proj", "nola-own-basis")
    model = case.adapted()
    expected = outputs(model, case.batch())
    streams = {n: t + 1 for n, t in model.state_dict().items() if "randbasis_streams" in n}
    model.load_state_dict(streams, strict=False)
    moved = outputs(model, case.batch())
    assert not torch.allclose(moved, expected, atol=1e-3)
    model.add_weighted_adapter(["default"], [1.0], "copy")
    model.set_adapter("copy")
    assert torch.equal(outputs(model, case.batch()), moved)


@pytest.mark.parametrize("method", ONE_EACH)
@pytest.mark.parametrize("difference", [{"seed": 5}, {"law": "normal"}, {"target_modules": ("q_proj",)}, {"r": 2}])
def test_adapters_on_different_bases_cannot_be_combined(method, difference):
    if method == "pranc" and "r" in difference:
        difference = {"num_basis": 4}
    case = Case("linear", method)
    model = case.adapted()
    add_adapter(model, "other", case.config(**difference), 2)
    before = snapshot(model)
    with pytest.raises(CombinationError, match=r"must share .*'other' differs from 'default'.*convert_to_lora"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mixed")
    assert snapshot(model) == before
    assert "mixed" not in model.peft_config


@pytest.mark.parametrize(
    ("adapters", "weights", "kind", "error", "message"),
    [
        (["default", "nobody"], [1.0, 1.0], "linear", AdapterNameError, "nobody does not exist.*default"),
        (["default"], [1.0, 2.0], "linear", CombinationError, "one entry for each adapter, got 1 adapters and 2"),
        ([], [], "linear", CombinationError, "one entry for each adapter"),
        (["default"], [1.0], "svd", CombinationError, "must be 'linear', got 'svd'"),
    ],
)
def test_combinations_without_a_meaning_are_refused(adapters, weights, kind, error, message):
    model = Case("linear", "vera").adapted()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        model.add_weighted_adapter(adapters, weights, "mixed", combination_type=kind)
    assert snapshot(model) == before
    assert list(model.peft_config) == ["default"]

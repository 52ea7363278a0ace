"""Merging: into the base weight and out of it again, bit for bit."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from tuner_cases import (
    CASES,
    ONE_EACH,
    PLAIN_CASES,
    Case,
    adapted_layers,
    add_adapter,
    bits,
    coefficients_of,
    fill,
    make_config,
    outputs,
    seeded,
    tiny_llama,
    token_batch,
)

from randbasis.errors import MergeError


def base_weights(model: nn.Module) -> dict[str, bytes]:
    return bits({name: layer.get_base_layer().weight for name, layer in adapted_layers(model).items()})


@pytest.mark.parametrize("case", CASES)
def test_merge_and_unload_is_the_adapted_model(case):
    expected = outputs(case.adapted(), case.batch())
    merged = case.adapted().merge_and_unload()
    assert not adapted_layers(merged)
    assert type(merged) is type(case.base())
    assert [n for n, _ in merged.named_parameters()] == [n for n, _ in case.base().named_parameters()]
    torch.testing.assert_close(outputs(merged, case.batch()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_unmerge_restores_the_bits(case, dtype):
    model = get_peft_model(case.base().to(dtype), case.config())
    fill(model)
    before = base_weights(model)
    model.merge_adapter()
    assert all(base_weights(model)[name] != before[name] for name in before)
    model.unmerge_adapter()
    assert base_weights(model) == before


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merged_and_unmerged_outputs(case, safe_merge):
    model = case.adapted()
    expected = outputs(model, case.batch())
    model.merge_adapter(safe_merge=safe_merge)
    assert all(layer.merged for layer in adapted_layers(model).values())
    torch.testing.assert_close(outputs(model, case.batch()), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(outputs(model, case.batch()), expected)


@pytest.mark.parametrize("case", CASES)
def test_merging_changes_only_the_rows_of_the_slices(case):
    model = case.adapted()
    layers = adapted_layers(model)
    before = {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers.items()}
    model.merge_adapter()
    for name, layer in layers.items():
        change = layer.get_base_layer().weight.detach() - before[name]
        change = change.T if layer.transposed else change
        adapted = torch.zeros(layer.out_features, dtype=torch.bool)
        for one in layer.matrices("default"):
            adapted[one.part.start : one.part.stop] = True
        assert torch.equal(change.ne(0).any(1), adapted)


@pytest.mark.parametrize("case", PLAIN_CASES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_safe_merge_of_broken_coefficients_leaves_the_weight(case, bad):
    model = case.adapted()
    last = list(coefficients_of(model).values())[-1]
    with torch.no_grad():
        last.view(-1)[0] = bad
    before = base_weights(model)
    with pytest.raises(MergeError, match=r"NaNs detected.*default.*left as it was"):
        model.merge_and_unload(safe_merge=True)
    broken = [name for name, layer in adapted_layers(model).items() if not layer.merged]
    assert broken
    after = base_weights(model)
    assert all(after[name] == before[name] for name in broken)
    for layer in adapted_layers(model).values():
        if layer.merged:
            layer.unmerge()
    assert base_weights(model) == before


@pytest.mark.parametrize("case", PLAIN_CASES)
def test_several_adapters_merge_together(case):
    model = case.adapted()
    add_adapter(model, "other", case.config(seed=1), 2)
    model.base_model.set_adapter(["default", "other"])
    expected = outputs(model, case.batch())
    before = base_weights(model)
    model.merge_adapter(["default", "other"])
    torch.testing.assert_close(outputs(model, case.batch()), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert base_weights(model) == before


@pytest.mark.parametrize("method", ONE_EACH)
def test_merging_one_after_the_other_and_back(method):
    case = Case("linear", method)
    model = case.adapted()
    add_adapter(model, "other", case.config(seed=1), 2)
    before = base_weights(model)
    model.merge_adapter(["default"])
    first = base_weights(model)
    model.merge_adapter(["other"])
    assert base_weights(model) != first
    model.unmerge_adapter()
    assert base_weights(model) == before


@pytest.mark.parametrize("method", ONE_EACH)
def test_merging_a_chosen_adapter_alone(method):
    case = Case("linear", method)
    model = case.adapted()
    add_adapter(model, "other", case.config(seed=1), 2)
    expected = outputs(case.adapted(fill_seed=2, seed=1), case.batch())
    merged = model.merge_and_unload(adapter_names=["other"])
    torch.testing.assert_close(outputs(merged, case.batch()), expected, rtol=1e-4, atol=1e-4)


def test_merging_twice_warns_and_changes_nothing():
    model = Case("linear", "nola").adapted()
    model.merge_adapter()
    merged = base_weights(model)
    with pytest.warns(UserWarning, match="[Aa]lready"):
        model.merge_adapter()
    assert base_weights(model) == merged


def test_unmerging_twice_warns_and_changes_nothing():
    model = Case("linear", "nola").adapted()
    before = base_weights(model)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert base_weights(model) == before


@pytest.mark.parametrize("method", ONE_EACH)
def test_disabling_a_merged_adapter_gives_the_base_model(method):
    case = Case("c_attn", method)
    model = case.adapted()
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(outputs(model, case.batch()), outputs(case.base(), case.batch()))


@pytest.mark.parametrize("method", ONE_EACH)
def test_merged_model_saves_and_loads_without_us(method, tmp_path):
    case = Case("linear", method)
    merged = case.adapted().merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(again, case.batch()), outputs(merged, case.batch()))


@pytest.mark.parametrize("method", ONE_EACH)
def test_saving_a_merged_adapter_saves_the_coefficients(method, tmp_path):
    case = Case("linear", method)
    model = case.adapted()
    expected = outputs(model, case.batch())
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(case.base(), tmp_path).eval(), case.batch()), expected)


def test_coefficients_changed_while_merged_count_after_unmerging():
    case = Case("linear", "nola")
    model = case.adapted()
    outputs(model, case.batch())
    model.merge_adapter()
    fill(model, seed=2)
    model.unmerge_adapter()
    assert torch.equal(outputs(model, case.batch()), outputs(case.adapted(fill_seed=2), case.batch()))


def test_adapting_a_tied_head_does_not_touch_the_embedding():
    model = get_peft_model(seeded(tiny_llama, tie_word_embeddings=False), make_config("nola", ["lm_head"]))
    fill(model)
    embedding = model.get_input_embeddings().weight.detach().clone()
    expected = outputs(model.eval(), token_batch())
    merged = model.merge_and_unload()
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    torch.testing.assert_close(outputs(merged, token_batch()), expected, rtol=1e-4, atol=1e-4)

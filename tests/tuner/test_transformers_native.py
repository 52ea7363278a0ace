"""transformers' own adapter methods and auto classes, without a `PeftModel`."""

import pytest
import torch
from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, GPT2Model
from tuner_cases import (
    ONE_EACH,
    OPTIONS,
    PLACES,
    Case,
    adapted_layers,
    bits,
    coefficients_of,
    fill,
    make_config,
    needs_pair,
    outputs,
    seeded,
    tiny_gpt2,
    tiny_llama,
    token_batch,
)

LANGUAGE_CASES = [
    pytest.param(Case(place, method), id=f"{place}-{method}")
    for place in PLACES
    for method in OPTIONS
    if place != "in_proj"  # transformers' methods need a transformers model
]


def native(case: Case, seed: int = 1):
    model = case.base()
    model.add_adapter(case.config())
    fill(model, seed=seed)
    return model.eval()


@needs_pair
@pytest.mark.parametrize("case", LANGUAGE_CASES)
def test_add_adapter_is_get_peft_model(case):
    assert torch.equal(outputs(native(case), case.batch()), outputs(case.adapted(), case.batch()))


@needs_pair
@pytest.mark.parametrize("case", LANGUAGE_CASES)
def test_save_and_load(case, tmp_path):
    model = native(case)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    own_basis = case.method == "nola-own-basis"
    assert len(stored) == 1 + len(coefficients_of(model)) + (len(adapted_layers(model)) if own_basis else 0)
    again = case.base()
    again.load_adapter(str(tmp_path))
    assert torch.equal(outputs(again.eval(), case.batch()), outputs(model, case.batch()))
    through_peft = PeftModel.from_pretrained(case.base(), tmp_path).eval()
    assert torch.equal(outputs(through_peft, case.batch()), outputs(model, case.batch()))


@pytest.mark.parametrize("case", LANGUAGE_CASES)
def test_load_what_peft_saved(case, tmp_path):
    model = case.adapted()
    model.save_pretrained(tmp_path)
    again = case.base()
    again.load_adapter(str(tmp_path), adapter_name="mine")
    assert bits({n.replace(".mine.", ".default."): p for n, p in coefficients_of(again, "mine").items()}) == bits(
        {n.removeprefix("base_model.model."): p for n, p in coefficients_of(model).items()}
    )
    assert torch.equal(outputs(again.eval(), case.batch()), outputs(model, case.batch()))


@needs_pair
@pytest.mark.parametrize("method", OPTIONS)
def test_several_adapters_on_off_and_gone(method):
    case = Case("linear", method)
    model = native(case)
    first, plain = outputs(model, case.batch()), outputs(case.base(), case.batch())
    model.add_adapter(case.config(seed=3), adapter_name="other")
    fill(model, "other", 2)
    model.eval()
    assert model.active_adapters() == ["other"]
    second = outputs(model, case.batch())
    assert torch.equal(second, outputs(case.adapted(fill_seed=2, seed=3), case.batch()))
    model.set_adapter("default")
    assert torch.equal(outputs(model, case.batch()), first)
    model.disable_adapters()
    assert torch.equal(outputs(model, case.batch()), plain)
    model.enable_adapters()
    assert torch.equal(outputs(model, case.batch()), first)
    model.delete_adapter("other")
    assert not coefficients_of(model, "other")
    assert torch.equal(outputs(model, case.batch()), first)
    model.delete_adapter("default")
    assert not coefficients_of(model)


@needs_pair
@pytest.mark.parametrize("method", OPTIONS)
def test_get_adapter_state_dict(method):
    case = Case("c_attn", method)
    model = native(case)
    state = model.get_adapter_state_dict()
    trained = {n for n in state if "streams" not in n and "meaning" not in n}
    assert trained == {n.replace(".default", "") for n in coefficients_of(model)}


@pytest.mark.parametrize("method", OPTIONS)
def test_auto_classes_take_an_adapter_directory(method, tmp_path):
    base = seeded(tiny_gpt2)
    base.save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(loaded, make_config(method, ["c_attn[q,v]"], task_type="CAUSAL_LM"))
    fill(model)
    expected = outputs(model.eval(), token_batch())
    model.save_pretrained(tmp_path / "adapter")
    for load in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
        assert torch.equal(outputs(load.from_pretrained(tmp_path / "adapter").eval(), token_batch()), expected)


@pytest.mark.parametrize("method", OPTIONS)
def test_auto_peft_model_finds_the_class_by_itself(method, tmp_path):
    base = seeded(tiny_llama)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), make_config(method, ["q_proj"]))
    fill(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    again = AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(outputs(again, token_batch()), outputs(model, token_batch()))


@needs_pair
@pytest.mark.parametrize("method", ["nola-own-basis", "nola"])
def test_another_head_and_so_another_path(method, tmp_path):
    """AutoModel against ForCausalLM: the module paths differ by a prefix, what was stored does not."""
    base = seeded(tiny_gpt2)
    base.save_pretrained(tmp_path / "base")
    bare = AutoModel.from_pretrained(tmp_path / "base")
    assert isinstance(bare, GPT2Model)
    bare.add_adapter(make_config(method, ["c_attn[q,v]"]))
    fill(bare)
    bare.eval().save_pretrained(tmp_path / "adapter")
    with_head = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with_head.load_adapter(str(tmp_path / "adapter"))
    assert list(adapted_layers(with_head)) == [f"transformer.{name}" for name in adapted_layers(bare)]
    for name, layer in adapted_layers(with_head).items():
        theirs = adapted_layers(bare)[name.removeprefix("transformer.")]
        assert torch.equal(layer.get_delta_weight("default"), theirs.get_delta_weight("default"))
        assert layer.get_delta_weight("default").abs().max() > 1e-3
    hidden = with_head.eval()(**token_batch(), output_hidden_states=True).hidden_states[-1]
    # What can be trained and what cannot may take different orders of the same contraction.
    torch.testing.assert_close(hidden, bare(**token_batch()).last_hidden_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ONE_EACH)
@pytest.mark.parametrize("place", PLACES)
def test_a_model_that_evaluates_drops_no_inputs_of_what_is_put_into_it(place, method):
    case = Case(place, method)
    base = case.base().eval()
    inject_adapter_in_model(case.config(dropout=0.5), base, "default")
    fill(base)
    assert torch.equal(outputs(base, case.batch()), outputs(base.eval(), case.batch()))
    base = case.base().train()
    inject_adapter_in_model(case.config(dropout=0.5), base, "default")
    assert all(layer.training for layer in adapted_layers(base).values())


@pytest.mark.parametrize("method", OPTIONS)
def test_low_level_injection(method):
    case = Case("in_proj", method)
    model = inject_adapter_in_model(case.config(), case.base())
    fill(model)
    assert torch.equal(outputs(model.eval(), case.batch()), outputs(case.adapted(), case.batch()))


@needs_pair
@pytest.mark.parametrize("method", OPTIONS)
def test_global_random_state_is_untouched(method):
    base = seeded(tiny_llama)
    before = torch.get_rng_state()
    base.add_adapter(make_config(method, ["q_proj"]))
    assert torch.equal(before, torch.get_rng_state())

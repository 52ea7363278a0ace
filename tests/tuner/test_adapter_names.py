"""Adapters called like a word of a module's path: every tensor is saved and loaded, or the name is refused at once."""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from tuner_cases import (
    ONE_EACH,
    adapted_layers,
    coefficients_of,
    fill,
    make_config,
    needs_pair,
    outputs,
    pair_works,
    seeded,
    snapshot,
    tiny_gpt2,
    tiny_llama,
    tiny_phi3,
    token_batch,
)

from randbasis.errors import AdapterNameError

WEIGHTS = "adapter_model.safetensors"
FAMILIES: dict[str, tuple[Any, list[str], tuple[str, ...]]] = {
    "llama": (tiny_llama, ["q_proj", "v_proj"], ("0", "1", "layers", "self_attn", "q_proj", "base_layer", "bias")),
    "gpt2": (tiny_gpt2, ["c_attn[q,v]"], ("0", "h", "attn", "c_attn", "transformer_")),
    "phi3": (tiny_phi3, ["qkv_proj[q]"], ("1", "layers", "qkv_proj")),
}
NAMED = [
    pytest.param(family, name, id=f"{family}-{name}") for family, (_, _, names) in FAMILIES.items() for name in names
]


def tiny_classifier() -> BertForSequenceClassification:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=64, num_labels=3))


def pair(family: str, method: str, names: tuple[str, str], *, native: bool) -> Any:
    build, targets, _ = FAMILIES[family]
    model = seeded(build)
    for seed, name in enumerate(names):
        config = make_config(method, targets, seed=seed)
        if native or seed:
            model.add_adapter(*((config, name) if native else (name, config)))
        else:
            model = get_peft_model(model, config, adapter_name=name)
        fill(model, name, seed + 1)
    return model.eval()


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_pair)], ids=["peft", "transformers"])
@pytest.mark.parametrize("method", ONE_EACH)
@pytest.mark.parametrize(("family", "name"), NAMED)
def test_nothing_is_lost(family, name, method, native, tmp_path):
    build = FAMILIES[family][0]
    for names in (("tenant", name), (name, "tenant")):
        model = pair(family, method, names, native=native)
        for one in names:
            model.set_adapter(one)
            expected = outputs(model, token_batch())
            folder = tmp_path / f"{names[0]}-first-{one}"
            model.save_pretrained(folder, **({} if native else {"selected_adapters": [one]}))
            folder = folder if native else folder / one
            stored = {key for key in load_file(folder / WEIGHTS) if "meaning" not in key}
            assert len(stored) == len(coefficients_of(model, one)) > 0
            again = PeftModel.from_pretrained(seeded(build), folder, adapter_name=name)
            again.load_adapter(str(folder), "second")
            for loaded in (name, "second"):
                again.set_adapter(loaded)
                assert torch.equal(outputs(again.eval(), token_batch()), expected)
            if pair_works():
                through = seeded(build)
                through.load_adapter(str(folder), adapter_name=name)
                assert torch.equal(outputs(through.eval(), token_batch()), expected)


@pytest.mark.parametrize("bias", ["all", "randbasis_only"])
@pytest.mark.parametrize("name", ["bias", "base_layer", "weight", "h", "0"])
@pytest.mark.parametrize("method", ONE_EACH)
def test_trained_biases_are_not_lost(method, name, bias, tmp_path):
    model = get_peft_model(seeded(tiny_gpt2), make_config(method, ["c_attn"], bias=bias), adapter_name=name)
    fill(model, name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(seeded(tiny_gpt2), tmp_path / name, adapter_name=name).eval()
    assert torch.equal(outputs(again, token_batch()), outputs(model, token_batch()))


@pytest.mark.parametrize("name", ["0", "encoder", "query"])
@pytest.mark.parametrize("method", ONE_EACH)
def test_heads_of_two_adapters_are_kept(method, name, tmp_path):
    config = make_config(method, ["query"], modules_to_save=["classifier"])
    model = get_peft_model(seeded(tiny_classifier), config, adapter_name="tenant")
    model.add_adapter(name, make_config(method, ["query"], modules_to_save=["classifier"], seed=3))
    for size, one in enumerate(("tenant", name)):
        fill(model, one, size + 1)
        with torch.no_grad():
            model.base_model.model.classifier.modules_to_save[one].weight.add_(1.0 + size)
    model.eval().save_pretrained(tmp_path)
    for one in ("tenant", name):
        model.set_adapter(one)
        again = PeftModel.from_pretrained(seeded(tiny_classifier), tmp_path / one).eval()
        assert torch.equal(outputs(again, token_batch()), outputs(model, token_batch()))


REFUSED: list[tuple[Any, str]] = [
    ("default.x", "has no dot"),
    ("/tmp/adapter", "no absolute path"),
    ("__base__", "no adapter in a mixed batch"),
    ("randbasis_meaning", "a tensor of an adapter"),
    *((name, "attribute of the module of torch") for name in ("type", "forward", "values", "training")),
]


@pytest.mark.parametrize("method", ONE_EACH)
@pytest.mark.parametrize(("name", "message"), REFUSED)
def test_names_that_no_module_can_have(name, message, method):
    config = make_config(method, ["q_proj"])
    base = seeded(tiny_llama)
    before = snapshot(base)
    if pair_works():
        with pytest.raises(AdapterNameError, match=message):
            base.add_adapter(config, name)
    with pytest.raises(AdapterNameError, match=message):
        get_peft_model(base, config, adapter_name=name)
    assert snapshot(base) == before
    model = get_peft_model(base, make_config(method, ["q_proj"]), adapter_name="tenant")
    before = snapshot(model)
    with pytest.raises(AdapterNameError, match=message):
        model.add_adapter(name, config)
    assert snapshot(model) == before
    assert list(model.peft_config) == ["tenant"]


@pytest.mark.parametrize(
    ("build", "targets", "name", "options"),
    [
        (tiny_llama, ["q_proj"], "model", {}),
        (tiny_llama, ["q_proj"], "embed_tokens", {}),
        (tiny_gpt2, ["c_attn"], "weight", {}),
        (tiny_classifier, ["query"], "bias", {"modules_to_save": ["classifier"]}),
        (tiny_classifier, ["query"], "modules_to_save", {"modules_to_save": ["classifier"]}),
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_names_for_which_peft_loses_what_is_saved_whole(build, targets, name, options, first):
    """Whichever of the two comes first: a lone adapter may have the name, since nothing is taken from another."""
    names = (name, "tenant") if first else ("tenant", name)
    model = get_peft_model(seeded(build), make_config("nola", targets, **options), adapter_name=names[0])
    before = snapshot(model)
    with pytest.raises(AdapterNameError, match=f"cannot be called {name!r} on this model: .* loses"):
        model.add_adapter(names[1], make_config("nola", targets, **options))
    assert snapshot(model) == before


def test_the_name_of_a_head():
    base: nn.Module = seeded(tiny_classifier)
    before = snapshot(base)
    with pytest.raises(AdapterNameError, match="where modules_to_save names a module so"):
        get_peft_model(base, make_config("vera", ["query"], modules_to_save=["classifier"]), adapter_name="classifier")
    assert snapshot(base) == before
    assert not adapted_layers(base)

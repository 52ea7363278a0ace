"""Heads that are trained whole beside adapters, and weights that a head shares with the embedding."""

import warnings

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn
from tuner_cases import ONE_EACH, Case, make_config, outputs, seeded, snapshot, tiny_gpt2, tiny_llama, token_batch

from randbasis.errors import CombinationError, MergeError

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_labels": 3,
}  # fmt: skip
CLASSIFIERS = {
    "BertForSequenceClassification": ["query"],
    "RobertaForSequenceClassification": ["query", "dense"],
    "ElectraForSequenceClassification": ["query", "dense"],
}


def classifier(name: str) -> nn.Module:
    kind = getattr(transformers, name)
    return seeded(kind, kind.config_class(**SIZES))


def trained(name: str, method: str, *adapters: str) -> nn.Module:
    def config():
        return make_config(method, CLASSIFIERS[name], task_type="SEQ_CLS", init_weights=False)

    model = get_peft_model(classifier(name), config(), adapter_name=adapters[0])
    for adapter in adapters[1:]:
        model.add_adapter(adapter, config())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter.normal_(generator=generator)
            elif "randbasis_" in key:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
    return model.eval()


@pytest.mark.parametrize("method", ONE_EACH)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_merging_gives_the_trained_head_and_unloading_the_one_of_the_base(name, method):
    want = outputs(trained(name, method, "first"), token_batch())
    merged = trained(name, method, "first").merge_and_unload()
    torch.testing.assert_close(outputs(merged, token_batch()), want, rtol=1e-4, atol=1e-4)
    assert not any("modules_to_save" in key for key in merged.state_dict())
    bare, plain = trained(name, method, "first").unload(), classifier(name)
    assert torch.equal(outputs(bare.eval(), token_batch()), outputs(plain, token_batch()))


@pytest.mark.parametrize("method", ONE_EACH)
def test_a_whole_block_beside_the_adapter_is_merged(method):
    model = get_peft_model(seeded(tiny_llama), make_config(method, ["q_proj"], modules_to_save=["mlp"])).eval()
    want = outputs(model, token_batch())
    torch.testing.assert_close(outputs(model.merge_and_unload(), token_batch()), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ONE_EACH)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_one_adapter_with_weight_one_keeps_its_head(name, method):
    model = trained(name, method, "first", "second")
    model.set_adapter("second")
    want = outputs(model, token_batch())
    model.add_weighted_adapter(["second"], [1.0], "copy")
    model.set_adapter("copy")
    assert torch.equal(outputs(model.eval(), token_batch()), want)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_heads_are_averaged_with_the_coefficients(name):
    model = trained(name, "nola", "a", "b") if name.startswith("Rob") else trained(name, "nola", "first", "second")
    names = list(model.peft_config)
    model.add_weighted_adapter(names, [0.25, 0.75], "mean")
    heads = model.base_model.model.classifier.modules_to_save
    for key, value in heads["mean"].state_dict().items():
        want = 0.25 * heads[names[0]].state_dict()[key] + 0.75 * heads[names[1]].state_dict()[key]
        torch.testing.assert_close(value, want)


def test_heads_that_cannot_be_combined_are_refused_and_nothing_is_changed():
    def config(**options):
        return make_config("nola", ["q_proj"], init_weights=False, **options)

    model = get_peft_model(seeded(tiny_llama), config(modules_to_save=["model.norm"]), adapter_name="first")
    model.add_adapter("second", config(modules_to_save=["model.norm"]))
    model.add_adapter("bare", config())
    before = snapshot(model)
    for adapters, weights, message in (
        (["first", "second"], [1.0, 1.0], "the weights sum to 2, and model.norm is made of weights"),
        (["first", "bare"], [0.5, 0.5], "model.norm.weight differs .* is in one alone, of 'first' and 'bare'"),
    ):
        with pytest.raises(CombinationError, match=message):
            model.add_weighted_adapter(adapters, weights, "new")
    assert snapshot(model) == before
    assert "new" not in model.peft_config


def test_adapters_with_biases_of_the_base_are_not_combined():
    model = get_peft_model(seeded(tiny_gpt2), make_config("nola", ["c_attn"], bias="all"), adapter_name="first")
    with pytest.raises(CombinationError, match="'first' trains them"):
        model.add_weighted_adapter(["first"], [1.0], "new")
    assert list(model.peft_config) == ["first"]


# --- tied weights ---

TIED = {
    "llama": (lambda: seeded(tiny_llama, tie_word_embeddings=True), "lm_head"),
    "gpt2": (lambda: seeded(tiny_gpt2), "lm_head"),
    "bert": (
        lambda: seeded(transformers.BertForMaskedLM, transformers.BertConfig(**SIZES)),
        "cls.predictions.decoder",
    ),
    "opt": (
        lambda: seeded(
            transformers.OPTForCausalLM,
            transformers.OPTConfig(
                vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4,
                word_embed_proj_dim=32, max_position_embeddings=32,
            ),
        ),
        "lm_head",
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", ONE_EACH)
@pytest.mark.parametrize("name", TIED)
def test_merging_a_tied_head_leaves_the_embedding_and_survives_saving(name, method, tmp_path):
    make, target = TIED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's on tied layers
        model = get_peft_model(make(), make_config(method, [target], init_weights=False)).eval()
        want, embedding = outputs(model, token_batch()), make().get_input_embeddings().weight
        model.merge_adapter()
        torch.testing.assert_close(outputs(model, token_batch()), want, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        base = model.get_base_model()
        assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
        merged = model.merge_and_unload()
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    torch.testing.assert_close(outputs(merged, token_batch()), want, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(outputs(again, token_batch()), want, rtol=1e-4, atol=1e-4)


def test_a_layer_that_cannot_be_merged_keeps_the_head_from_being_merged():
    model = Case("linear", "nola").adapted()
    list(model.get_base_model().model.layers)[1].mlp.down_proj.base_layer.register_forward_hook(lambda *_: None)
    before = snapshot(model)
    with pytest.raises(MergeError, match=r"layers\.1\.mlp\.down_proj"):
        model.merge_and_unload()
    assert snapshot(model) == before

"""The smaller pieces: adapter table, order of rows, pooling, parameter groups, settings from words."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import BertConfig, BertModel

import randbasis
from randbasis.errors import HyperparameterError, MissingPackageError, RankError, SettingError, UnknownMethodError
from randbasis.train import METHOD_NAMES, AdapterSettings, PooledClassifier, peft_config
from randbasis.train import metrics as metrics_module
from randbasis.train.loop import adapt, count_trained
from randbasis.train.loop_settings import LoopSettings
from randbasis.train.randomness import confined_randomness
from randbasis.train.settings import settings_from_words
from randbasis.train.task import CUT, count_cut, inference
from randbasis.train.trained_parameters import restore_parameters, save_parameters
from randbasis.train.trainer import EpochOrder, parameter_groups
from randbasis.tuner.targets import split_names


def config_of(**words: object) -> PeftConfig:
    config = peft_config(AdapterSettings(**words), task_type="SEQ_CLS", head=["classifier"])
    assert config is not None
    return config


def test_the_words_of_each_method_reach_its_configuration():
    nola = config_of(method="nola", rank=3, basis=5, basis_b=7, alpha=2.0, seed=9, law="normal",
                     parametrization="plain",
                     unique_basis=True, dropout=0.1, targets=("query", "value"))  # fmt: skip
    assert isinstance(nola, randbasis.NolaConfig)
    assert (nola.r, nola.num_basis, nola.num_basis_b, nola.alpha, nola.seed) == (3, 5, 7, 2.0, 9)
    assert (nola.law, nola.parametrization, nola.share_basis, nola.dropout) == ("normal", "plain", False, 0.1)
    assert nola.target_modules == {"query", "value"}
    assert nola.modules_to_save == ["classifier"]
    assert nola.task_type == "SEQ_CLS"
    vera = config_of(method="vera", rank=4, seed=2)
    assert isinstance(vera, randbasis.VeraConfig)
    assert (vera.r, vera.seed) == (4, 2)
    randlora = config_of(method="randlora", rank=6, alpha=3.0)
    assert isinstance(randlora, randbasis.RandLoraConfig)
    assert (randlora.r, randlora.alpha) == (6, 3.0)
    pranc = config_of(method="pranc", basis=11)
    assert isinstance(pranc, randbasis.PrancConfig)
    assert pranc.num_basis == 11
    lora = config_of(method="lora", rank=2, alpha=4.0, seed=8)
    assert isinstance(lora, LoraConfig)
    assert (lora.r, lora.lora_alpha) == (2, 4.0)
    assert peft_config(AdapterSettings(method="none"), task_type=None, head=["classifier"]) is None


@pytest.mark.parametrize("method", [name for name in METHOD_NAMES if name != "none"])
def test_what_is_not_given_is_the_methods_own(method: str):
    config = config_of(method=method)
    own = type(config)().to_dict()
    given = {"target_modules", "exclude_modules", "modules_to_save", "task_type"}
    assert {name: value for name, value in config.to_dict().items() if name not in given} == {
        name: value for name, value in own.items() if name not in given
    }


def test_words_that_a_method_does_not_know():
    with pytest.raises(UnknownMethodError, match=r"'relora' is unknown; did you mean .*lora"):
        config_of(method="relora")
    with pytest.raises(HyperparameterError, match="'vera' has no basis; it takes rank"):
        config_of(method="vera", basis=4)
    with pytest.raises(HyperparameterError, match="'lora' has no law"):
        config_of(method="lora", law="sign")
    with pytest.raises(RankError, match="basis_b must be at least 1, got 0"):
        config_of(method="nola", basis_b=0)
    with pytest.raises(HyperparameterError, match="dropout must be in"):
        config_of(dropout=1.0)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("all-linear", ("all-linear",)),
        ("query, value", ("query", "value")),
        ("c_attn[q,v],c_proj", ("c_attn[q,v]", "c_proj")),
        ("qkv[0:192],gate_up_proj[up]", ("qkv[0:192]", "gate_up_proj[up]")),
        ("re:.*\\.(q|v){1,2}", ("re:.*\\.(q|v){1,2}",)),
        ("", ()),
    ],
)
def test_names_are_split_outside_of_brackets(text: str, names: tuple[str, ...]):
    assert tuple(split_names(text)) == names


def test_regular_expressions_and_defaults_of_targets():
    assert config_of(method="lora", targets=("re:.*query",)).to_dict()["target_modules"] == ".*query"
    assert config_of(method="lora", targets=("all-linear",)).to_dict()["target_modules"] == "all-linear"
    assert config_of(method="lora", targets=()).to_dict()["target_modules"] is None


def test_settings_from_words():
    words = {"task": "causal-lm", "model": "m", "data": "a.csv", "eval_data": "b.csv", "output": "out",
             "targets": "q,v",
             "rank": 3, "batch_size": 5, "prompt_column": "p", "quiet": True}  # fmt: skip
    settings = settings_from_words(words)
    assert (settings.data.train, settings.data.eval, settings.data.prompt_column) == ("a.csv", "b.csv", "p")
    assert (settings.adapter.targets, settings.adapter.rank, settings.loop.batch_size) == (("q", "v"), 3, 5)
    assert settings.as_json()["adapter"]["targets"] == ["q", "v"]


@pytest.mark.parametrize("name", ["batch_size", "max_steps", "accumulate", "eval_every", "early_stop", "threads"])
def test_counts_below_one(name: str):
    with pytest.raises(SettingError, match=f"{name} must be at least 1, got 0"):
        replace(LoopSettings(), **{name: 0}).check()


@pytest.mark.parametrize("lengths", [None, [7, 3, 9, 1, 4, 4, 8, 2, 6, 5, 3] * 4])
def test_the_order_is_a_permutation_that_seed_and_epoch_decide(lengths: list[int] | None):
    def order(seed: int, epoch: int) -> list[int]:
        rows = EpochOrder(44, 4, seed, lengths)
        rows.set_epoch(epoch)
        return list(rows)

    assert sorted(order(1, 0)) == list(range(44))
    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_rows_of_like_length_share_a_batch():
    lengths = [i % 10 for i in range(1000)]
    rows = list(EpochOrder(1000, 8, 0, lengths))
    spread = [
        max(lengths[i] for i in rows[s : s + 8]) - min(lengths[i] for i in rows[s : s + 8]) for s in range(0, 1000, 8)
    ]
    assert sum(spread) / len(spread) < 0.5


def tiny_encoder() -> BertModel:
    return BertModel(BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                intermediate_size=8,
                                max_position_embeddings=16, num_labels=3), add_pooling_layer=False)  # fmt: skip


def test_pooling_against_the_formula():
    encoder = tiny_encoder()
    ids, mask = (
        torch.randint(20, (2, 5), generator=torch.Generator().manual_seed(0)),
        torch.tensor([[1] * 5, [1, 1, 0, 0, 0]]),
    )
    for pooling in ("mean", "cls"):
        model = PooledClassifier(encoder.config, encoder, pooling).eval()
        states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = torch.stack([states[0].mean(0), states[1, :2].mean(0)]) if pooling == "mean" else states[:, 0]
        expected = pooled @ model.classifier.weight.T + model.classifier.bias
        output = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([2, 0]))
        assert torch.allclose(output.logits, expected, atol=1e-6)
        assert torch.allclose(output.loss, nn.functional.cross_entropy(expected, torch.tensor([2, 0])))
    padded = model(input_ids=torch.where(mask.bool(), ids, 7), attention_mask=mask).logits
    assert torch.allclose(padded, output.logits, atol=1e-6)


def test_an_unused_pooler_is_not_adapted(encoder: str):
    model = PooledClassifier.from_encoder(encoder, num_labels=2, pooling="mean", dtype="float32")
    assert not any("pooler" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("method", ["nola", "lora", "none"])
def test_groups_counts_and_restoring(method: str, tmp_path_factory: pytest.TempPathFactory):
    encoder = tiny_encoder()
    model = PooledClassifier(encoder.config, encoder, "mean")
    config = peft_config(AdapterSettings(method=method), task_type="SEQ_CLS", head=["classifier"])
    adapted = adapt(model, config, ["classifier"])
    groups = parameter_groups(adapted)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert set().union(*groups.values()) == trained
    assert bool(groups["adapter"]) == (method != "none")
    assert len(groups["head"]) == len(groups["head_vectors"]) == 1
    assert count_trained(adapted)[1] == 3 * 8 + 3
    folder = tmp_path_factory.mktemp("kept")
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    save_parameters(adapted, folder)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1.0)
    restore_parameters(adapted, folder)
    assert all(torch.equal(before[name], p) for name, p in adapted.named_parameters())


def test_confined_randomness_is_repeatable_and_confined():
    before = torch.get_rng_state()
    draws: list[torch.Tensor] = []
    for seed in (3, 3, 4):
        with confined_randomness(seed):
            draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(before, torch.get_rng_state())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name, name=name)

    monkeypatch.setattr(metrics_module, "import_module", missing)
    with pytest.raises(MissingPackageError, match=r"sacrebleu, which is not .*install randbasis\[train\]"):
        metrics_module.bleu(["x"], [["x"]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_leaves_every_mode_as_it_was(dtype: torch.dtype):
    """And computes under autocast exactly where the base is in half precision."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)).to(dtype)
    model[1].eval()
    before = [module.training for module in model.modules()]
    assert True in before
    assert False in before
    with inference(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu") == (dtype is torch.bfloat16)
    assert [module.training for module in model.modules()] == before


def test_cut_rows_and_lost_targets_are_counted():
    examples = [
        {CUT: True, "labels": [-100, -100]},
        {CUT: True, "labels": [-100, 5]},
        {"labels": [7]},
        {"labels": []},
        {"labels": 1},
    ]
    assert count_cut(examples) == {"rows": 2, "targets": 1}

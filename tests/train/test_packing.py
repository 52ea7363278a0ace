"""Packed rows against the same rows alone: losses, gradients, whole steps; and models that mix them up."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import torch as safetensors
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from randbasis.errors import SettingError
from randbasis.train import AdapterSettings, DataSettings, LoopSettings, TrainSettings, prepare, train
from randbasis.train.packing import check_kept_apart, collate_packs, pack

ROWS = [{"input_ids": [1, *range(4, 4 + n), 2], "labels": [-100, *range(4, 4 + n), 2]} for n in (1, 9, 3, 5, 2, 7)]


@pytest.fixture
def pairs(language_model: str, pairs_jsonl: str, tmp_path: Path) -> TrainSettings:
    data = DataSettings(pairs_jsonl, eval=pairs_jsonl, prompt_column="mr", target_column="ref")
    return TrainSettings(
        "causal-lm", language_model, data, tmp_path / "run", max_length=40, packing=True,
        adapter=AdapterSettings("lora", rank=4), loop=LoopSettings(max_steps=1, batch_size=20, warmup=0.0, threads=1),
    )  # fmt: skip


@given(st.lists(st.integers(1, 16), min_size=1, max_size=60), st.integers(16, 40))
def test_every_row_is_in_one_pack_whole(lengths: list[int], length: int):
    rows = [{"input_ids": [i] * n, "labels": [i] * n} for i, n in enumerate(lengths)]
    packs = pack(rows, length)
    assert max(len(one["input_ids"]) for one in packs) <= length
    runs = [(i, one["input_ids"].count(i)) for one in packs for i in dict.fromkeys(one["input_ids"])]
    assert sorted(runs) == list(enumerate(lengths))
    assert len(packs) <= 1.25 * -(-sum(lengths) // length) + 4  # best fit, longest first, is near the best
    for one in packs:
        starts = [i for i, place in enumerate(one["position_ids"]) if place == 0]
        assert [one["labels"][i] for i in starts] == [-100] * len(starts)
        assert all(b - a == 1 for a, b in zip(one["position_ids"], one["position_ids"][1:], strict=False) if b)


def test_losses_of_packed_rows_are_those_of_rows_alone(pairs: TrainSettings):
    model = prepare(pairs).load_model(pairs).eval()
    packs = pack(ROWS, 24)
    assert len(packs) < len(ROWS)
    batch = collate_packs(packs, 3)
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    together = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
    alone = torch.cat([
        cross_entropy(model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1],
                      torch.tensor(row["labels"][1:]), reduction="none") for row in ROWS
    ])  # fmt: skip
    learned = together[batch["labels"][:, 1:].flatten() != -100]
    assert torch.allclose(learned.sort().values, alone.sort().values, atol=1e-5)


def test_a_step_on_packs_is_the_step_on_rows(pairs: TrainSettings, tmp_path: Path):
    one = train(pairs)
    other = train(replace(pairs, packing=False, output=tmp_path / "rows"))
    assert one.summary["packed_into"] < one.summary["train_rows"] == other.summary["train_rows"] == 20
    assert "packed_into" not in other.summary
    weights = [safetensors.load_file(run.output / "adapter_model.safetensors") for run in (one, other)]
    moved = [name for name, value in weights[0].items() if "lora_B" in name and value.abs().max() > 1e-4]
    assert moved
    for name in moved:
        assert torch.allclose(weights[0][name], weights[1][name], rtol=1e-2, atol=1e-5)
    assert one.summary["after"]["loss"] == pytest.approx(other.summary["after"]["loss"], rel=1e-4)


def test_real_rows_on_a_real_model(data_dir: Path):
    data = DataSettings(data_dir / "alpaca5k/alpaca_5000.json.gz", target_column="output", limit=12)
    settings = TrainSettings(
        "causal-lm", str(data_dir / "llama_stories260k"), data, "never-made", max_length=200, packing=True,
        prompt_template=r"Task: {instruction}\n=>",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="were cut"):
        prepared = prepare(settings)
    assert prepared.packs is not None
    assert len(prepared.packs) < 12
    model = prepared.load_model(settings).eval()
    check_kept_apart(model, prepared.train)
    batch = prepared.task.training_collate(prepared.packs)
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1]
    loss = float(cross_entropy(logits.flatten(0, 1), labels.flatten()))
    assert loss == pytest.approx(prepared.task.score(model, prepared.train, 4)["loss"], rel=1e-5)


def test_a_model_that_keeps_rows_apart_is_taken():
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 33, "n_positions": 48}
    check_kept_apart(GPT2LMHeadModel(GPT2Config(**sizes)), ROWS)


class _Leaking(nn.Module):
    """Says of a token the mean of all before it, whatever its row."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(33, 33)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool = True):
        from transformers.modeling_outputs import CausalLMOutput

        steps = torch.arange(1, input_ids.shape[1] + 1)[None, :, None]
        return CausalLMOutput(logits=self.table(input_ids).cumsum(1) / steps)


def test_a_model_that_would_mix_rows_up_is_refused():
    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=33, hidden_size=16, num_hidden_layers=1, state_size=4))
    for model in (_Leaking(), mamba):
        with pytest.raises(SettingError, match="packing does not work with"):
            check_kept_apart(model, ROWS)


def test_packing_is_for_language_models(pairs: TrainSettings):
    with pytest.raises(SettingError, match="packing is for causal-lm"):
        train(replace(pairs, task="sequence-classification"))

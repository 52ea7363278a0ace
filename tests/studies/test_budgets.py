"""Budgets against counts of models that were really adapted."""

import pytest
from peft import get_peft_model
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from randbasis.errors import UnknownMethodError
from randbasis.train import peft_config
from randbasis.train.loop import count_trained
from studies import Row, adapted_shapes, configure

QUERY_VALUE = ("query", "value")


def bert() -> BertModel:
    return BertModel(BertConfig(vocab_size=8, hidden_size=96, num_hidden_layers=2, num_attention_heads=2,
                                intermediate_size=64))  # fmt: skip


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                        num_key_value_heads=2, intermediate_size=96))  # fmt: skip


def count(make, row: Row, targets: tuple[str, ...]) -> int:
    settings = configure(row, adapted_shapes(make(), targets), targets)
    config = peft_config(settings, task_type=None, head=[])
    assert config is not None
    return count_trained(get_peft_model(make(), config))[0]


def test_shapes_are_those_of_the_matrices_and_the_head_is_left_out():
    assert adapted_shapes(bert(), QUERY_VALUE) == [(96, 96)] * 4
    llama_shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)] * 2
    assert adapted_shapes(llama(), ("all-linear",)) == llama_shapes


@pytest.mark.parametrize(("make", "targets"), [(bert, QUERY_VALUE), (llama, ("all-linear",))])
@pytest.mark.parametrize("rank", [1, 4])
def test_lora_has_the_rank_of_its_share(make, targets: tuple[str, ...], rank: int):
    settings = configure(Row("", "lora", float(rank), ()), adapted_shapes(make(), targets), targets)
    assert (settings.rank, settings.alpha) == (rank, rank)


@pytest.mark.parametrize(("make", "targets"), [(bert, QUERY_VALUE), (llama, ("all-linear",))])
@pytest.mark.parametrize(
    ("method", "share", "tolerance"),
    [("nola", 0.5, 0.02), ("nola", 1.0, 0.02), ("vera", 1.0, 0.02), ("randlora", 4.0, 0.1)],
)
def test_counted_on_an_adapted_model_the_budget_is_met(make, targets, method: str, share: float, tolerance: float):
    budget = share * count(make, Row("", "lora", 1.0, ()), targets)
    assert count(make, Row("", method, share, ()), targets) == pytest.approx(budget, rel=tolerance)


def test_randlora_stays_below_the_smallest_side():
    settings = configure(Row("", "randlora", 0.01, ()), adapted_shapes(llama(), ("all-linear",)), ("all-linear",))
    assert settings.rank == 32


def test_a_method_without_a_budget_is_refused():
    with pytest.raises(UnknownMethodError, match="did you mean lora"):
        configure(Row("", "lorra", 1.0, ()), [(4, 4)], QUERY_VALUE)

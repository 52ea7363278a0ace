"""Budgets against counts of models that were really adapted."""

import pytest
from peft import get_peft_model
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from randbasis.adapters.budget import stored_bytes
from randbasis.compare.budgets import SIZED, adapted_shapes, sized
from randbasis.compare.rivals import configuration
from randbasis.compare.study import Budget, Row
from randbasis.errors import StudyError
from randbasis.train.loop import count_trained

QUERY_VALUE = ("query", "value")


def bert() -> BertModel:
    return BertModel(BertConfig(vocab_size=8, hidden_size=96, num_hidden_layers=2, num_attention_heads=2,
                                intermediate_size=64))  # fmt: skip


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                        num_key_value_heads=2, intermediate_size=96))  # fmt: skip


MODELS = {"bert": (bert, QUERY_VALUE), "llama": (llama, ("all-linear",))}


def counted(method: str, options: dict, make, targets: tuple[str, ...]) -> int:
    shapes = adapted_shapes(make(), targets)
    config = configuration(method, options, shapes, targets=targets, seed=0, task_type=None, head=[])
    assert config is not None
    return count_trained(get_peft_model(make(), config))[0]


def test_shapes_are_those_of_the_matrices():
    assert adapted_shapes(bert(), QUERY_VALUE) == [(96, 96)] * 4
    llama_shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)] * 2
    assert adapted_shapes(llama(), ("all-linear",)) == llama_shapes


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", SIZED)
def test_the_largest_size_within_a_budget_is_taken(method: str, model: str):
    """Counted on an adapted model, what is taken fits, and no other size that fits has more coefficients."""
    make, targets = MODELS[model]
    size, shapes = SIZED[method], adapted_shapes(make(), targets)
    row = Row("row", "row", method, (("r", 1),) if method == "unilora" else (), Budget(4000, "coefficients"))
    options = sized(row, shapes)
    assert counted(method, dict(options), make, targets) <= 4000
    if size.rises and options[size.word] < size.largest(shapes):
        assert counted(method, options | {size.word: options[size.word] + 1}, make, targets) > 4000
    rivals = range(1, min(size.largest(shapes), 3 * options[size.word] + 96) + 1)
    fitting = {number: n for number in rivals if (n := size.count(number, shapes, options)[0]) <= 4000}
    assert options[size.word] in fitting
    assert fitting[options[size.word]] == max(fitting.values())


def test_bytes_count_codes_and_their_scales():
    assert stored_bytes(100, 8, 32) == 400
    assert stored_bytes(100, 8, 16) == 200
    assert stored_bytes(101, 8, 4) == 51 + 32
    shapes = [(96, 96)] * 4
    nola = Row("n", "n", "nola", (), Budget(96, "bytes", 4))
    assert sized(nola, shapes)["basis"] == 16  # 128 codes of 4 bits are 64 bytes, 8 scales 32
    assert sized(Row("n", "n", "nola", (), Budget(96, "bytes", 16)), shapes)["basis"] == 6


def test_a_budget_that_nothing_meets_is_refused_with_the_smallest():
    with pytest.raises(
        StudyError, match="'v': vera has no configuration of 300 coefficients: the smallest, rank 1, has 388"
    ):
        sized(Row("v", "v", "vera", (), Budget(300, "coefficients")), [(96, 96)] * 4)
    with pytest.raises(StudyError, match="has a budget and rank, which the budget decides"):
        sized(Row("v", "v", "vera", (("rank", 4),), Budget(900, "coefficients")), [(96, 96)] * 4)

"""Draws: their law, their independence of the batch, and the probabilities that are told."""

from typing import Any

import pytest
import torch
from torch import Tensor

from randbasis.serve.requests import Request, Sampling
from randbasis.serve.sampling import Row, SeededSampler, draw, nucleus, uniforms


def row(position: int = 0, choice: int = 0, **options: Any) -> Row:
    sampling = Sampling(**{"max_tokens": 9, "seed": 7, **options})
    return Row(Request("r", (1,), sampling, None, lambda piece: None, choice), position)


def test_the_tokens_have_the_models_probabilities():
    """Chi-square against the softmax at temperature 2: 4 degrees of freedom, 0.1 % level."""
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    count = 20_000
    drawn = draw(logits.expand(count, -1), [row(i, temperature=2.0) for i in range(count)])
    expected = torch.softmax(logits[0] / 2, 0) * count
    found = torch.bincount(drawn, minlength=5)
    assert ((found - expected) ** 2 / expected).sum() < 18.5


def test_uniforms_are_known_numbers():
    """Golden: a seed must mean the same in the next version."""
    found = uniforms([row(0), row(1), row(0, choice=1), row(0, seed=1 << 63)])
    assert found.tolist() == [0.04809783479276286, 0.28781310745898014, 0.5943212359326284, 0.17786956544030252]


def test_a_draw_is_of_its_seed_position_and_choice_alone():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    rows = [row(i, temperature=1.5, top_p=0.9) for i in range(6)]
    together = draw(logits, rows)
    assert together.tolist() == [int(draw(logits[i : i + 1], [rows[i]])) for i in range(6)]
    order = [3, 0, 5, 1, 4, 2]
    assert draw(logits[order], [rows[i] for i in order]).tolist() == together[order].tolist()
    same = logits[:1].expand(200, -1)
    assert len({*draw(same, [row(i) for i in range(200)]).tolist()}) > 5
    assert len({*draw(same, [row(0, choice=i) for i in range(200)]).tolist()}) > 5
    assert len({*draw(same, [row(0, seed=i) for i in range(200)]).tolist()}) > 5


def test_the_fewest_tokens_that_have_top_p_together():
    chances = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.25, 0.25, 0.25, 0.25]])
    kept = nucleus(chances, torch.tensor([[0.6], [0.5]])) > 0
    assert kept.tolist() == [[True, False, True, False], [True, True, False, False]]
    assert (nucleus(chances, torch.tensor([[1e-9], [1e-9]])) > 0).sum(1).tolist() == [1, 1]


def sampled(logits: Tensor, rows: list[Row]) -> Tensor:
    return SeededSampler(lambda: rows)(None, logits).argmax(-1)


def test_temperature_0_takes_the_most_probable():
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    rows = [row(0, temperature=0), row(1, temperature=1.0), row(2, temperature=0)]
    before = logits.clone()
    found = sampled(logits, rows)
    assert torch.equal(logits, before), "the model's own logits stay"
    assert found[[0, 2]].tolist() == logits.argmax(-1)[[0, 2]].tolist()
    assert int(found[1]) == int(draw(logits[1:2], rows[1:2]))


def test_the_probabilities_are_those_of_the_model_before_temperature_and_top_p():
    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(3))
    rows = [row(0, temperature=3.0, top_p=0.1, logprobs=3), row(0, temperature=0, logprobs=0)]
    found = sampled(logits, rows)
    for i, one in enumerate(rows):
        assert one.request is not None
        (told,) = one.request.scored
        expected = torch.log_softmax(logits[i], 0)
        assert told.token == int(found[i])
        assert told.logprob == pytest.approx(float(expected[told.token]))
        top = expected.topk(one.request.sampling.logprobs or 0)
        assert [token for token, _ in told.top] == top.indices.tolist()
        assert [value for _, value in told.top] == pytest.approx(top.values.tolist())


def test_rows_of_nobody_are_left_alone():
    logits = torch.randn(3, 10)
    assert torch.equal(SeededSampler(lambda: [Row(None, 3)])(None, logits), logits)


def test_rows_that_are_no_numbers_are_told_and_change_no_other():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(2))
    rows = [row(i, temperature=1.0, logprobs=1) for i in range(4)]
    expected = SeededSampler(lambda: rows)(None, logits).argmax(-1)
    broken = logits.clone()
    broken[1, 3], broken[2] = float("nan"), float("-inf")
    found = SeededSampler(lambda: rows)(None, broken).argmax(-1)
    assert [one.request.broken for one in rows if one.request] == [False, True, True, False]
    assert found[[0, 3]].tolist() == expected[[0, 3]].tolist()
    ruled_out = logits.masked_fill(torch.arange(9) != 4, float("-inf"))
    assert SeededSampler(lambda: rows[:1])(None, ruled_out[:1]).argmax(-1).tolist() == [4]
    assert rows[0].request is not None
    assert not rows[0].request.broken


@pytest.mark.parametrize("temperature", [5e-324, 1e-300])
def test_a_temperature_near_0_takes_the_most_probable(temperature: float):
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(2))
    drawn = draw(logits, [row(i, temperature=temperature, top_p=0.9) for i in range(4)])
    assert drawn.tolist() == logits.argmax(-1).tolist()

"""Which token comes next: one draw a request and position, the same whatever else is in the batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor

from randbasis.basis import philox
from randbasis.laws import stream_of
from randbasis.serve.requests import Request, Scored

_KEY = (stream_of("serve/sampling"), 0)
"""Sets these draws apart from every basis, math (4)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of logits.

    Attributes:
        request: whose next token they decide; None where nobody's, as of a request that just ended.
        position: of that token, counted from the first of the prompt.
    """

    request: Request | None
    position: int


class SeededSampler(LogitsProcessor):
    """Makes the token that is drawn for a row the one of the greatest score, which the engine takes.

    One uniform number a row, of Philox, whose counter is the request's seed, the position and the choice: no state,
    nothing of the other rows, and the same after a request was put off and begun anew. It is looked up in the
    cumulative distribution in float64, so that a small difference of rounding between two batches moves a draw only
    where it falls on the edge between two tokens.

    Args:
        rows: the rows of the logits that are about to be processed.
    """

    supports_continuous_batching = True

    def __init__(self, rows: Callable[[], Sequence[Row]]):
        self._rows = rows

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        """``[rows, vocabulary]`` logits with the drawn token of each sampled row on top."""
        rows = self._rows()
        scores = _without_broken(scores, rows)
        raw = scores
        drawn = [i for i, row in enumerate(rows) if row.request is not None and row.request.sampling.temperature > 0]
        if drawn:
            tokens = draw(scores[drawn], [rows[i] for i in drawn])
            scores = scores.clone()
            scores[torch.tensor(drawn, device=scores.device), tokens] = float("inf")
        for i, row in enumerate(rows):
            if row.request is not None and row.request.sampling.logprobs is not None:
                row.request.scored.append(scored(raw[i], int(scores[i].argmax()), row.request.sampling.logprobs))
        return scores


def _without_broken(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """The logits with zeros for rows of which nothing can be drawn; their requests are told so."""
    # Minus infinity is a token that is ruled out; the sum of exponentials tells of all else in one number a row.
    broken = ~torch.isfinite(torch.logsumexp(scores.float(), -1))
    if not broken.any():
        return scores
    for row, bad in zip(rows, cast("list[bool]", broken.tolist()), strict=False):
        if bad and row.request is not None:
            row.request.broken = True
    return scores.masked_fill(broken[:, None], 0.0)


def draw(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """The tokens of rows that are sampled, ``[rows]``.

    Args:
        logits: ``[rows, vocabulary]``.
        rows: with a request each.
    """
    asked = [row.request.sampling for row in rows if row.request is not None]
    temperature = torch.tensor([[one.temperature] for one in asked], device=logits.device, dtype=torch.float64)
    # From the greatest one down: else a tiny temperature makes infinities of all, and numbers of none.
    below = logits.double() - logits.double().amax(-1, keepdim=True)
    chances = torch.softmax(below / temperature, dim=-1)
    top_p = torch.tensor([[one.top_p] for one in asked], device=logits.device, dtype=torch.float64)
    if any(one.top_p < 1 for one in asked):
        chances = nucleus(chances, top_p)
    sums = chances.cumsum(-1)
    whole = sums[:, -1:]
    aim = torch.minimum(uniforms(rows).to(logits.device)[:, None] * whole, whole.nextafter(torch.zeros_like(whole)))
    return torch.searchsorted(sums, aim, right=True).squeeze(-1)


def nucleus(chances: Tensor, top_p: Tensor) -> Tensor:
    """Probabilities of all but the fewest tokens that have ``top_p`` together set to 0; the most probable one stays."""
    sorted_chances, order = chances.sort(dim=-1, descending=True, stable=True)
    before = sorted_chances.cumsum(-1) - sorted_chances
    dropped = before >= top_p
    dropped[:, 0] = False
    return chances.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), 0.0)


def uniforms(rows: Sequence[Row]) -> Tensor:
    """A number in [0, 1) a row, of 53 bits."""
    words: list[tuple[int, int, int, int]] = []
    for row in rows:
        seed, choice = (0, 0) if row.request is None else (row.request.sampling.seed, row.request.choice)
        words.append((seed & 0xFFFFFFFF, seed >> 32, row.position, choice))
    c0, c1, c2, c3 = torch.tensor(words, dtype=torch.int64).unbind(1)
    high, low, *_ = philox((c0, c1, c2, c3), _KEY)
    return ((high << 21) | (low >> 11)).double() * 2.0**-53


def scored(logits: Tensor, token: int, alternatives: int) -> Scored:
    """The log-probability of a token, and of the most probable ones."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    best = torch.topk(logprobs, min(alternatives, len(logprobs)))
    tokens, values = cast("tuple[list[int], list[float]]", (best.indices.tolist(), best.values.tolist()))
    top = tuple(zip(tokens, values, strict=True))
    return Scored(token, float(logprobs[token]), top)

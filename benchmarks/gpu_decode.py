"""Decoding with a cache on a GPU: a model of the 1.1B shape in bfloat16, a batch of 32 rows, one token a call.

One adapter for all rows beside the plain model and PEFT's LoRA, then rows with adapters of their own. Without autocast,
as ``generate`` runs.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import bases
from benchmarks.adapters import Adapter, put
from benchmarks.bases import Base
from benchmarks.case import Built, Case, CheckFailed, Side
from benchmarks.gpu import device, wall_seconds
from benchmarks.gpu_step import TARGETS, frozen_model

PLAIN, NOLA, LORA = "base", "NOLA r=8 k=64", "PEFT LoRA r=8"
ONE = (PLAIN, NOLA, "VeRA r=256", LORA)
DISTINCT = (1, 8, 32)
MIXED = tuple(f"{name}, {count} distinct" for name in (NOLA, LORA) for count in DISTINCT)
"""The first is what the others are held against."""
ROWS, PROMPT = 32, 128
TOLERANCE = 4e-2
"""Of outputs in bfloat16, relative to their size."""


def cases(*, tiny: bool = False, everything: bool = False) -> Iterator[Case]:
    """One adapter for all rows, then 1, 8 and 32 adapters among them."""
    del everything
    base = small_llama(2, 64, 160) if tiny else small_llama(22, 2048, 5632)
    rows = 4 if tiny else ROWS
    one = ONE[:2] if tiny else ONE
    mixed = (f"{NOLA}, 1 distinct", f"{NOLA}, 4 distinct") if tiny else MIXED
    for what, sides, build in (("decode", one, _build_one), ("mixed decode", mixed, _build_mixed)):
        yield Case(
            family=f"gpu {what}",
            name=f"{what} of {base.name}, {rows} rows, {PROMPT} tokens in the cache",
            sides=sides,
            build=partial(build, base, rows),
            parameters={"model": base.name, "rows": rows},
            work=rows,
            unit="tokens/s",
            measure=wall_seconds,
            seconds=8,
            device=str(device()),
        )


def small_llama(layers: int, width: int, inner: int) -> Base:
    """A model like Llama in bfloat16, with random weights."""
    return Base(f"Llama {layers}×{width}, bfloat16", partial(_model, width, inner), layers, 1024, TARGETS)


def _model(width: int, inner: int, layers: int, vocabulary: int) -> nn.Module:
    heads = max(2, width // 64)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 8),
        vocab_size=vocabulary,
    )
    with torch.device(device()):
        return LlamaForCausalLM(config)


def _words(base: Base, rows: int) -> Tensor:
    return base.batch(rows * PROMPT, length=PROMPT)["input_ids"].to(device())


def _build_one(base: Base, rows: int, sides: Sequence[str]) -> Built:
    frozen, words = frozen_model(base), _words(base, rows)
    models = {name: put(name, bases.twin(frozen), base, started=True).eval().requires_grad_(False) for name in sides}
    steps = {name: token_of(model, words, {}) for name, model in models.items()}

    def check() -> str:
        wanted = {name: _last(model, words, {}) for name, model in models.items()}
        return _check(steps, wanted, "the whole pass")

    return Built({name: Side(step) for name, step in steps.items()}, check)


def _build_mixed(base: Base, rows: int, sides: Sequence[str]) -> Built:
    frozen, words = frozen_model(base), _words(base, rows)
    counts = {side: int(side.rpartition(", ")[2].split()[0]) for side in sides}
    kinds = {side: side.rpartition(", ")[0] for side in sides}
    models = {
        kind: _with_many(kind, bases.twin(frozen), base, max(counts[side] for side in sides if kinds[side] == kind))
        for kind in dict.fromkeys(kinds.values())
    }
    named = {side: {"adapter_names": [_adapter(row % counts[side]) for row in range(rows)]} for side in sides}
    steps = {side: token_of(models[kinds[side]], words, named[side]) for side in sides}

    def check() -> str:
        wanted = {side: _alone(models[kinds[side]], words, named[side]["adapter_names"]) for side in sides}
        return _check(steps, wanted, "each adapter alone, the whole pass")

    return Built({side: Side(step) for side, step in steps.items()}, check)


def _with_many(kind: str, model: nn.Module, base: Base, count: int) -> PeftModel:
    adapted = cast("PeftModel", put(kind, model, base, started=True))
    for number in range(1, count):
        adapted.add_adapter(_adapter(number), Adapter.named(kind).config(base, started=True))
    return adapted.eval().requires_grad_(False)


def _adapter(number: int) -> str:
    return f"a{number}" if number else "default"


def token_of(model: nn.Module, words: Tensor, named: dict[str, Any]) -> Callable[[], Tensor]:
    """One token a row after all but the last of some words are in the cache, again and again."""
    length = words.shape[1] - 1
    with torch.no_grad():
        cache = cast("Any", model)(input_ids=words[:, :-1], use_cache=True, **named).past_key_values

    @torch.no_grad()
    def call() -> Tensor:
        logits = cast("Any", model)(input_ids=words[:, -1:], past_key_values=cache, use_cache=True, **named).logits
        cache.crop(length - cache.get_seq_length())
        return logits

    return call


@torch.no_grad()
def _last(model: nn.Module, words: Tensor, named: dict[str, Any]) -> Tensor:
    return cast("Any", model)(input_ids=words, logits_to_keep=1, **named).logits


def _alone(model: PeftModel, words: Tensor, names: Sequence[str]) -> Tensor:
    """The last token of each row by its adapter, all rows with it at once."""
    rows: list[Tensor] = [torch.empty(0)] * len(names)
    for name in dict.fromkeys(names):
        model.set_adapter(name, inference_mode=True)
        own = [row for row, other in enumerate(names) if other == name]
        for row, logits in zip(own, _last(model, words[own], {}), strict=True):
            rows[row] = logits
    return torch.stack(rows)


def _check(steps: dict[str, Callable[[], Tensor]], wanted: dict[str, Tensor], of: str) -> str:
    worst = 0.0
    for name, step in steps.items():
        for _ in range(2):
            error = float((step().double() - wanted[name].double()).norm() / wanted[name].double().norm())
            worst = max(worst, error)
            if not error <= TOLERANCE:
                raise CheckFailed(f"{name}: decoding differs from {of} by {error:.1e}, allowed {TOLERANCE:.0e}")
    return f"reference is {of}: within {worst:.1e}"

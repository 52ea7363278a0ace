"""Prefill of a prompt and decoding of one token with a cache, in evaluation mode, factors kept.

Each of our methods stands beside PEFT's LoRA of the rank that its factors have; ``merged`` has ΔW in the base weights.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks import bases
from benchmarks.adapters import put
from benchmarks.bases import Base
from benchmarks.case import Built, Case, CheckFailed, Side
from benchmarks.reference_run import OUTPUT, check_inference

PROMPT = 512
MERGED = "merged NOLA r=8 k=256"


def same_rank(width: int) -> dict[str, str]:
    """Our adapter → PEFT's LoRA of the rank of its factors, on layers whose smaller side is ``width``."""
    return {
        "NOLA r=8 k=256": "PEFT LoRA r=8",
        "VeRA r=256": "PEFT LoRA r=256",
        "RandLoRA r=32": f"PEFT LoRA r={width}",
    }


def cases(*, tiny: bool = False, everything: bool = False) -> Iterator[Case]:
    """Prefill and decoding on a GPT-2-like and a Llama-like model."""
    del everything
    for base, width in _bases(tiny):
        pairs = same_rank(width)
        sides = ("base", MERGED, *pairs.values(), *pairs)
        prompt = 32 if tiny else PROMPT
        for what, calls in (("prefill", _prefill), ("decode", decode_step)):
            tokens = prompt if what == "prefill" else 1
            yield Case(
                family=what,
                name=f"{what} of {base.name}, {prompt} tokens" + ("" if what == "prefill" else " in the cache"),
                sides=sides,
                build=partial(_build, base, prompt, calls),
                parameters={"model": base.name, "tokens": tokens, "rank": width},
                work=tokens,
                unit="tokens/s",
                seconds=25,
            )


def _bases(tiny: bool) -> tuple[tuple[Base, int], ...]:
    if tiny:
        return (bases.gpt2(2, 64, 512), 64), (bases.llama(2, 128, 512), 128)
    return (bases.gpt2(6, 512), 512), (bases.llama(6, 512), 512)


def _build(
    base: Base, prompt: int, calls: Callable[[nn.Module, Tensor], Callable[[], Tensor]], sides: Sequence[str]
) -> Built:
    frozen, words = base.model(), base.batch(prompt, length=prompt)["input_ids"]
    made = {name: calls(_model(name, frozen, base), words) for name in sides}
    adapters = [name for name in sides if name not in ("base", MERGED)]

    def check() -> str:
        found = check_inference(base, adapters, prompt)
        if calls is decode_step:
            for name, call in made.items():
                _check_cache(name, call, _model(name, frozen, base), words)
        return found

    return Built({name: Side(call) for name, call in made.items()}, check)


def _model(name: str, frozen: nn.Module, base: Base) -> nn.Module:
    if name == MERGED:
        model = put(name.removeprefix("merged "), base.model(), base, started=True)
        return cast("Any", model).merge_and_unload().eval().requires_grad_(False)
    return put(name, bases.twin(frozen), base, started=True).eval().requires_grad_(False)


def _prefill(model: nn.Module, words: Tensor) -> Callable[[], Tensor]:
    @torch.no_grad()
    def call() -> Tensor:
        return cast("Any", model)(input_ids=words, logits_to_keep=1, use_cache=True).logits

    return call


def decode_step(model: nn.Module, words: Tensor) -> Callable[[], Tensor]:
    """One token after all but the last of some words are in the cache, again and again."""
    with torch.no_grad():
        cache = cast("Any", model)(input_ids=words[:, :-1], use_cache=True).past_key_values
    length = words.shape[1] - 1

    @torch.no_grad()
    def call() -> Tensor:
        logits = cast("Any", model)(input_ids=words[:, -1:], past_key_values=cache, use_cache=True).logits
        cache.crop(length - cache.get_seq_length())
        return logits

    return call


def _check_cache(name: str, call: Callable[[], Tensor], model: nn.Module, words: Tensor) -> None:
    """One token after a cache is the last of all tokens at once, and is so again."""
    with torch.no_grad():
        wanted = cast("Any", model)(input_ids=words).logits[:, -1:]
    for _ in range(2):
        error = float((call() - wanted).norm() / wanted.norm())
        if not error <= OUTPUT:
            raise CheckFailed(f"{name}: decoding differs from the whole pass by {error:.1e}, allowed {OUTPUT:.0e}")

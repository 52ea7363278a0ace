"""What decoding pays for seeing every change of the coefficients: the values behind kept factors compared, or not."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks import bases
from benchmarks.adapters import put
from benchmarks.bases import Base
from benchmarks.case import Built, Case, CheckFailed, Side
from benchmarks.inference import decode_step
from randbasis.tuner.layer import RandbasisLinear
from randbasis.tuner.snapshot import Snapshot

ADAPTERS = ("NOLA r=8 k=256", "VeRA r=256", "RandLoRA r=32")
BLIND, COMPARED = "nothing compared", "values compared"
PROMPT = 512


def cases(*, tiny: bool = False, everything: bool = False) -> Iterator[Case]:
    """One token after a cache, for each method on a GPT-2-like model."""
    del everything
    base = bases.gpt2(2, 64, 512) if tiny else bases.gpt2(6, 512)
    for name in ADAPTERS:
        yield Case(
            family="kept factors",
            name=f"decode of {base.name} with {name}",
            sides=(BLIND, COMPARED),
            build=partial(_build, base, name, 32 if tiny else PROMPT),
            parameters={"model": base.name, "adapter": name},
            work=1,
            unit="tokens/s",
            seconds=20,
            usual=False,
        )


class _Blind(Snapshot):
    """Never sees a change."""

    def stands(self) -> bool:
        return True


def _build(base: Base, name: str, prompt: int, sides: Sequence[str]) -> Built:
    frozen, words = base.model(), base.batch(prompt, length=prompt)["input_ids"]
    models = {side: put(name, bases.twin(frozen), base, started=True).eval().requires_grad_(False) for side in sides}
    calls = {side: decode_step(model, words) for side, model in models.items()}
    for side, call in calls.items():
        call()
        if side == BLIND:
            _blind(models[side])
    return Built({side: Side(call) for side, call in calls.items()}, partial(_check, models, calls))


def _blind(model: nn.Module) -> None:
    for layer in _layers(model):
        prepared = layer._prepared_pass  # pyright: ignore[reportPrivateUsage]
        if prepared is None:
            raise CheckFailed("a layer prepared no pass: nothing is kept that could be compared")
        blind = replace(prepared, snapshot=_Blind(prepared.snapshot.seen))
        layer._prepared_pass = blind  # pyright: ignore[reportPrivateUsage]


def _layers(model: nn.Module) -> list[RandbasisLinear]:
    return [module for module in model.modules() if isinstance(module, RandbasisLinear)]


def _check(models: dict[str, nn.Module], calls: dict[str, Callable[[], Tensor]]) -> str:
    """The side that compares sees a write that moves no version counter, and both end as before."""
    for side, model in models.items():
        before = calls[side]()
        parameters = [cast("Any", p).data for layer in _layers(model) for p in _coefficients(layer)]
        for values in parameters:
            values.mul_(2)
        moved = not torch.equal(calls[side](), before)
        for values in parameters:
            values.mul_(0.5)
        if side == COMPARED and not moved:
            raise CheckFailed(f"{side}: a write through .data was not seen")
        if not torch.equal(calls[side](), before):
            raise CheckFailed(f"{side}: the step is not the same once the coefficients are back")
    return "a write through .data is seen where values are compared"


def _coefficients(layer: RandbasisLinear) -> Iterator[Tensor]:
    return (p for name, p in layer.named_parameters() if name.startswith("randbasis_"))

"""Many adapters in one model, one after the other: put on, loaded, switched between and taken off.

Nothing is computed with them, so the layers are small and as many as a model of 1.1B parameters has: 154.
"""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from benchmarks import bases
from benchmarks.adapters import Adapter, put
from benchmarks.bases import Base
from benchmarks.case import Built, Case, CheckFailed, Side

LORA, NOLA, UNIQUE = "PEFT LoRA r=8", "NOLA r=8 k=64", "NOLA r=8 k=64 unique"
SIDES = (LORA, NOLA, UNIQUE)
ADD, LOAD, SWITCH, DELETE = "put on", "load", "switch to", "take off"
ADAPTERS, ROUNDS = 32, 3
TOKENS = 8
TOLERANCE = 1e-5
CPU = torch.device("cpu")


def cases(*, tiny: bool = False, everything: bool = False) -> Iterator[Case]:
    """32 adapters put on, loaded, switched to and taken off, beside PEFT's LoRA."""
    del everything
    for what in (ADD, LOAD, SWITCH, DELETE):
        yield case_on(CPU, "add", what, 3 if tiny else ADAPTERS, tiny=tiny)


def case_on(place: torch.device, family: str, what: str, count: int, *, tiny: bool) -> Case:
    """One of the cases.

    Args:
        place: where the model is.
        family: of the case.
        what: is done with the adapters.
        count: how many.
        tiny: with few layers.
    """
    base = bases.llama(1 if tiny else 22, 64, 256)
    return Case(
        family=family,
        name=f"{what} {count} adapters, {base.name}",
        sides=SIDES,
        build=partial(_build, place, base, what, count),
        parameters={"what": what, "adapters": count},
        work=count,
        unit="adapters/s",
        rounds=1 if tiny else ROUNDS,
        warms_up=what == SWITCH,
        device=str(place),
    )


class _Many:
    """A model that is given many adapters beside the one that it has, which is on disk too."""

    def __init__(self, name: str, place: torch.device, base: Base, count: int) -> None:
        self._config = partial(Adapter.named(name).config, base)
        self._folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
        weakref.finalize(self, shutil.rmtree, self._folder)
        self.name, self.others = name, [f"a{number}" for number in range(count)]
        self.model = cast("PeftModel", put(name, base.model().to(place), base, started=True)).eval()
        self.words = base.batch(TOKENS, length=TOKENS)["input_ids"].to(place)
        self.model.save_pretrained(str(self._folder), save_embedding_layers=False)

    def add(self) -> None:
        """All others, as at the start of a training."""
        for other in self.others:
            self.model.add_adapter(other, self._config())

    def load(self) -> None:
        """All others, each a copy of the first."""
        for other in self.others:
            self.model.load_adapter(str(self._folder), other)

    def switch(self) -> None:
        """To each of the others in turn."""
        for other in self.others:
            self.model.set_adapter(other, inference_mode=True)

    def delete(self) -> None:
        """All others."""
        self.model.set_adapter("default", inference_mode=True)
        for other in self.others:
            self.model.delete_adapter(other)

    def names(self) -> set[frozenset[str]]:
        """Which adapters the adapted layers have."""
        layers = (module for module in self.model.modules() if isinstance(module, BaseTunerLayer))
        return {frozenset(cast("Any", layer)._all_available_adapter_names()) for layer in layers}

    @torch.no_grad()
    def logits(self, adapter: str) -> Tensor:
        """Of a few tokens, by one adapter."""
        self.model.set_adapter(adapter, inference_mode=True)
        return cast("Any", self.model)(input_ids=self.words).logits


def _build(place: torch.device, base: Base, what: str, count: int, sides: Sequence[str]) -> Built:
    many = {name: _Many(name, place, base, count) for name in sides}
    return Built({name: _side(one, what) for name, one in many.items()}, partial(_check, what, many))


def _side(one: _Many, what: str) -> Side:
    sides: dict[str, tuple[Callable[[], None], Callable[[], None] | None]] = {
        ADD: (one.add, one.delete),
        LOAD: (one.load, one.delete),
        SWITCH: (one.switch, None),
        DELETE: (one.delete, one.add),
    }
    return Side(*sides[what])


def _check(what: str, many: dict[str, _Many]) -> str:
    """All are on every layer, or on none; what was loaded computes as what was saved."""
    worst = 0.0
    for one in many.values():
        fill = one.load if what == LOAD else one.add
        fill()
        _check_names(one, {"default", *one.others})
        if what == LOAD:
            wanted = one.logits("default")
            worst = max(worst, float((one.logits(one.others[-1]) - wanted).norm() / wanted.norm()))
        if what in (ADD, LOAD):
            one.delete()
            _check_names(one, {"default"})
    if not worst <= TOLERANCE:
        raise CheckFailed(f"a loaded adapter differs from the saved one by {worst:.1e}, allowed {TOLERANCE:.0e}")
    return "every layer has every adapter" + (f", outputs within {worst:.1e} of the reference" if what == LOAD else "")


def _check_names(one: _Many, wanted: set[str]) -> None:
    found = one.names()
    if found != {frozenset(wanted)}:
        raise CheckFailed(f"{one.name}: the layers must have the adapters {sorted(wanted)}, got {found}")

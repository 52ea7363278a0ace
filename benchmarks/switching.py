"""Loading an adapter from disk, and switching between adapters that a model holds."""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor

from benchmarks import bases
from benchmarks.adapters import Adapter, put
from benchmarks.bases import Base
from benchmarks.case import Built, Case, CheckFailed, Side
from randbasis.adapters.packed import pack_adapter
from randbasis.adapters.putting import load_packed

LORA, NOLA, RANDLORA = "PEFT LoRA r=8", "NOLA r=8 k=256", "RandLoRA r=32"
LOAD, PACKED, SET = "load_adapter", "load_packed", "set_adapter"
SIDES = (
    f"{LORA}: {LOAD}",
    *(f"{name}: {LOAD}" for name in (NOLA, RANDLORA)),
    *(f"{name}: {PACKED}" for name in (NOLA, RANDLORA)),
    *(f"{name}: {SET}" for name in (LORA, NOLA, RANDLORA)),
)
TOKENS = 16
TOLERANCE = 1e-5


def cases(*, tiny: bool = False, everything: bool = False) -> Iterator[Case]:
    """Loading and switching alone, then switching with one token through the model after it."""
    del everything
    base = bases.gpt2(2, 64, 512) if tiny else bases.gpt2(6, 512)
    parameters: dict[str, int | str] = {"model": base.name}
    name = f"load or switch an adapter of {base.name}"
    yield Case("switch", name, SIDES, partial(_build, base), parameters, seconds=20)
    name = f"switch an adapter of {base.name} and run one token"
    sides = (LORA, NOLA, RANDLORA)
    yield Case("switch", name, sides, partial(_build_with_token, base), parameters, seconds=20)


class _Saved:
    """An adapter in a model twice, as ``default`` and as ``other``, and on disk as a directory and a file."""

    def __init__(self, name: str, frozen: torch.nn.Module, base: Base, folder: Path) -> None:
        self.name, self.directory, self.file = name, folder / name, folder / f"{name}.packed"
        self.model = cast("PeftModel", put(name, bases.twin(frozen), base, started=True)).eval()
        self.words = base.batch(TOKENS, length=TOKENS)["input_ids"]
        self.model.add_adapter("other", Adapter.named(name).config(base, started=True))
        self.model.save_pretrained(str(self.directory), selected_adapters=["default"], save_embedding_layers=False)
        if Adapter.named(name).is_ours:
            pack_adapter(self.directory, self.file, bits=32, base_name="base")
        self.wanted = {adapter: self.logits(adapter) for adapter in ("default", "other")}
        self._turn = cycle(("other", "default"))

    @torch.no_grad()
    def logits(self, adapter: str | None = None) -> Tensor:
        """Of a few tokens, by the active adapter or by one that is made active."""
        if adapter is not None:
            self.model.set_adapter(adapter, inference_mode=True)
        return cast("Any", self.model)(input_ids=self.words).logits

    def load(self) -> None:
        """A third adapter, from the directory."""
        self.model.load_adapter(str(self.directory), "loaded")

    def load_packed(self) -> None:
        """A third adapter, from the packed file."""
        load_packed(self.model, self.file, "loaded")

    def delete(self) -> None:
        """The third adapter."""
        self.model.delete_adapter("loaded")

    def switch(self) -> None:
        """To the other of the two in memory."""
        self.model.set_adapter(next(self._turn), inference_mode=True)

    def switch_and_run(self) -> Tensor:
        """To the other, and one token through it."""
        self.switch()
        with torch.no_grad():
            return cast("Any", self.model)(input_ids=self.words[:, :1]).logits


def _build(base: Base, sides: Sequence[str]) -> Built:
    saved, folder = _saved(base, {side.partition(":")[0] for side in sides})
    made: dict[str, Side] = {}
    for side in sides:
        name, _, action = side.partition(": ")
        one = saved[name]
        calls = {LOAD: Side(one.load, one.delete), PACKED: Side(one.load_packed, one.delete), SET: Side(one.switch)}
        made[side] = calls[action]
    return Built(made, partial(_check, saved, folder))


def _build_with_token(base: Base, sides: Sequence[str]) -> Built:
    saved, folder = _saved(base, set(sides))
    made = {name: Side(one.switch_and_run) for name, one in saved.items()}
    return Built({name: made[name] for name in sides}, partial(_check, saved, folder))


class _Folder:
    """A temporary folder that goes with the last that knows it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="benchmark-"))
        weakref.finalize(self, shutil.rmtree, self.path)


def _saved(base: Base, names: set[str]) -> tuple[dict[str, _Saved], _Folder]:
    folder, frozen = _Folder(), base.model()
    return {name: _Saved(name, frozen, base, folder.path) for name in sorted(names)}, folder


def _check(saved: dict[str, _Saved], folder: _Folder) -> str:
    """Every way leads to the outputs of the adapter that was saved, and the two in memory differ."""
    del folder  # it lives as long as this check does
    worst = 0.0
    for one in saved.values():
        first, other = one.wanted["default"], one.wanted["other"]
        if _distance(first, other) < TOLERANCE:
            raise CheckFailed(f"{one.name}: both adapters give the same, so a switch would not show")
        loads: list[Callable[[], None]] = [one.load] + ([one.load_packed] if one.file.exists() else [])
        for load in loads:
            load()
            worst = max(worst, _distance(one.logits("loaded"), first))
            one.delete()
        one.logits("default")
        for wanted in (other, first):
            one.switch()
            worst = max(worst, _distance(one.logits(), wanted))
    if not worst <= TOLERANCE:
        raise CheckFailed(f"outputs differ by {worst:.1e} from those of the saved adapter, allowed {TOLERANCE:.0e}")
    return f"outputs within {worst:.1e} of those of the saved adapter"


def _distance(own: Tensor, wanted: Tensor) -> float:
    return float((own - wanted).norm() / wanted.norm())

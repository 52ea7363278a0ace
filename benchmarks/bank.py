"""Many users of one base model in a bank: decoding of mixed batches, loading, and what resident adapters take.

Each of our methods stands beside PEFT's LoRA with ``adapter_names``; ``merged one by one`` puts ΔW into the weights,
answers that adapter's rows, and takes it out again. Every side answers the same 32 rows with one token each.
"""

import gc
import random
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from benchmarks import bases
from benchmarks.adapters import Adapter, put
from benchmarks.bases import Base
from benchmarks.case import Built, Case, CheckFailed, Side
from benchmarks.machine import resident_bytes
from randbasis.adapter_file import PackedAdapter
from randbasis.adapters import open_adapter
from randbasis.adapters import put as put_packed
from randbasis.adapters.packed import packed_of
from randbasis.bank import AdapterBank
from randbasis.store import AdapterStore

METHODS = ("NOLA r=8 k=64", "VeRA r=256", "RandLoRA r=32", "PRANC k=16")
LORA, MERGED = "PEFT LoRA r=8", "merged one by one"
ROWS, DISTINCT, MANY, PROMPT = 32, (1, 8, 32), 1000, 32
SMALL = "NOLA r=8 k=30"
"""An adapter of about five kilobytes on 42 matrices."""
LOADED, MEMORY, COLD = "bank load", "bank memory", "bank cold"
COLD_SIDES = ("into a bank, factors made", "first token, loaded first", "first token, resident")
RESIDENTS = (1_000, 10_000, 100_000)
TOLERANCE = 2e-3


def cases(*, tiny: bool = False, everything: bool = False) -> Iterator[Case]:
    """Mixed batches of four methods; loading from bytes and from a store; memory of up to 100,000 adapters."""
    del everything
    base = bases.llama(1, 64, 256) if tiny else bases.llama(6, 512)
    many = 40 if tiny else MANY
    for method in METHODS[:1] if tiny else METHODS:
        yield Case(
            family="bank",
            name=f"decode of {base.name}, {ROWS} rows: {method}",
            sides=(
                "base",
                *(_distinct(method, count) for count in DISTINCT),
                _at_random(many),
                *(_distinct(LORA, count) for count in DISTINCT),
                MERGED,
            ),
            build=partial(_build_decoding, base, method, many),
            parameters={"model": base.name, "method": method, "rows": ROWS},
            work=ROWS,
            unit="tokens/s",
            usual=False,
            seconds=25,
        )
    yield Case(
        family=LOADED,
        name=f"load 1,000 adapters of {SMALL} from bytes, {base.name}",
        sides=("into a bank",),
        build=partial(_build_loading, base),
        parameters={"model": base.name},
        work=1000,
        unit="adapters/s",
        usual=False,
        seconds=5,
    )
    yield Case(
        family=COLD,
        name=f"an adapter of {SMALL} from a store of {many}, {base.name}",
        sides=COLD_SIDES,
        build=partial(_build_cold, base, many),
        parameters={"model": base.name, "adapters": many},
        usual=False,
        seconds=10,
    )
    for count in RESIDENTS[:1] if tiny else RESIDENTS:
        yield Case(
            family=MEMORY,
            name=f"{count:,} adapters of {SMALL} resident, {base.name}",
            sides=("packed files", "resident in a bank"),
            build=partial(_build_memory, base, count),
            parameters={"model": base.name, "adapters": count},
            measure=lambda call: float(str(call())),
            quantity="bytes",
            rounds=1,
            warms_up=False,
            usual=False,
        )


def _distinct(method: str, count: int) -> str:
    return f"{method}, {count} distinct"


def _at_random(many: int) -> str:
    return f"32 of {many:,} at random, others every step"


def users(method: str, base: Base, count: int) -> list[PackedAdapter]:
    """Adapters of one method with coefficients of their own, at 16 bits."""
    with tempfile.TemporaryDirectory() as folder:
        put(method, base.model(), base, started=True).save_pretrained(folder, save_embedding_layers=False)
        like = packed_of(open_adapter(folder), bits=16)
    generator = torch.Generator().manual_seed(0)
    values = like.coefficients.float()
    return [
        replace(like, coefficients=(values + 0.05 * torch.randn(values.shape, generator=generator)).half())
        for _ in range(count)
    ]


# --- decoding ---


def _build_decoding(base: Base, method: str, many: int, sides: Sequence[str]) -> Built:
    frozen, words = base.model(), base.batch(ROWS * PROMPT, length=PROMPT)["input_ids"]
    adapters = users(method, base, max(many, ROWS))
    model = bases.twin(frozen)
    bank = AdapterBank(model.eval())
    for number, adapter in enumerate(adapters):
        bank.load(f"u{number}", adapter)
    step = _Step(model, words)
    made: dict[str, Callable[[], object]] = {"base": _Step(bases.twin(frozen).eval(), words)}
    for count in DISTINCT:
        names = [f"u{row % count}" for row in range(ROWS)]
        made[_distinct(method, count)] = partial(_banked, bank, names, step)
        if (side := _distinct(LORA, count)) in sides:
            lora = _with_many(bases.twin(frozen), base, count)
            made[side] = _Step(lora, words, adapter_names=[_lora(row % count) for row in range(ROWS)])
    made[_at_random(many)] = partial(_banked_at_random, bank, many, step, random.Random(0))
    if MERGED in sides:
        made[MERGED] = partial(_merged, _peft(bases.twin(frozen), adapters[:ROWS]), words)
    return Built(
        {name: Side(made[name]) for name in sides},
        partial(_check_decoding, frozen, bank, model, adapters[:ROWS], words),
    )


class _Step:
    """One token a row after all but the last of some words are in the cache, again and again."""

    def __init__(self, model: nn.Module, words: Tensor, **named: Any) -> None:
        self._model, self._words, self._named = cast("Any", model), words, named
        with torch.no_grad():
            self._cache = self._model(input_ids=words[:, :-1], use_cache=True, **named).past_key_values
        self._length = words.shape[1] - 1

    @torch.no_grad()
    def __call__(self) -> Tensor:
        last, cache = self._words[:, -1:], self._cache
        logits = self._model(input_ids=last, past_key_values=cache, use_cache=True, **self._named).logits
        cache.crop(self._length - cache.get_seq_length())
        return logits


def _banked(bank: AdapterBank, names: list[str], step: _Step) -> Tensor:
    with bank.rows(names):
        return step()


def _banked_at_random(bank: AdapterBank, many: int, step: _Step, draw: random.Random) -> Tensor:
    return _banked(bank, [f"u{number}" for number in draw.sample(range(many), ROWS)], step)


def _with_many(model: nn.Module, base: Base, count: int) -> PeftModel:
    adapted = cast("PeftModel", put(LORA, model, base, started=True))
    for number in range(1, count):
        adapted.add_adapter(_lora(number), Adapter.named(LORA).config(base, started=True))
    return adapted.eval().requires_grad_(False)


def _lora(number: int) -> str:
    return f"a{number}" if number else "default"


def _peft(model: nn.Module, adapters: Sequence[PackedAdapter]) -> PeftModel:
    for number, adapter in enumerate(adapters):
        model = put_packed(model, adapter, f"u{number}")
    return cast("PeftModel", model)


@torch.no_grad()
def _merged(model: PeftModel, words: Tensor) -> None:
    for number in range(ROWS):
        model.set_adapter(f"u{number}")
        model.merge_adapter()
        model(input_ids=words[number : number + 1, -1:])
        model.unmerge_adapter()


@torch.no_grad()
def _check_decoding(
    frozen: nn.Module, bank: AdapterBank, model: nn.Module, adapters: list[PackedAdapter], words: Tensor
) -> str:
    """Rows of a mixed batch are those of their adapters alone; rows of the base are the base's to the bit."""
    names = [f"u{row}" if row % 4 else "__base__" for row in range(ROWS)]
    found = cast("Any", model)(input_ids=words, adapter_names=names).logits
    plain = cast("Any", bases.twin(frozen).eval())(input_ids=words).logits
    worst = 0.0
    for row in range(ROWS):
        if row % 4 == 0:
            if not torch.equal(found[row], plain[row]):
                raise CheckFailed(f"row {row} of the base is not the base's to the bit")
        elif row % 8 == 1:
            own = put_packed(bases.twin(frozen), adapters[row])(input_ids=words[row : row + 1]).logits[0]
            worst = max(worst, float((found[row] - own).norm() / own.norm()))
    if not worst <= TOLERANCE:
        raise CheckFailed(f"a row differs from its adapter alone by {worst:.1e}, allowed {TOLERANCE:.0e}")
    return f"rows within {worst:.1e} of their adapters alone, rows of the base to the bit"


# --- loading and memory ---


def _build_loading(base: Base, sides: Sequence[str]) -> Built:
    bank = AdapterBank(base.model().eval())
    data = [one.to_bytes() for one in users(SMALL, base, 100)]

    def load() -> None:
        for number in range(1000):
            bank.load(f"u{number}", data[number % 100])

    def check() -> str:
        resident = bank.load("one", data[3])
        if not torch.equal(resident.values(), PackedAdapter.from_bytes(data[3]).coefficients):
            raise CheckFailed("what is resident is not what the file holds")
        return f"{len(data[0]):,} bytes a file, checked as a file is"

    return Built({name: Side(load) for name in sides}, check)


def _build_cold(base: Base, many: int, sides: Sequence[str]) -> Built:
    model = base.model().eval()
    bank = AdapterBank(model)
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    store = AdapterStore(folder / "adapters.db")
    weakref.finalize(bank, shutil.rmtree, folder)
    for number, adapter in enumerate(users(SMALL, base, min(many, 100))):
        store.add(f"u{number}", adapter)
    words = base.batch(8, length=8)["input_ids"]
    turn = iter(range(1 << 30))

    def load() -> str:
        name = f"u{next(turn) % min(many, 100)}"
        bank.load(name, store.get(name))
        return name

    def ready() -> None:
        with bank.rows([load()]) as plan:
            plan.reached = True  # nothing is computed: only what comes before is timed

    @torch.no_grad()
    def answer() -> Tensor:
        return cast("Any", model)(input_ids=words, adapter_names=[load()]).logits

    @torch.no_grad()
    def warm() -> Tensor:
        return cast("Any", model)(input_ids=words, adapter_names=["u0"]).logits

    def check() -> str:
        bank.load("u0", store.get("u0"))
        if bank.residents()[-1].version != 1:
            raise CheckFailed("the store's version is not the resident one's")
        return "read from the store, checked, expanded"

    return Built({name: Side(call) for name, call in zip(COLD_SIDES, (ready, answer, warm), strict=True)}, check)


def _build_memory(base: Base, count: int, sides: Sequence[str]) -> Built:
    data = [one.to_bytes() for one in users(SMALL, base, 100)]

    def resident() -> int:
        bank = AdapterBank(base.model().eval(), row_bytes=1 << 32)
        bank.load("first", data[0])
        gc.collect()
        before = resident_bytes()
        for number in range(count):
            bank.load(f"user-{number}", data[number % 100])
        return resident_bytes() - before

    made = {"packed files": lambda: count * len(data[0]), "resident in a bank": resident}
    return Built({name: Side(made[name]) for name in sides}, lambda: f"{len(data[0]):,} bytes a file")

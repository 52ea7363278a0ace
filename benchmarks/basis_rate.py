"""How fast a basis is redrawn, by law: the plain torch reference against the compiled loops."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Built, Case, CheckFailed, Side
from randbasis.basis import Basis
from randbasis.ops import backends, reference
from randbasis.ops.reference import Slab, Tile

LAWS = ("sign", "uniform", "normal", "sparse(6)")
PACKED = "packed signs"
_CPU = torch.device("cpu")


def cases(*, tiny: bool = False, everything: bool = False) -> Iterator[Case]:
    """Raw words of the sign law ("packed signs"), then entries in float32 by law."""
    del everything
    count, rows, cols = (8, 4, 256) if tiny else (1000, 16, 4096)
    yield _case(PACKED, Slab(Basis.named(0, "bench/words", "sign"), count, rows, cols), _words, "Gbit/s")
    for law in LAWS:
        slab = Slab(Basis.named(0, "bench/entries", law), count // 8, rows, cols)
        yield _case(f"entries {law}", slab, _entries, "G entries/s")


def _case(what: str, slab: Slab, calls: Callable[[Slab], dict[str, Callable[[], Tensor]]], unit: str) -> Case:
    return Case(
        family="basis",
        name=f"{what} {slab.count}×{slab.rows}×{slab.cols}",
        sides=("reference", "compiled"),
        build=partial(_build, calls, slab),
        parameters={"what": what, "law": slab.basis.law.name},
        work=slab.entries / 1e9,
        unit=unit,
        seconds=10,
    )


def _build(calls: Callable[[Slab], dict[str, Callable[[], Tensor]]], slab: Slab, sides: Sequence[str]) -> Built:
    made = calls(slab)

    def check() -> str:
        if not torch.equal(made["reference"](), made["compiled"]()):
            raise CheckFailed("the compiled loops give other bits than the reference")
        return "equal to the reference bit for bit"

    return Built({name: Side(made[name]) for name in sides}, check)


def _words(slab: Slab) -> dict[str, Callable[[], Tensor]]:
    whole = Tile(0, slab.count, 0, slab.rows)
    return {"reference": lambda: reference.words(slab, whole, _CPU), "compiled": lambda: backends.words(slab, _CPU)}


def _entries(slab: Slab) -> dict[str, Callable[[], Tensor]]:
    whole = Tile(0, slab.count, 0, slab.rows)

    def plain() -> Tensor:
        return reference.expand(slab, whole, torch.float32, _CPU)

    return {"reference": plain, "compiled": lambda: backends.expand(slab, whole, torch.float32, _CPU)}

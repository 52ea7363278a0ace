"""How fast a basis is redrawn, by law: the plain torch reference against the compiled loops."""

from collections.abc import Iterator

import torch

from benchmarks.case import Case
from randbasis.basis import Basis, decode
from randbasis.ops import backends, reference
from randbasis.ops.reference import Slab, Tile

COUNT, ROWS, COLS = 1000, 16, 4096
LAWS = ("sign", "uniform", "normal", "sparse(6)")


def cases() -> Iterator[Case]:
    """Raw words of the sign law ("packed signs"), then entries in float32 by law."""
    cpu = torch.device("cpu")
    slab = Slab(Basis.named(0, "bench/words", "sign"), COUNT, ROWS, COLS)
    whole = Tile(0, COUNT, 0, ROWS)

    def check_words() -> None:
        assert torch.equal(reference.words(slab, whole, cpu), backends.words(slab, cpu))

    sides = {"reference": lambda: reference.words(slab, whole, cpu), "compiled": lambda: backends.words(slab, cpu)}
    yield Case(f"packed signs {COUNT}x{ROWS}x{COLS}", sides, check_words, slab.entries / 1e9, "Gbit/s")
    for law in LAWS:
        yield _expand(Slab(Basis.named(0, "bench/entries", law), COUNT // 8, ROWS, COLS))


def _expand(slab: Slab) -> Case:
    cpu, whole = torch.device("cpu"), Tile(0, slab.count, 0, slab.rows)

    def compiled() -> torch.Tensor:
        return backends.expand(slab, whole, torch.float32, cpu)

    def plain() -> torch.Tensor:
        return decode(reference.words(slab, whole, cpu), slab.basis.law)[..., : slab.cols].to(torch.float32)

    def check() -> None:
        assert torch.equal(plain(), compiled())

    name = f"entries {slab.basis.law.name} {slab.count}x{slab.rows}x{slab.cols}"
    return Case(name, {"reference": plain, "compiled": compiled}, check, slab.entries / 1e9, "G entries/s")

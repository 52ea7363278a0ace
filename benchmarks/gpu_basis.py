"""How fast a basis is made on a GPU, by law, beside what the device can do at most: the roofline.

Two ceilings are measured in the same rounds. The first side writes as many bytes and computes nothing. Another makes as
many integer operations, by the count below, and writes next to nothing. The kernel can be no faster than the slower.

Operations of the generator: ten rounds of two wide products and two three-input XORs a block of 128 bits (the key's
schedule is the same for all blocks). Operations of an entry: a shift and a selection of bits; an arithmetic step or a
comparison, by law; half a conversion, since two entries are packed into a word of two bfloat16.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.case import Built, Call, Case, CheckFailed, Side
from benchmarks.gpu import device, device_seconds
from randbasis.basis import Basis, basis_entries, block_words
from randbasis.ops import backends, reference
from randbasis.ops.reference import Slab, Tile

BLOCK_OPERATIONS = 40
ENTRY_OPERATIONS = {"sign": 2.5, "uniform": 4.5, "normal": 8.0, "sparse(6)": 7.5}
"""The normal law counts bits in nine operations for two entries."""
BYTES, INTEGERS, KERNEL, REFERENCE = "write of the bytes", "the integer operations", "Triton", "plain torch"
CHAINS = 8
"""Independent chains of operations a thread, so that none waits for another."""
STEP_OPERATIONS = 4


@triton.jit
def _integer_steps(out, steps, WIDTH: tl.constexpr):
    """``steps`` times four integer operations on every element, none of which can be left out."""
    lane = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    a = lane.to(tl.uint32)
    b = a ^ 0x9E3779B9
    for _ in range(steps):
        a = (a << 5) ^ b
        b = (b >> 3) ^ a
    tl.store(out + lane, (a ^ b).to(tl.int32, bitcast=True))


def cases(*, tiny: bool = False, everything: bool = False) -> Iterator[Case]:
    """Raw words, then entries in bfloat16 by law."""
    del everything
    count, rows, cols = (2, 2, 256) if tiny else (1024, 16, 11008)
    # More matrices for words, so that they do not fit into a cache either.
    words = Slab(Basis.named(0, "bench/words", "sign"), count if tiny else 8 * count, rows, cols)
    yield _case("words", words)
    for law in ENTRY_OPERATIONS:
        yield _case("entries", Slab(Basis.named(0, "bench/entries", law), count, rows, cols))


def operations(slab: Slab, *, entries: bool) -> float:
    """Integer operations of a slab by the count above."""
    made = slab.count * slab.rows * slab.blocks * BLOCK_OPERATIONS
    return made + (slab.entries * ENTRY_OPERATIONS[slab.basis.law.name] if entries else 0)


def written(slab: Slab, *, entries: bool) -> int:
    """Bytes of the result."""
    return slab.entries * 2 if entries else slab.packed_bytes


def _case(what: str, slab: Slab) -> Case:
    entries, law = what == "entries", slab.basis.law.name
    counted = (
        f"{written(slab, entries=entries) / 1e9:.3g} GB, {operations(slab, entries=entries) / 1e9:.3g} G operations"
    )
    return Case(
        family="gpu basis",
        name=f"{what} {law} {slab.count}×{slab.rows}×{slab.cols}, {counted}",
        sides=(BYTES, INTEGERS, KERNEL, REFERENCE),
        build=partial(_build, slab, entries),
        parameters={"what": what, "law": law},
        work=slab.entries / 1e9,
        unit="G entries/s",
        measure=device_seconds,
        seconds=3,
        device=str(device()),
    )


def _build(slab: Slab, entries: bool, sides: Sequence[str]) -> Built:
    place, whole = device(), Tile(0, slab.count, 0, slab.rows)
    target = torch.empty(written(slab, entries=entries), dtype=torch.int8, device=place)
    made: dict[str, Call] = {
        BYTES: partial(target.fill_, 1),
        INTEGERS: partial(_compute, operations(slab, entries=entries), place),
        KERNEL: partial(_made, slab, whole, place, entries),
        REFERENCE: partial(_plain, slab, place, entries),
    }
    return Built({name: Side(made[name]) for name in sides}, partial(_check, slab, place, entries))


def _made(slab: Slab, tile: Tile, place: torch.device, entries: bool) -> Tensor:
    return backends.expand(slab, tile, torch.bfloat16, place) if entries else backends.words(slab, place)


def _plain(slab: Slab, place: torch.device, entries: bool) -> None:
    """Tile by tile, as its fallback does: all int64 intermediates at once would not fit."""
    for tile in reference.tiles(slab, backends.tile_entries(place) // 8):
        if entries:
            reference.expand(slab, tile, torch.bfloat16, place)
        else:
            reference.words(slab, tile, place)


def _compute(count: float, place: torch.device) -> None:
    programs, width = (1, 128) if place.type == "cpu" else (132 * 16, 128 * CHAINS)
    steps = max(1, round(count / (programs * width * STEP_OPERATIONS)))
    if place.type == "cpu":
        steps = 2
    _integer_steps[(programs,)](torch.empty(programs * width, dtype=torch.int32, device=place), steps, WIDTH=width)


def _check(slab: Slab, place: torch.device, entries: bool) -> str:
    """The first and the last matrix, bit for bit."""
    for index in (0, slab.count - 1):
        tile = Tile(index, 1, 0, slab.rows)
        basis = slab.basis
        if entries:
            got = backends.expand(slab, tile, torch.bfloat16, place).cpu().double()
            shape = (1, slab.rows, slab.cols)
            wanted = basis_entries(basis.seed, basis.stream, basis.law, shape, start=(index, 0, 0)).double()
            wanted *= basis.law.power
        else:
            got = backends.words(slab, place)[index : index + 1].cpu()
            wanted = block_words(basis, (index, 1), (0, slab.rows), (0, slab.blocks))
        if not torch.equal(got, wanted):
            raise CheckFailed(f"the kernel gives other bits than the reference at index {index}")
    return "equal to the reference on the CPU bit for bit"

"""A sum of basis matrices and its gradient, whatever their number: the sign law beside the disjoint one, math (25)."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Built, Case, CheckFailed, Side
from randbasis.basis import Basis
from randbasis.ops import Slab, Stored, choose_storage, combine, inner, reference

SUM, GRADIENT = "sum", "gradient"
SIDES = ("sign", "sign redrawn", "hashed", "hashed redrawn")
_CPU = torch.device("cpu")


def cases(*, tiny: bool = False, everything: bool = False) -> Iterator[Case]:
    """A factor of r = 16 on 4,096 columns, of 64, 1,024 and 65,536 matrices; kept as ``auto`` does, or redrawn."""
    del everything
    rows, cols = (2, 256) if tiny else (16, 4096)
    for count in (8,) if tiny else (64, 1024, 65536):
        for what in (SUM, GRADIENT):
            yield Case(
                family="sums",
                name=f"{what} of {count} matrices {rows}×{cols}",
                sides=SIDES,
                build=partial(_build, what, count, rows, cols),
                parameters={"what": what, "k": count},
                work=rows * cols / 1e6,
                unit="M places/s",
                seconds=20,
            )


def _build(what: str, count: int, rows: int, cols: int, sides: Sequence[str]) -> Built:
    c = torch.randn(1, count, generator=torch.Generator().manual_seed(0))
    g = torch.randn(1, rows, cols, generator=torch.Generator().manual_seed(1))
    bases = {side: _basis(side, count, rows, cols) for side in sides}
    calls: dict[str, Callable[[], Tensor]] = {
        side: partial(combine, c, one) if what == SUM else partial(inner, g, one) for side, one in bases.items()
    }

    def check() -> str:
        for side, one in bases.items():
            _check(side, one.slab, c, g, combine(c, one), inner(g, one))
        return "a part of each sum equal to the reference within 1e-5, each gradient its adjoint"

    return Built({side: Side(calls[side]) for side in sides}, check)


def _basis(side: str, count: int, rows: int, cols: int) -> Stored:
    slab = Slab(Basis.named(0, "bench/sums", side.partition(" ")[0]), count, rows, cols)
    return Stored(slab, "recompute" if side.endswith("redrawn") else choose_storage(slab, "auto", shared=True))


def _check(side: str, slab: Slab, c: Tensor, g: Tensor, total: Tensor, products: Tensor) -> None:
    """Raise unless a corner of the sum is that of the reference, and both sides of ⟨Σ cᵢAᵢ, G⟩ are equal."""
    corner = Slab(slab.basis, slab.count, 1, 128)
    wanted = reference.combine(c.double(), corner)[0]
    size = float(wanted.square().mean().sqrt())
    if float((total[0, :1, :128] - wanted).abs().max()) > 1e-5 * size:
        raise CheckFailed(f"{side}: the sum is not that of the reference")
    apart = float((total.double() * g.double()).sum() - (c.double() * products.double()).sum())
    if abs(apart) > 1e-5 * float(total.double().norm() * g.double().norm()):
        raise CheckFailed(f"{side}: the gradient is not the adjoint of the sum")

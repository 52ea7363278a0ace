"""What the host pays for one sum of basis matrices and its gradient: from the call until the device has its work.

The device's own time is not in it: it is idle before, and nobody waits for it. The floor is the same two products with
the entries stored, by torch alone.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.case import Built, Case, CheckFailed, Side
from benchmarks.gpu import device, host_seconds
from randbasis.basis import Basis
from randbasis.ops import Slab, combine, entries, hold

PRODUCT, RECOMPUTED, DENSE, AUTOCAST = "torch's product", "sum, redrawn", "sum, stored", "sum, stored, under autocast"
SIDES = (PRODUCT, RECOMPUTED, DENSE, AUTOCAST)
PASSES = 20
"""Fewer than the launches that a device takes in before it lets the host wait."""
TOLERANCE = 2e-2


def cases(*, tiny: bool = False, everything: bool = False) -> Iterator[Case]:
    """The sum of NOLA on a 7B layer, k = 128, r = 16."""
    del everything
    count, rows, cols = (8, 2, 64) if tiny else (128, 16, 4096)
    slab, passes = Slab(Basis.named(0, "bench/host", "sign"), count, rows, cols), 1 if tiny else PASSES
    yield Case(
        family="gpu host",
        name=f"{passes} × sum of {count}×{rows}×{cols}, forward and back, the host alone",
        sides=SIDES,
        build=partial(_build, slab, passes),
        parameters={"passes": passes, "matrices": count},
        work=passes,
        unit="sums/s",
        measure=host_seconds,
        seconds=5,
        device=str(device()),
    )


def _build(slab: Slab, passes: int, sides: Sequence[str]) -> Built:
    drawn = torch.Generator().manual_seed(0)
    c = torch.randn(slab.count, generator=drawn).to(device()).requires_grad_()
    weights = torch.randn(slab.rows, slab.cols, generator=drawn).to(device())
    redrawn, stored = hold(slab, "recompute"), hold(slab, "dense")
    columns = entries(redrawn, torch.float32, device()).flatten(1).T
    sums: dict[str, Callable[[], Tensor]] = {
        PRODUCT: lambda: functional.linear(c, columns).view(slab.rows, slab.cols),
        RECOMPUTED: lambda: combine(c, redrawn),
        DENSE: lambda: combine(c, stored),
        AUTOCAST: lambda: _under_autocast(lambda: combine(c, stored)),
    }

    def run(name: str) -> None:
        for _ in range(passes):
            torch.autograd.grad(sums[name](), c, weights)

    chosen = {name: sums[name] for name in sides}
    return Built({name: Side(partial(run, name)) for name in sides}, partial(_check, chosen, c, weights, columns))


def _under_autocast(call: Callable[[], Tensor]) -> Tensor:
    with torch.autocast(device().type, torch.bfloat16):
        return call()


def _check(sums: dict[str, Callable[[], Tensor]], c: Tensor, weights: Tensor, columns: Tensor) -> str:
    """Sums and gradients in float64."""
    worst = 0.0
    total, gradient = columns.double() @ c.detach().double(), columns.double().T @ weights.double().flatten()
    for name, call in sums.items():
        (got,) = torch.autograd.grad(out := call(), c, weights)
        for value, wanted in ((out.detach().flatten(), total), (got, gradient)):
            error = float((value.double() - wanted).norm() / wanted.norm())
            worst = max(worst, error)
            if not error <= TOLERANCE:
                raise CheckFailed(f"{name} differs from float64 by {error:.1e}, allowed {TOLERANCE:.0e}")
    return f"float64: within {worst:.1e}"

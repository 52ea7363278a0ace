"""Vectors times a frozen matrix on a GPU: stored in bfloat16, or made where it is needed.

``fused`` makes entries inside of the product and writes none; ``expanded`` writes them to memory, some at a time, for
the vendor's product; both from the seed or from packed words. The matrices are VeRA's A and RandLoRA's B of a 7B layer.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Built, Case, CheckFailed, Side
from benchmarks.gpu import device, device_seconds
from randbasis.basis import Basis
from randbasis.basis_storage import BasisStorage
from randbasis.ops import Slab, entries, hold, project
from randbasis.ops.backends import PROJECT_ENVIRONMENT

STORED = "stored bfloat16"
SIDES = (STORED, "fused, redrawn", "fused, packed", "expanded, redrawn", "expanded, packed")
TOLERANCE = 2e-2


def cases(*, tiny: bool = False, everything: bool = False) -> Iterator[Case]:
    """Few vectors as in decoding, and many as in training."""
    sizes = (("VeRA A", 1, 16, 256),) if tiny else (("VeRA A", 1, 1024, 4096), ("RandLoRA B", 128, 32, 4096))
    for name, count, rows, cols in sizes:
        slab = Slab(Basis.named(0, "bench/project", "sign"), count, rows, cols)
        for tokens in (3,) if tiny else (1, 64, 4096, 16384) if everything else (1, 64, 4096):
            for transpose in (False, True):
                what = f"x {'M' if transpose else 'Mᵀ'}"
                yield Case(
                    family="gpu project",
                    name=f"{what}, M of {name}, {count * rows}×{cols}, {tokens:,} vectors",
                    sides=SIDES,
                    build=partial(_build, slab, tokens, transpose),
                    parameters={"tokens": tokens, "matrix": name, "transposed": str(transpose)},
                    work=2 * tokens * slab.entries / 1e12,
                    unit="T operations/s",
                    measure=device_seconds,
                    seconds=1.5,
                    device=str(device()),
                )


def _build(slab: Slab, tokens: int, transpose: bool, sides: Sequence[str]) -> Built:
    width = slab.count * slab.rows if transpose else slab.cols
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).to(device(), torch.bfloat16)
    made = {name: _side(name, x, slab, transpose) for name in sides}
    return Built({name: Side(made[name]) for name in sides}, partial(_check, x, slab, transpose, made))


def _side(name: str, x: Tensor, slab: Slab, transpose: bool) -> Callable[[], Tensor]:
    way, _, source = name.partition(", ")
    storages: dict[str, BasisStorage] = {"redrawn": "recompute", "packed": "packed"}
    storage = storages.get(source, "dense")
    return partial(_product, x, slab, storage, transpose, "auto" if name == STORED else way, hold(slab, storage))


@torch.no_grad()
def _product(x: Tensor, slab: Slab, storage: BasisStorage, transpose: bool, way: str, kept: object) -> Tensor:
    del kept  # what keeps the stored basis alive is the caller's reference
    before = os.environ.get(PROJECT_ENVIRONMENT)
    os.environ[PROJECT_ENVIRONMENT] = way
    try:
        return project(x, hold(slab, storage), transpose=transpose)
    finally:
        if before is None:
            del os.environ[PROJECT_ENVIRONMENT]
        else:
            os.environ[PROJECT_ENVIRONMENT] = before


def _check(x: Tensor, slab: Slab, transpose: bool, made: dict[str, Callable[[], Tensor]]) -> str:
    matrix = entries(hold(slab, "recompute"), torch.float32, x.device).flatten(0, 1)
    wanted = x[:64].double() @ (matrix if transpose else matrix.T).double()
    worst = 0.0
    for name, call in made.items():
        error = float((call()[:64].double() - wanted).norm() / wanted.norm())
        if not error <= TOLERANCE:
            raise CheckFailed(f"{name}: the product differs by {error:.1e} of its size, allowed {TOLERANCE:.0e}")
        worst = max(worst, error)
    return f"float64 product: within {worst:.1e}, bfloat16 rounding included"

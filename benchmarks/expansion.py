"""Expanding one NOLA adapter of a LLaMA-2 shape to its factors: coefficients and a seed to A and B of every matrix.

``layer by layer`` holds the factors of one block at a time. A case with some of the layers says so in its name: nothing
is extrapolated. The published algorithm draws every basis with torch's generator.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Built, Case, CheckFailed, Side
from benchmarks.published_nola import draw
from benchmarks.reference_run import OUTPUT, plain_torch
from randbasis.methods import Nola, Site
from randbasis.methods.bound_nola import BoundNola

RANK = 16
PUBLISHED = "published NOLA"
STORED, REDRAWN = "basis stored packed", "basis redrawn"


@dataclass(frozen=True)
class Shape:
    """A published architecture: width, inner width, width of keys and values, layers, and ``k`` of its NOLA."""

    name: str
    hidden: int
    inner: int
    key_value: int
    layers: int
    basis: int

    @property
    def block(self) -> list[tuple[int, int]]:
        """``(out, in)`` of its seven matrices a layer."""
        narrow, wide = (self.key_value, self.hidden), (self.inner, self.hidden)
        return [(self.hidden, self.hidden), narrow, narrow, (self.hidden, self.hidden), wide, wide, wide[::-1]]

    def entries(self, layers: int) -> int:
        """Basis entries that the factors of so many layers are made from."""
        return layers * sum(self.basis * RANK * (out + in_) for out, in_ in self.block)


SHAPES = (Shape("LLaMA-2 7B", 4096, 11008, 4096, 32, 128), Shape("LLaMA-2 70B", 8192, 28672, 1024, 80, 512))
TINY = Shape("tiny LLaMA", 64, 160, 32, 2, 8)


def cases(*, tiny: bool = False, everything: bool = False) -> Iterator[Case]:
    """One layer beside the published algorithm; the whole 7B; some layers of the 70B, or all."""
    if tiny:
        yield _case(TINY, 1, (REDRAWN, STORED, PUBLISHED))
        yield _case(TINY, 2, (REDRAWN, STORED))
        return
    small, large = SHAPES
    yield _case(small, 1, (REDRAWN, STORED, PUBLISHED))
    yield _case(small, small.layers, (REDRAWN, STORED))
    yield _case(large, 4, (REDRAWN, STORED))
    yield _case(large, large.layers, (REDRAWN, STORED), usual=everything)


def _case(shape: Shape, layers: int, sides: tuple[str, ...], *, usual: bool = True) -> Case:
    part = "all" if layers == shape.layers else f"{layers} of"
    return Case(
        family="expand",
        name=f"expand {shape.name}, k={shape.basis}, r={RANK}, {part} {shape.layers} layers",
        sides=sides,
        build=partial(_build, shape, layers),
        parameters={"model": shape.name, "layers": layers, "of": shape.layers},
        work=shape.entries(layers) / 1e9,
        unit="G entries/s",
        usual=usual,
        seconds=12,
    )


def _build(shape: Shape, layers: int, sides: Sequence[str]) -> Built:
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.randn(layers, len(shape.block), 2, shape.basis, generator=generator)
    made = {name: _expander(name, shape, coefficients) for name in sides}
    ours = [name for name in sides if name != PUBLISHED]
    return Built({name: Side(made[name]) for name in sides}, partial(_check, shape, coefficients[:1], ours))


def _expander(name: str, shape: Shape, coefficients: Tensor) -> Callable[[], list[tuple[Tensor, Tensor]]]:
    if name == PUBLISHED:
        return partial(_published, shape, coefficients)
    method = Nola(r=RANK, num_basis=shape.basis, alpha=8.0, basis_storage="packed" if name == STORED else "recompute")
    return partial(_ours, [method.bind(Site(out, in_, method.streams())) for out, in_ in shape.block], coefficients)


@torch.no_grad()
def _ours(bounds: list[BoundNola], coefficients: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The factors of the last block; those of the others were made and let go."""
    block: list[tuple[Tensor, Tensor]] = []
    for layer in coefficients:
        block = []
        for bound, (a, b) in zip(bounds, layer, strict=True):
            factors = bound.factors({"nola_a": a, "nola_b": b})
            assert factors.up is not None
            block.append((factors.up, factors.down))
    return block


@torch.no_grad()
def _published(shape: Shape, coefficients: Tensor) -> list[tuple[Tensor, Tensor]]:
    block: list[tuple[Tensor, Tensor]] = []
    for layer in coefficients:
        block = []
        for seed, ((out, in_), (a, b)) in enumerate(zip(shape.block, layer, strict=True)):
            down = torch.einsum("b,boi->oi", a, draw(2 * seed, shape.basis, RANK, in_, a))
            up = torch.einsum("b,boi->oi", b, draw(2 * seed + 1, shape.basis, out, RANK, b))
            block.append((up, down))
    return block


def _check(shape: Shape, coefficients: Tensor, ours: list[str]) -> str:
    """The first layer of every side of ours against the reference in float64, and the size of the published factors."""
    method = Nola(r=RANK, num_basis=shape.basis, alpha=8.0, basis_storage="recompute")
    worst = 0.0
    with plain_torch():
        (wanted,) = [_ours([method.bind(_smallest(shape, method))], coefficients[:, 1:2].double())]
    for name in ours:
        up, down = _expander(name, shape, coefficients)()[1]
        for own, reference in zip((up, down), wanted[0], strict=True):
            worst = max(worst, float((own.double() - reference).norm() / reference.norm()))
    if not worst <= OUTPUT:
        raise CheckFailed(f"factors differ from the reference by {worst:.1e} of their size, allowed {OUTPUT:.0e}")
    return f"float64 reference: factors of one matrix within {worst:.1e}; {math.prod(coefficients.shape)} coefficients"


def _smallest(shape: Shape, method: Nola) -> Site:
    out, in_ = shape.block[1]
    return Site(out, in_, method.streams())

"""Expanding a whole NOLA adapter of a LLaMA-2 shape on a GPU: coefficients and a seed to A and B of every matrix.

``all layers`` hands the coefficients of all matrices of one shape to the method at once, which makes or reads each
basis once for all of them; ``matrix by matrix`` is what a model does that calls its layers in turn. ``own bases`` has a
basis for every matrix, so that nothing is shared, still in one launch for all matrices of one shape. Seconds are of the
clock, python included; a CUDA graph replays its launches without python. Factors are float32 and stay, as in a server's
memory.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Built, Case, CheckFailed, Side
from benchmarks.expansion import RANK, SHAPES, Shape
from benchmarks.gpu import device, wall_seconds
from benchmarks.reference_run import OUTPUT, plain_torch
from randbasis.methods import Nola, Site
from randbasis.methods.bound_nola import BoundNola
from randbasis.ops import Stored, combine_each

REDRAWN, GRAPH = "all layers, basis redrawn", "all layers, basis redrawn, in a CUDA graph"
STORED, ONE_BY_ONE, OWN = "all layers, basis packed", "matrix by matrix, basis redrawn", "all layers, own bases redrawn"
SIDES = (REDRAWN, GRAPH, STORED, ONE_BY_ONE, OWN)
TINY = Shape("tiny LLaMA", 16, 24, 8, 1, 3)
"""Smaller than elsewhere: an interpreter runs these kernels when they are tested."""
Factors = list[tuple[Tensor, Tensor]]


def cases(*, tiny: bool = False, everything: bool = False) -> Iterator[Case]:
    """The whole 7B and the whole 70B."""
    del everything
    for shape in (TINY,) if tiny else SHAPES:
        yield Case(
            family="gpu expand",
            name=f"expand {shape.name} on a GPU, k={shape.basis}, r={_rank(shape)}, all {shape.layers} layers",
            sides=tuple(side for side in SIDES if side != GRAPH or device().type == "cuda"),
            build=partial(_build, shape),
            parameters={"model": shape.name, "layers": shape.layers},
            work=shape.entries(shape.layers) / 1e9,
            unit="G entries/s",
            measure=wall_seconds,
            seconds=8,
            device=str(device()),
        )


def _rank(shape: Shape) -> int:
    return 2 if shape is TINY else RANK


def _groups(shape: Shape) -> list[tuple[tuple[int, int], int]]:
    """Shapes ``(out, in)`` of the adapted matrices, and how many there are of each in all layers."""
    return [(pair, shape.layers * shape.block.count(pair)) for pair in dict.fromkeys(shape.block)]


def _method(shape: Shape, storage: str, *, share: bool = True) -> Nola:
    return Nola(
        r=_rank(shape),
        num_basis=shape.basis,
        alpha=8.0,
        share_basis=share,
        basis_storage="packed" if storage == "packed" else "recompute",
    )


def _build(shape: Shape, sides: Sequence[str]) -> Built:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, many, shape.basis, generator=generator).to(device()) for _, many in _groups(shape)]
    made = {name: _expander(name, shape, drawn) for name in sides}
    return Built({name: Side(made[name]) for name in sides}, partial(_check, shape, drawn, made))


def _expander(name: str, shape: Shape, drawn: list[Tensor]) -> Callable[[], Factors]:
    if name == OWN:
        return partial(_own, shape, drawn)
    method = _method(shape, "packed" if name == STORED else "recompute")
    bounds = [method.bind(Site(out, in_, method.streams())) for (out, in_), _ in _groups(shape)]
    if name == ONE_BY_ONE:
        return partial(_one_by_one, bounds, drawn)
    together = partial(_together, bounds, drawn)
    return _captured(together) if name == GRAPH else together


@torch.no_grad()
def _together(bounds: list[BoundNola], drawn: list[Tensor]) -> Factors:
    return [_factors(bound, a, b) for bound, (a, b) in zip(bounds, drawn, strict=True)]


@torch.no_grad()
def _one_by_one(bounds: list[BoundNola], drawn: list[Tensor]) -> Factors:
    return [
        _factors(bound, a, b)
        for bound, coefficients in zip(bounds, drawn, strict=True)
        for a, b in zip(*coefficients, strict=True)
    ]


def _factors(bound: BoundNola, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    factors = bound.factors({"nola_a": a, "nola_b": b})
    assert factors.up is not None
    return factors.up, factors.down


@torch.no_grad()
def _own(shape: Shape, drawn: list[Tensor]) -> Factors:
    """Sums alone, without the frozen offset."""
    found: Factors = []
    for ((out, in_), many), (a, b) in zip(_groups(shape), drawn, strict=True):
        up = combine_each(b, _own_bases(shape, "B", out, many))
        found.append((up, combine_each(a, _own_bases(shape, "A", in_, many))))
    return found


def _own_bases(shape: Shape, role: str, width: int, many: int) -> list[Stored]:
    method = _method(shape, "recompute", share=False)
    sites = [Site(width, width, method.streams(f"{width}.{number}")) for number in range(many)]
    return [method.bind(site).bases[method.roles.index(role)] for site in sites]


def _captured(call: Callable[[], Factors]) -> Callable[[], Factors]:
    """The same work as one graph; its first run is before, on a stream of its own, as capturing wants it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        factors = call()

    def replay() -> Factors:
        graph.replay()
        return factors

    return replay


def _check(shape: Shape, drawn: list[Tensor], made: dict[str, Callable[[], Factors]]) -> str:
    """The last matrix of the last group of every side against the reference in float64."""
    method = _method(shape, "recompute")
    ((out, in_), many), (a, b) = _groups(shape)[-1], drawn[-1].double()[:, -1:]
    with plain_torch():
        shared = _factors(method.bind(Site(out, in_, method.streams())), a[0], b[0])
        bases = [_own_bases(shape, role, width, many)[-1:] for role, width in (("B", out), ("A", in_))]
        own = tuple(combine_each(c, base)[0] for c, base in zip((b, a), bases, strict=True))
    worst = 0.0
    for name, call in made.items():
        for got, wanted in zip(call()[-1], own if name == OWN else shared, strict=True):
            last = got if got.dim() == 2 else got[-1]
            worst = max(worst, float((last.double() - wanted).norm() / wanted.norm()))
    if not worst <= OUTPUT:
        raise CheckFailed(f"factors differ from the reference by {worst:.1e} of their size, allowed {OUTPUT:.0e}")
    count = sum(math.prod(c.shape) for c in drawn)
    return f"float64 reference: factors of one matrix within {worst:.1e}; {count} coefficients"

"""ΔW → COEFFICIENTS: the nearest NOLA, VeRA or PRANC to a given ΔW, by least squares in float64.

NOLA and VeRA are bilinear in two vectors of coefficients: with one of them fixed, ``‖ΔW − ΔŴ‖²`` is quadratic in the
other and its minimum is one small linear system. The two halves take turns, so the residual never rises. Nothing of
``k · out · in`` entries is formed: ΔW comes as factors, and every inner product is a trace of small matrices. PRANC is
linear in its one vector, and its basis matrices are as large as the layer: one system, and they are formed.

The start decides where an alternation ends, so there are two, both deterministic: the one that training starts from,
and one that finds ΔW directly where it is reachable. The better of the two after one turn goes on.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from randbasis.errors import UnknownMethodError
from randbasis.importing.nola_problem import NolaBasis, NolaProblem, NolaSide
from randbasis.importing.pranc_problem import PrancBasis, PrancProblem
from randbasis.importing.vera_problem import VeraProblem
from randbasis.low_rank import distance, norm
from randbasis.methods import Bound, Factors, Nola, Pranc, Site, Vera

NEAREST = (Nola.name, Vera.name, Pranc.name)
"""Methods whose nearest coefficients can be found."""
ROUNDING = 1e-15
"""Share of ``‖ΔW‖²`` below which a squared residual is rounding."""


class Problem(Protocol):
    """One ΔW and one method, as the alternation sees them."""

    total: float
    bilinear: bool
    """Whether there are two vectors that take turns; with one, a turn ends it."""

    def starts(self) -> Iterator[Tensor]:
        """Values of the first vector to start from."""
        ...

    def turn(self, first: Tensor) -> tuple[Tensor, Tensor, float]:
        """The best second vector for a first one, then the best first one for that, and the squared residual."""
        ...

    def coefficients(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        """The two vectors under the method's names, in a scale that training would have them in."""
        ...


@dataclass(frozen=True)
class Stop:
    """When the alternation ends.

    Attributes:
        turns: most turns of the two halves, after the one that chooses the start.
        tolerance: a turn that lowers the squared residual by a smaller share than this is the last.
    """

    turns: int = 100
    tolerance: float = 1e-6


@dataclass(frozen=True)
class Fit:
    """The nearest coefficients to one ΔW.

    Attributes:
        coefficients: by name, float32, as a file holds them.
        norm: ``‖ΔW‖``.
        distance: ``‖ΔW − ΔŴ‖`` with these coefficients.
        residuals: squared residual after each turn, which never rises.
    """

    coefficients: dict[str, Tensor]
    norm: float
    distance: float
    residuals: tuple[float, ...]

    @property
    def residual(self) -> float:
        """``‖ΔW − ΔŴ‖ / ‖ΔW‖``; 0 where ΔW is 0 and was met."""
        return relative(self.distance, self.norm)


@dataclass
class Bases:
    """Bases with their Gram matrices, made once for all matrices of one width.

    Attributes:
        sides: of NOLA, by method, width and side.
        whole: of PRANC, the last one: they are large.
    """

    sides: dict[tuple[Nola, int, bool], NolaSide] = field(default_factory=dict[tuple[Nola, int, bool], NolaSide])
    whole: tuple[Pranc, Site, PrancBasis] | None = None

    def nola(self, method: Nola, site: Site) -> NolaBasis:
        """Both sides of the basis of a matrix; only a basis that layers share is kept."""
        widths = ((site.in_features, True), (site.out_features, False))
        if not method.shares_basis:
            return NolaBasis(*(NolaSide.of(method, site.streams, width, down=down) for width, down in widths))
        for width, down in widths:
            if (method, width, down) not in self.sides:
                self.sides[method, width, down] = NolaSide.of(method, site.streams, width, down=down)
        return NolaBasis(*(self.sides[method, width, down] for width, down in widths))

    def pranc(self, method: Pranc, site: Site) -> PrancBasis:
        """The basis of a matrix; layers of one shape mostly follow each other."""
        if self.whole is None or self.whole[:2] != (method, site):
            self.whole = None  # before the next one is made
            self.whole = method, site, PrancBasis.of(method, site)
        return self.whole[2]


def relative(distance: float, norm: float) -> float:
    """A distance as a share of a norm; 0 of 0 is 0, anything else of 0 is infinite."""
    if norm > 0:
        return distance / norm
    return 0.0 if distance == 0 else float("inf")


def nearest(bound: Bound[Any], wanted: Factors, *, bases: Bases | None = None, stop: Stop | None = None) -> Fit:
    """The coefficients whose ΔŴ is nearest to a ΔW in the Frobenius norm: of PRANC, else as far as alternation finds.

    Args:
        bound: NOLA (6), VeRA (12) or PRANC (18) there.
        wanted: ``ΔW = up @ down`` in float64.
        bases: shared by the matrices of one adapter.
        stop: when to end.

    Raises:
        UnknownMethodError: the method is none of the three.
        HyperparameterError: its basis is too large for a fit.
    """
    stop = stop or Stop()
    problem = _problem(bound, wanted, bases or Bases())
    first, second, residuals = min((_run(problem, start, Stop(1, 0.0)) for start in problem.starts()), key=_last)
    first, second, more = _run(problem, first, stop) if stop.turns > 1 and problem.bilinear else (first, second, [])
    found = {name: values.float() for name, values in problem.coefficients(first, second).items()}
    reached = bound.delta(found).double().factors()
    return Fit(found, norm(wanted), distance(wanted, reached), (*residuals, *more))


def _problem(bound: Bound[Any], wanted: Factors, bases: Bases) -> Problem:
    method = bound.method
    if isinstance(method, Nola):
        return NolaProblem(method, bases.nola(method, bound.site), wanted)
    if isinstance(method, Vera):
        return VeraProblem(bound, wanted)
    if isinstance(method, Pranc):
        return PrancProblem(bases.pranc(method, bound.site), wanted)
    raise UnknownMethodError(
        f"the nearest coefficients are found for {', '.join(map(repr, NEAREST))}, got {method.name!r}; use one of "
        "these, or merge"
    )


def _run(problem: Problem, first: Tensor, stop: Stop) -> tuple[Tensor, Tensor, list[float]]:
    second, residuals = torch.empty(0), list[float]()
    for _ in range(stop.turns):
        new_first, new_second, residual = problem.turn(first)
        if residuals and residual > residuals[-1]:
            break
        first, second = new_first, new_second
        gain = residuals[-1] - residual if residuals else float("inf")
        residuals.append(residual)
        if gain <= stop.tolerance * residual or residual <= ROUNDING * problem.total:
            break
    return first, second, residuals


def _last(run: tuple[Tensor, Tensor, list[float]]) -> float:
    return run[2][-1]

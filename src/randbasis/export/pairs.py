"""MATRICES → PAIRS: the ΔW of one layer as a LoRA pair ``B A``: the method's own factors, or the nearest of a rank.

NOLA and VeRA are pairs of low rank already, math (6) and (12), and nothing is lost. The ΔW of RandLoRA and PRANC, math
(14) and (18), has full rank: the nearest pair of a rank is the truncated singular value decomposition (Eckart and
Young, 1936), and what it leaves out is told.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from randbasis.adapter_file import PackedAdapter, SpecMatrix
from randbasis.codes import narrowed
from randbasis.errors import ExportRankError
from randbasis.low_rank import distance, is_low_rank, norm, triangular
from randbasis.methods import Delta, Factors, Method
from randbasis.methods.method import RANK_LIMIT, check_positive
from randbasis.progress import Track

_SIDE = 2 * RANK_LIMIT
_Part = tuple[SpecMatrix, Delta]


@dataclass(frozen=True)
class LoraPair:
    """``ΔW ≈ up @ down`` of one layer, scaling included: LoRA's alpha is its rank.

    Attributes:
        name: path of the layer in the base model.
        up: LoRA's B, ``[out, rank]``; rows of zeros where no part of the layer is adapted.
        down: LoRA's A, ``[rank, in]``.
        norm: ``‖ΔW‖`` in the Frobenius norm.
        lost: ``‖ΔW − up @ down‖``, the rounding to the stored dtype included.
    """

    name: str
    up: Tensor
    down: Tensor
    norm: float
    lost: float

    @property
    def rank(self) -> int:
        """Inner dimension."""
        return self.down.shape[0]

    @property
    def error(self) -> float:
        """``‖ΔW − up @ down‖ / ‖ΔW‖``; 0 for ΔW = 0."""
        return self.lost / self.norm if self.norm else 0.0


def total_error(pairs: Iterable[LoraPair]) -> float:
    """The relative error of all layers together: of one long vector of all entries."""
    pairs = list(pairs)
    size = math.hypot(*(pair.norm for pair in pairs))
    return math.hypot(*(pair.lost for pair in pairs)) / size if size else 0.0


def lora_pairs(adapter: PackedAdapter, rank: int | None, dtype: torch.dtype, track: Track = iter) -> list[LoraPair]:
    """A pair for each adapted layer, made in float64 and stored in ``dtype``.

    The parts of a fused projection share one pair of the whole layer: B is a block of rows and columns for each part,
    the ranks of the parts add up, and nothing is lost.

    Args:
        adapter: matrices and coefficients.
        rank: largest rank of a pair. None takes the method's own factors, whose rank may be above the layer's sides.
        dtype: to store the pairs in.
        track: shows the progress over the layers.

    Raises:
        RankError: the rank is not a positive integer.
        ExportRankError: no rank is given and ΔW has full rank.
        PrecisionError: a factor does not fit the dtype.
    """
    layers: dict[str, list[_Part]] = {}
    for one, delta in adapter.matrices():
        layers.setdefault(one.name, []).append((one, delta))
    if rank is None:
        _check_own_rank(layers.values())
    else:
        check_positive("rank", rank)
    return [_pair(name, layers[name], rank, dtype) for name in track(list(layers))]


def truncated(change: Factors, rank: int) -> Factors:
    """The nearest ``ΔW`` of a rank, in the Frobenius norm; ``down`` has orthonormal rows or ``up`` such columns.

    ΔW is projected on its leading singular vectors of the smaller side, the eigenvectors of its Gram matrix: with as
    many as that side has, nothing is lost.

    Args:
        change: ``[out, q]`` and ``[q, in]``.
        rank: above 0; more than the smaller side of ΔW counts as that.
    """
    if is_low_rank(change) and change.up is not None:
        (left, r), (right, s) = triangular(change.up), triangular(change.down.T)
        core = truncated(Factors(None, r @ s.T), rank)
        return Factors(left @ cast("Tensor", core.up), core.down @ right.T)
    delta = change.matrix()
    if delta.shape[0] < delta.shape[1]:
        vectors = _leading(delta @ delta.T, rank)
        return Factors(vectors, vectors.T @ delta)
    vectors = _leading(delta.T @ delta, rank)
    return Factors(delta @ vectors, vectors.T)


def _leading(gram: Tensor, count: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, ``[n, count]``, largest first."""
    eigh = cast("Callable[[Tensor], tuple[Tensor, Tensor]]", torch.linalg.eigh)
    return eigh(gram)[1].flip(1)[:, :count]


def _check_own_rank(layers: Iterable[Sequence[_Part]]) -> None:
    for parts in layers:
        method = parts[0][0].method
        if _has_full_rank(method):
            exact = max(min(sum(one.rows for one, *_ in layer), layer[0][0].in_features) for layer in layers)
            raise ExportRankError(
                f"rank must be given for {method.name}, whose ΔW has full rank, got none: a LoRA of lower rank is only "
                f"the nearest one; say rank=16, for example, and read the relative error, or rank={exact}, which loses "
                "nothing but rounding"
            )


def _has_full_rank(method: Method) -> bool:
    """Whether the rank of ΔW grows with the matrix instead of being chosen."""
    return method.rank(_SIDE, _SIDE) >= _SIDE


def _pair(name: str, parts: Sequence[_Part], rank: int | None, dtype: torch.dtype) -> LoraPair:
    with torch.no_grad():
        change = _layer_change(parts)
        own = change.up is not None and not any(_has_full_rank(one.method) for one, *_ in parts)
        kept = rank is None or (own and rank >= change.down.shape[0])
        chosen = change if kept else truncated(change, cast("int", rank))
        stored = Factors(_narrowed(name, cast("Tensor", chosen.up), dtype), _narrowed(name, chosen.down, dtype))
        size, lost = norm(change), distance(change, _widened(stored))
    up, down = cast("Tensor", stored.up), stored.down
    whole = up.new_zeros(parts[0][0].out_features, up.shape[1])
    for (one, *_), block in zip(parts, _split(up, [one.rows for one, *_ in parts]), strict=True):
        whole[one.start : one.start + one.rows] = block
    return LoraPair(name, whole, down.contiguous(), size, lost)


def _layer_change(parts: Sequence[_Part]) -> Factors:
    """The rows of ΔW of all parts of a layer, in float64."""
    changes: list[Factors] = []
    for one, delta in parts:
        wide = delta.double()
        changes.append(Factors(None, wide.matrix()) if _has_full_rank(one.method) else wide.factors())
    if any(change.up is None for change in changes):
        return Factors(None, torch.cat([change.matrix() for change in changes]))
    block_diag = cast("Callable[..., Tensor]", torch.block_diag)
    up = block_diag(*(cast("Tensor", change.up) for change in changes))
    return Factors(up, torch.cat([change.down for change in changes]))


def _narrowed(name: str, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return narrowed(factor, dtype, f"{name}: factors", "use float32 or bfloat16")


def _widened(stored: Factors) -> Factors:
    return Factors(cast("Tensor", stored.up).double(), stored.down.double())


def _split(tensor: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    return iter(cast("Callable[[Tensor, list[int]], tuple[Tensor, ...]]", torch.split)(tensor, sizes))

"""LoRA-XS, Bałazy et al., 2024, arXiv 2405.17604: math (25)-(26)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from randbasis.methods.bound import Bound, Coefficients, Factors, Site, matmul_rows
from randbasis.methods.method import Method, check_finite, check_positive
from randbasis.ops import Derived, derive


@dataclass(frozen=True, kw_only=True)
class LoraXs(Method):
    """``ΔW = (alpha / r) · U R Σ Vᵀ`` with the leading singular vectors and values of the base weight, math (25).

    Seed and law decide nothing of ΔW, and are compared all the same, as those of every method; from the seed comes the
    noise of ``init_weights=False``.

    Attributes:
        r: singular vectors; a matrix with a smaller side has as many as that.
        alpha: numerator of the scaling ``alpha / r``.
    """

    name: ClassVar[str] = "loraxs"
    roles: ClassVar[tuple[str, ...]] = ()
    needs_base: ClassVar[bool] = True

    r: int
    alpha: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        check_finite("alpha", self.alpha)

    def coefficient_shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """``R``, whatever the shape of the matrix, math (26)."""
        q = self.rank(out_features, in_features)
        return {"loraxs_r": (q, q)}

    def starts(self, out_features: int, in_features: int) -> dict[str, float]:
        """0, so ΔW = 0; ΔW is linear in R, so all of it has a gradient. The authors draw R with deviation 1e-5."""
        return {"loraxs_r": 0.0}

    def rank(self, out_features: int, in_features: int) -> int:
        """``r``, or the smaller side of the matrix."""
        return min(self.r, out_features, in_features)

    def bind(self, site: Site, weight: Tensor | None = None) -> "BoundLoraXs":
        """See :class:`BoundLoraXs`."""
        derived = None
        if weight is not None and not weight.is_meta:
            rank = self.rank(site.out_features, site.in_features)
            derived = derive(leading_triplets, (rank,), weight, self.basis_storage)
        return BoundLoraXs(self, site, derived)


class BoundLoraXs(Bound[LoraXs]):
    """``U`` is out × r, ``Σ Vᵀ`` r × in: Σ stands on the side of the input, as in the authors' code."""

    def __init__(self, method: LoraXs, site: Site, derived: Derived | None = None) -> None:
        super().__init__(method, site, derived=derived)
        self._scale = method.alpha / method.r

    def factors(self, coefficients: Coefficients) -> Factors:
        """``U (R · alpha / r)`` of ``[..., out, r]`` and the frozen ``Σ Vᵀ`` of ``[..., r, in]``."""
        r = coefficients["loraxs_r"]
        left, right = self.of_base(r.dtype, r.device)
        return Factors(left @ (self._scale * r), right.expand(*r.shape[:-2], *right.shape))

    def apply(self, x: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        """``U (R (Σ Vᵀ x))`` by row, math (27): two shared products, whatever the number of adapters."""
        left, right = self.of_base(x.dtype, x.device)
        core = (self._scale * prepared["loraxs_r"]).to(x.dtype)
        return linear(matmul_rows(linear(x, right), core), left)


def leading_triplets(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``U`` of ``[out, rank]`` and ``Σ Vᵀ`` of ``[rank, in]``, the largest singular values first, math (25).

    Of the two signs that a pair of vectors may have, it is the one by which the entry of largest modulus in its left
    vector (the first of equals) is positive.

    Args:
        weight: ``[out, in]``.
        rank: at most the smaller side.
    """
    svd = cast("Callable[..., tuple[Tensor, Tensor, Tensor]]", torch.linalg.svd)
    u, values, v = svd(weight, full_matrices=False)
    left, right = u[:, :rank], values[:rank].unsqueeze(1) * v[:rank]
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(left.dtype)
    return (left * signs).contiguous(), (right * signs.T).contiguous()

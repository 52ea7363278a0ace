"""The arithmetic of LoRA-XS, math (27)-(29)."""

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from randbasis.methods.bound import Bound, Coefficients, Factors, Site, matmul_rows
from randbasis.methods.loraxs import LoraXs
from randbasis.ops import Derived, derive


class BoundLoraXs(Bound[LoraXs]):
    """``U`` is out × r, ``Σ Vᵀ`` r × in: Σ stands on the side of the input, as in the authors' code."""

    def __init__(self, method: LoraXs, site: Site, derived: Derived | None = None) -> None:
        super().__init__(method, site, derived=derived)
        self._scale = method.alpha / method.r

    @classmethod
    def at(cls, method: LoraXs, site: Site, weight: Tensor | None) -> "BoundLoraXs":
        """With the frozen matrices of that weight, where it is there."""
        if weight is None or weight.is_meta:
            return cls(method, site)
        rank = method.rank(site.out_features, site.in_features)
        return cls(method, site, derive(leading_triplets, (rank,), weight, method.basis_storage))

    def factors(self, coefficients: Coefficients) -> Factors:
        """``U (R · alpha / r)`` of ``[..., out, r]`` and the frozen ``Σ Vᵀ`` of ``[..., r, in]``."""
        r = coefficients["loraxs_r"]
        left, right = self.of_base(r.dtype, r.device)
        return Factors(left @ (self._scale * r), right.expand(*r.shape[:-2], *right.shape))

    def apply(self, x: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        """``U (R (Σ Vᵀ x))`` by row, math (29): two shared products, whatever the number of adapters."""
        left, right = self.of_base(x.dtype, x.device)
        core = (self._scale * prepared["loraxs_r"]).to(x.dtype)
        return linear(matmul_rows(linear(x, right), core), left)


def leading_triplets(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``U`` of ``[out, rank]`` and ``Σ Vᵀ`` of ``[rank, in]``, the largest singular values first, math (27).

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

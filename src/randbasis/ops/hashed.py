"""Sums of disjoint matrices, math (25), in torch's own operations: what transforms see."""

import torch
from torch import Tensor

from randbasis.basis import hashed_terms
from randbasis.errors import BasisShapeError
from randbasis.ops import backends
from randbasis.ops.storage import Stored
from randbasis.ops.transforms import outside


def gathered(coefficients: Tensor, stored: Stored) -> Tensor:
    """:func:`randbasis.ops.combine` of a disjoint slab.

    Args:
        coefficients: ``[..., count]``.
        stored: the slab, and how its words are kept.

    Raises:
        BasisShapeError: the coefficients do not end in ``count``.
    """
    slab = stored.slab
    if coefficients.shape[-1] != slab.count:
        raise BasisShapeError(f"coefficients must end in {slab.count}, got {list(coefficients.shape)}; reshape them")
    owner, sign = _terms(stored, coefficients)
    # The gradient is added up in the dtype of what is gathered.
    exact = coefficients.to(torch.promote_types(coefficients.dtype, torch.float32))
    out = (exact.index_select(-1, owner) * sign).to(coefficients.dtype)
    return out.view(*coefficients.shape[:-1], slab.rows, slab.cols)


def segment_sums(vectors: Tensor, stored: Stored) -> Tensor:
    """:func:`randbasis.ops.inner` of a disjoint slab.

    Args:
        vectors: ``[..., rows, cols]``.
        stored: the slab, and how its words are kept.

    Raises:
        BasisShapeError: the vectors do not end in ``rows, cols``.
    """
    slab = stored.slab
    if vectors.shape[-2:] != (slab.rows, slab.cols):
        raise BasisShapeError(f"vectors must end in {slab.rows, slab.cols}, got {list(vectors.shape)}; reshape them")
    owner, sign = _terms(stored, vectors)
    exact = vectors.to(torch.promote_types(vectors.dtype, torch.float32)).flatten(-2) * sign
    return exact.new_zeros(*vectors.shape[:-2], slab.count).index_add(-1, owner, exact).to(vectors.dtype)


def _terms(stored: Stored, like: Tensor) -> tuple[Tensor, Tensor]:
    """Whose each place of a disjoint slab is, int64 ``[rows * cols]``, and its sign in a floating dtype."""
    slab, packed = stored.slab, stored.packed(like.device)
    with outside():
        raw = backends.words(slab, like.device) if packed is None else packed
        owner, sign = hashed_terms(raw[0, :, : slab.cols], slab.basis.law)
        return owner.flatten(), sign.flatten().to(torch.promote_types(like.dtype, torch.float32))

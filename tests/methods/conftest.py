"""Matrices of the test's choice in place of frozen ones."""

from collections.abc import Callable, Iterator

import pytest
from torch import Tensor

from randbasis.methods import Matrix, Method
from randbasis.ops import Stored, hold


@pytest.fixture
def inject() -> Iterator[Callable[..., None]]:
    """Put matrices of the caller's choice where a method finds its frozen ones.

    The method must have the sign law, so that its entries are its unit-variance basis, and dense storage.
    """
    kept: list[Stored] = []

    def put(method: Method, matrix: Matrix, *tensors: Tensor) -> None:
        assert method.law == "sign"
        assert method.basis_storage == "dense"
        for slab, tensor in zip(method.slabs(matrix), tensors, strict=True):
            assert tensor.shape == (slab.count, slab.rows, slab.cols)
            stored = hold(slab, "dense")
            stored._tensors[tensor.device, tensor.dtype] = tensor
            kept.append(stored)

    yield put
    kept.clear()

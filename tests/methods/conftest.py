"""Matrices of the test's choice in place of frozen ones."""

from collections.abc import Callable, Iterator

import pytest
from torch import Tensor

from randbasis.methods import Method, Site
from randbasis.ops import Stored


@pytest.fixture
def inject() -> Iterator[Callable[..., None]]:
    """Put matrices of the caller's choice where a method finds its frozen ones.

    The method must have the sign law, so that its entries are its unit-variance basis, and dense storage.
    """
    kept: list[Stored] = []

    def put(method: Method, site: Site, *tensors: Tensor) -> None:
        assert method.law == "sign"
        assert method.basis_storage == "dense"
        for stored, tensor in zip(method.bind(site).bases, tensors, strict=True):
            assert tensor.shape == (stored.slab.count, stored.slab.rows, stored.slab.cols)
            stored._tensors[tensor.device, tensor.dtype] = tensor
            kept.append(stored)

    yield put
    kept.clear()

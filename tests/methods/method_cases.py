"""The makers: every method in every shape of its own.

A new method is tested by adding its makers to :data:`MAKERS`.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from randbasis.methods import Bound, Coefficients, LoraXs, Method, Nola, Pranc, RandLora, Site, Vera


@dataclass(frozen=True)
class Maker:
    """One method with hyper-parameters that matter, on a matrix of a shape that matters."""

    make: type[Method]
    options: dict[str, Any]
    out: int
    in_: int

    def method(self, **more: Any) -> Method:
        return self.make(**{"seed": 2**35 + 3, **self.options, **more})

    def site(self, method: Method) -> Site:
        return Site(self.out, self.in_, method.streams("blocks.3.attention"))

    def weight(self, seed: int = 3) -> Tensor:
        """The base weight, for a method that needs it."""
        return draw(self.out, self.in_, seed=seed).float()

    def bind(self, method: Method, site: Site | None = None) -> Bound[Any]:
        """The method on the matrix, its base weight at hand."""
        return method.bind(self.site(method) if site is None else site, self.weight())


MAKERS = {
    "nola": Maker(Nola, {"r": 3, "num_basis": 5, "alpha": 6.0}, 6, 4),
    "nola k≠l": Maker(Nola, {"r": 2, "num_basis": 7, "num_basis_b": 3, "alpha": 5.0}, 4, 9),
    "nola plain": Maker(Nola, {"r": 2, "num_basis": 4, "alpha": 8.0, "parametrization": "plain"}, 5, 7),
    "nola unique": Maker(Nola, {"r": 2, "num_basis": 4, "alpha": 8.0, "share_basis": False}, 5, 7),
    "nola r>in": Maker(
        Nola, {"r": 9, "num_basis": 2, "num_basis_b": 3, "alpha": 1.0, "parametrization": "plain"}, 3, 4
    ),
    "vera": Maker(Vera, {"r": 3}, 5, 7),
    "vera r>width": Maker(Vera, {"r": 11, "d_initial": 0.5}, 6, 4),
    "randlora": Maker(RandLora, {"r": 2}, 7, 4),
    "randlora square": Maker(RandLora, {"r": 3}, 6, 6),
    "randlora transposed": Maker(RandLora, {"r": 2, "scaling": "paper"}, 4, 7),
    "randlora ragged": Maker(RandLora, {"r": 3, "alpha": 9.0}, 7, 5),
    "randlora ragged transposed": Maker(RandLora, {"r": 4}, 5, 6),
    "randlora r>min": Maker(RandLora, {"r": 6}, 3, 5),
    "pranc": Maker(Pranc, {"num_basis": 5}, 4, 6),
    "pranc unique": Maker(Pranc, {"num_basis": 3, "share_basis": False}, 5, 3),
    "loraxs": Maker(LoraXs, {"r": 3, "alpha": 6.0}, 7, 5),
    "loraxs wide": Maker(LoraXs, {"r": 2, "alpha": 2.0}, 4, 9),
    "loraxs r>min": Maker(LoraXs, {"r": 8, "alpha": 4.0}, 6, 3),
}
LAWS = ("sign", "uniform", "normal", "sparse(3)")
#: Every maker with every law that its method takes: the hashed one wants a sum of matrices.
OF_LAWS = pytest.mark.parametrize(
    ("maker", "law"),
    [
        pytest.param(maker, law, id=f"{name}-{law}")
        for name, maker in MAKERS.items()
        for law in (*LAWS, *(["hashed"] if maker.make.sums_its_basis else []))
    ],
)
STORAGES = ("auto", "packed", "dense", "recompute")


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64, the same in every run."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def trained(method: Method, site: Site, *batch: int, seed: int = 0) -> dict[str, Tensor]:
    """Coefficients as if trained: their starts and some noise, with leading batch dimensions."""
    out, in_ = site.out_features, site.in_features
    starts = method.starts(out, in_)
    return {
        name: starts[name] + 0.3 * draw(*batch, *shape, seed=seed + place)
        for place, (name, shape) in enumerate(method.coefficient_shapes(out, in_).items())
    }


def leaves(coefficients: Coefficients) -> dict[str, Tensor]:
    """The same numbers, ready to be differentiated by."""
    return {name: value.detach().clone().requires_grad_() for name, value in coefficients.items()}

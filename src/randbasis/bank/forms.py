"""In which form the rows of a batch take their adapters: coefficients, math (21)-(23), or factors, math (24).

A form makes tensors of the coefficients of some adapters, and shows any such tensors as what each adapted matrix needs.
All layers are made in one call for each sum that they share.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from randbasis.adapter_file import Spec
from randbasis.methods import Bound, WeightedSum

View = Mapping[str, Tensor]
"""What one matrix needs of the adapter of each row, ``[rows or 1, …]`` by name."""
FormName = Literal["coefficients", "factors"]


class Form(ABC):
    """How adapters of one profile are there for a batch.

    Attributes:
        name: of the form.
        kept: whether making it of coefficients costs enough to be kept from one batch to the next.
        axis: the dimension of its tensors that has the adapters.
    """

    name: ClassVar[FormName]
    kept: ClassVar[bool]
    axis: ClassVar[int]

    @abstractmethod
    def make(self, coefficients: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Of the coefficients ``[adapters, count]`` float32 of whole adapters, tensors with a dimension of adapters.

        Args:
            coefficients: on the device of the model.
            dtype: that the model computes in.
        """

    @abstractmethod
    def views(self, tensors: Sequence[Tensor]) -> list[View]:
        """What each matrix needs, in the order of the spec: views of the tensors of :meth:`make`."""

    @abstractmethod
    def apply(self, bound: Bound[Any], x: Tensor, view: View) -> Tensor:
        """``ΔW x`` of each row, ``[rows, tokens, out]`` of ``[rows, tokens, in]``."""

    @abstractmethod
    def row_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one adapter in this form."""


class CoefficientForm(Form):
    """The coefficients themselves: what is large is the same for all rows, math (21)-(23)."""

    name = "coefficients"
    kept = False
    axis = 0

    def __init__(self, spec: Spec) -> None:
        self._matrices = list(zip(spec.matrices, spec.starts, strict=True))
        self._count = spec.count

    def make(self, coefficients: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The coefficients, as they are: methods round them where they must."""
        return (coefficients,)

    def views(self, tensors: Sequence[Tensor]) -> list[View]:
        """Slices of the row: the same ones for matrices that share their coefficients."""
        (flat,) = tensors
        return [one.coefficients(flat, start) for one, start in self._matrices]

    def apply(self, bound: Bound[Any], x: Tensor, view: View) -> Tensor:
        """Math (21), (22) or (23)."""
        return bound.apply_shared(x, view)

    def row_bytes(self, dtype: torch.dtype) -> int:
        """Four a coefficient."""
        return 4 * self._count


class _SumOfMany:
    """The same sum for several matrices: their columns of a row, and where each matrix is among them."""

    def __init__(self, wanted: WeightedSum) -> None:
        self.wanted = wanted
        self.columns: list[range] = []
        self._index: Tensor | None = None

    def of(self, coefficients: Tensor) -> Tensor:
        """``[matrices, adapters, rows, cols]`` of ``[adapters, count]``."""
        if self._index is None or self._index.device != coefficients.device:
            self._index = torch.tensor([list(one) for one in self.columns], device=coefficients.device)
        mine = coefficients[:, self._index].transpose(0, 1)
        made = self.wanted.of(mine.flatten(0, 1))
        return made.view(*mine.shape[:2], *made.shape[-2:])


class FactorForm(Form):
    """Factors of rank r, or ΔW itself, made once an adapter: a batched product by row, math (24)."""

    name = "factors"
    kept = True
    # So the adapters of one matrix lie side by side: a batched product reads them 1.5 times as fast as strides apart
    # (32 of r=8 and 512 columns, one thread, 2026-11-27).
    axis = 1

    def __init__(self, spec: Spec, bounds: Sequence[Bound[Any]]) -> None:
        self._bounds = bounds
        alike: dict[WeightedSum, int] = {}
        self._sums: list[_SumOfMany] = []
        self._places: list[list[tuple[int, int]]] = []
        for one, bound, start in zip(spec.matrices, bounds, spec.starts, strict=True):
            places: list[tuple[int, int]] = []
            for name, wanted in bound.sums.items():
                (size,) = one.shapes[name]
                at = alike.setdefault(wanted, len(self._sums))
                if at == len(self._sums):
                    self._sums.append(_SumOfMany(wanted))
                places.append((at, len(self._sums[at].columns)))
                self._sums[at].columns.append(range(start, start + size))
                start += size
            self._places.append(places)

    @property
    def numbers(self) -> int:
        """Entries of one adapter."""
        slabs = [(one.wanted.basis.slab, len(one.columns)) for one in self._sums]
        return sum(slab.rows * slab.cols * matrices for slab, matrices in slabs)

    @property
    def work(self) -> int:
        """Multiply-adds that make one adapter."""
        slabs = [(one.wanted.basis.slab, len(one.columns)) for one in self._sums]
        return sum(slab.summands * slab.rows * slab.cols * matrices for slab, matrices in slabs)

    def make(self, coefficients: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """One call for each sum that matrices share."""
        return tuple([one.of(coefficients).to(dtype) for one in self._sums])

    def views(self, tensors: Sequence[Tensor]) -> list[View]:
        """The factors of each matrix."""
        split = cast("Callable[[Tensor, int], tuple[Tensor, ...]]", torch.unbind)
        layers = [split(one, 0) for one in tensors]
        return [
            bound.prepared(bound.factors_of([layers[at][place] for at, place in places]))
            for bound, places in zip(self._bounds, self._places, strict=True)
        ]

    def apply(self, bound: Bound[Any], x: Tensor, view: View) -> Tensor:
        """Math (24)."""
        return bound.apply(x, view)

    def row_bytes(self, dtype: torch.dtype) -> int:
        """Of all sums."""
        return self.numbers * dtype.itemsize

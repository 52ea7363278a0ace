"""ADAPTER → ΔW OF EACH LAYER, in float64 and as factors where the rank is low, whatever made it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch

from randbasis.adapter_file import PackedAdapter, SpecMatrix
from randbasis.adapters.packed import exact
from randbasis.adapters.saved import AdapterLocation, open_adapter
from randbasis.importing import PeftAdapter, read_peft_adapter
from randbasis.methods import Delta, Factors
from randbasis.tuner.registration import TYPE_NAME
from randbasis.tuner.saved_files import natural_order

_Part = tuple[SpecMatrix, Delta]


class Changes(ABC):
    """The ΔW of an adapter, layer by layer.

    Attributes:
        method: what made them.
    """

    method: str

    @property
    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Layer → ``(out, in)``, layers in their order."""

    @abstractmethod
    def change(self, key: str) -> Factors:
        """``ΔW`` of a layer, rows of zeros where no part of it is adapted."""


class OurChanges(Changes):
    """Those of an adapter of this package.

    Args:
        packed: the adapter.
    """

    def __init__(self, packed: PackedAdapter) -> None:
        self.packed, self.method = packed, packed.spec.method.name
        self._parts: dict[str, list[_Part]] = {}
        for one, delta in packed.matrices():
            self._parts.setdefault(one.name, []).append((one, delta))

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """As the spec has them."""
        return {key: self.packed.spec.shapes[key] for key in sorted(self._parts, key=natural_order)}

    def change(self, key: str) -> Factors:
        """The parts of a fused projection together, each in its rows."""
        return joined_parts(self._parts[key])


class PeftChanges(Changes):
    """Those of a LoRA, VeRA or RandLoRA of PEFT.

    Args:
        found: the adapter.
    """

    def __init__(self, found: PeftAdapter) -> None:
        self.found, self.method = found, f"PEFT's {found.kind}"

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """As the tensors, or the base model, have them."""
        return {key: self.found.shape(key) for key in self.found.layers}

    def change(self, key: str) -> Factors:
        """As PEFT forms it."""
        return self.found.factors(key)


def read_changes(adapter: AdapterLocation, model: str | None = None) -> Changes:
    """Read an adapter of this package, or a LoRA, VeRA or RandLoRA of PEFT.

    Args:
        adapter: where it is: see :func:`randbasis.adapters.saved.open_adapter`.
        model: folder or hub name of the base, of which only the configuration is read; needed where an adapter does not
            tell the shapes of its layers.

    Raises:
        RandbasisError: there is no such adapter, or a file of it is damaged; each rule has its class.
    """
    found = open_adapter(adapter)
    if found.kind != TYPE_NAME and not found.is_head:
        return PeftChanges(read_peft_adapter(found, model))
    return OurChanges(read_packed(found, model))


def read_packed(adapter: AdapterLocation, model: str | None = None) -> PackedAdapter:
    """An adapter of this package, with the coefficients as they are stored.

    Args:
        adapter: as for :func:`read_changes`.
        model: as for :func:`read_changes`.

    Raises:
        RandbasisError: there is no such adapter, or a file of it is damaged; each rule has its class.
    """
    found = open_adapter(adapter).ours()
    name = found.config.base_model_name_or_path
    return exact(found, model=model, base_name=Path(name).name if name else None)


def joined_parts(parts: Sequence[_Part]) -> Factors:
    """The ΔW of one layer from the matrices that are its parts.

    Args:
        parts: each with its ΔW.
    """
    out, in_ = parts[0][0].out_features, parts[0][0].in_features
    blocks: list[tuple[SpecMatrix, Factors]] = []
    for one, delta in parts:
        wide, low = delta.double(), delta.bound.rank < min(one.rows, in_)
        blocks.append((one, wide.factors() if low else Factors(None, wide.matrix())))
    if any(change.up is None for _, change in blocks):
        whole = torch.zeros(out, in_, dtype=torch.float64)
        for one, change in blocks:
            whole[one.start : one.start + one.rows] = change.matrix()
        return Factors(None, whole)
    ups: list[torch.Tensor] = []
    for one, change in blocks:
        assert change.up is not None
        up = change.up.new_zeros(out, change.up.shape[1])
        up[one.start : one.start + one.rows] = change.up
        ups.append(up)
    return Factors(torch.cat(ups, 1), torch.cat([change.down for _, change in blocks]))

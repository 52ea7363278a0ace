"""Mixed batches: which adapter each row uses travels with the call, in the thread that makes it.

Nothing is set on the modules, so two threads may send batches through one model. A layer finds the rows in its input by
their number; where two dimensions have that number and the model is not known to keep rows first, it refuses.
"""

import threading
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from randbasis.batch_rows import BASE, TOKENS_FIRST
from randbasis.errors import AdapterNameError
from randbasis.tuner.adapted_part import AdaptedPart

Layout = Literal["rows first", "either", "unknown"]
"""Where the layers of a model have the rows of a batch: in dimension 0, some in 0 and some in 1, or nobody knows."""


def layout_of(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> Layout:
    """Where the layers of a model have the rows: known for the architectures of transformers, and for no others.

    Args:
        model: which.
        modules: all of its modules, for whoever has walked through them.
    """
    if not isinstance(model, PreTrainedModel):
        return "unknown"
    everything = model.modules() if modules is None else modules
    parts = [module for module in everything if isinstance(module, PreTrainedModel)]
    if any(not type(part).__module__.startswith("transformers.models.") for part in parts):
        return "unknown"
    return "either" if any(part.config.model_type in TOKENS_FIRST for part in parts) else "rows first"


@dataclass(slots=True)
class MixedBatch:
    """One call with a name for each row.

    Attributes:
        names: the adapter of each row.
        repeats: rows that generation makes of each (beams, returned sequences), one after the other.
        layout: where the layers have the rows.
        modules: ids of the modules that it is for.
        reached: whether one of them was called in the thread of the call.
    """

    names: tuple[str, ...]
    repeats: int
    layout: Layout
    modules: frozenset[int]
    reached: bool = field(default=False)
    _distinct: tuple[str, ...] | None = field(default=None)

    @property
    def distinct(self) -> tuple[str, ...]:
        """The adapters among the names; every layer asks."""
        if self._distinct is None:
            self._distinct = tuple(name for name in dict.fromkeys(self.names) if name != BASE)
        return self._distinct

    def rows_of(self, x: Tensor, dimensions: int) -> tuple[int, list[str]]:
        """The dimension of ``x`` that has the rows, and the adapter of each.

        Args:
            x: the input of a module.
            dimensions: how many of its leading dimensions may have them: all but that of the features.

        Raises:
            AdapterNameError: no dimension has as many entries as there are rows, or it cannot be known which.
        """
        self.reached = True
        sizes = {len(self.names), len(self.names) * self.repeats}
        fits = [dimension for dimension in range(min(2, dimensions)) if x.shape[dimension] in sizes]
        if self.layout == "rows first":
            fits = fits[:1] if 0 in fits else []
        elif self.layout == "unknown" and fits == [1]:
            fits = []
        if not fits:
            raise AdapterNameError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(self.names)} and {x.shape[0]} respectively; give one name for each row of the batch, and leave "
                "layers that see no rows out of target_modules"
            )
        if len(fits) == 2:
            raise AdapterNameError(
                f"adapter_names needs one dimension of {len(self.names)} rows, got an input {list(x.shape)} in a model "
                "of which it is not known whether rows or tokens come first; make their numbers differ: pad the "
                "tokens by one, or add a row with the name '__base__'"
            )
        (dimension,) = fits
        times = x.shape[dimension] // len(self.names)
        return dimension, [name for name in self.names for _ in range(times)]


_THREAD = threading.local()  # not a context variable, which torch's compiler cannot read


def batch_of(module: nn.Module) -> MixedBatch | None:
    """The mixed batch that this thread is sending through a module; None for any other pass."""
    calls = cast("tuple[MixedBatch, ...]", getattr(_THREAD, "calls", ()))
    for call in reversed(calls):
        if id(module) in call.modules:
            return call
    return None


@contextmanager
def sending(batch: MixedBatch) -> Generator[None]:
    """A block in which the modules of a batch see its names, in this thread alone.

    Raises:
        AdapterNameError: after the block, when no module of the batch was called in it: names had no effect.
    """
    before = cast("tuple[MixedBatch, ...]", getattr(_THREAD, "calls", ()))
    _THREAD.calls = (*before, batch)
    try:
        yield
    finally:
        _THREAD.calls = before
    if not batch.reached:
        raise AdapterNameError(
            "adapter_names must reach an adapted layer in the thread of the call, got a call in which none ran there, "
            "so the result does not depend on the names; call the model in every thread of its own, with the names of "
            "its rows (torch.nn.DataParallel around the adapted model and not inside of it)"
        )


def pass_names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward pre-hook that gives PEFT's wrappers of whole modules the names of the rows of this thread's batch."""
    batch = batch_of(module)
    if batch is None or not args:
        return None
    x = cast("Tensor", args[0])
    floating = x.is_floating_point()
    dimension, names = batch.rows_of(x, x.dim() - 1 if floating else x.dim())
    if dimension != 0:
        raise AdapterNameError(
            f"modules_to_save take rows in dimension 0 in a mixed batch, got an input {list(x.shape)} with its rows in "
            f"dimension {dimension}; send one batch for each adapter"
        )
    return args, {**kwargs, "adapter_names": names}


@dataclass(frozen=True)
class BatchGroup:
    """The rows of a batch that one product serves: adapters with the same method, basis and part.

    Attributes:
        like: what they have in common.
        own: the part of each distinct adapter, which tells where its coefficients lie.
        names: the distinct adapters.
        rows: the rows of the batch that use one of them.
        slots: for each of these rows, the index of its adapter in ``names``.
    """

    like: AdaptedPart
    own: list[AdaptedPart]
    names: list[str]
    rows: list[int]
    slots: list[int]


def batch_groups(adapter_names: Sequence[str], parts: Callable[[str], Sequence[AdaptedPart]]) -> list[BatchGroup]:
    """Group the rows of a batch by what one batched product can serve.

    Args:
        adapter_names: one name for each row; :data:`BASE` rows are in no group.
        parts: those of an adapter on this layer.
    """
    groups: dict[Hashable, tuple[list[AdaptedPart], list[str]]] = {}
    for name in dict.fromkeys(adapter_names):
        if name == BASE:
            continue
        for one in parts(name):
            own, names = groups.setdefault((one.bound, one.part), ([], []))
            own.append(one)
            names.append(name)
    result: list[BatchGroup] = []
    for own, names in groups.values():
        slot_of = {name: slot for slot, name in enumerate(names)}
        rows = [row for row, name in enumerate(adapter_names) if name in slot_of]
        result.append(BatchGroup(own[0], own, names, rows, [slot_of[adapter_names[row]] for row in rows]))
    return result

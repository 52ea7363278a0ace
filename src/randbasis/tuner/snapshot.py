"""What some tensors held at one time: whether that still stands decides whether anything made of them may be used.

A version counter does not tell: writes through ``tensor.data``, fused optimizers and other processes leave it alone. On
a CPU the values themselves are compared, at the price of reading them. On any other device a comparison would wait for
the device, so there version, address and the steps of optimizers must do, and whoever keeps something limits it to a
time in which nobody is expected to write: a step of decoding one token further.
"""

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from randbasis.ops import traced, transformed


class _OptimizerSteps:
    """Counts the steps of all optimizers: fused ones change parameters without moving their version counters."""

    def __init__(self) -> None:
        self.taken = 0
        register_optimizer_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.taken += 1


_STEPS = _OptimizerSteps()


class _Values:
    """The bytes of one tensor on a CPU."""

    __slots__ = ("address", "dtype", "memory", "shape", "tensor", "values")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.shape = tensor.shape
        self.dtype = tensor.dtype
        self.address = tensor.data_ptr()
        # A view that keeps this memory from being given to another tensor: an address is enough to know it again.
        self.memory = tensor.detach().view(torch.uint8).numpy()
        self.values = self.memory.tobytes()

    def stands(self) -> bool:
        tensor = self.tensor
        return (
            tensor.data_ptr() == self.address
            and tensor.shape == self.shape
            and tensor.dtype is self.dtype
            and tensor.is_contiguous()
            and self.memory.tobytes() == self.values
        )

    def is_of(self, tensor: Tensor) -> bool:
        if tensor is self.tensor:
            return self.stands()
        return (
            _kind(tensor) is _Values
            and tensor.dtype is self.dtype
            and tensor.shape == self.shape
            and _Values(tensor).values == self.values
        )


class Version:
    """The version of one tensor on a device that must not be waited for."""

    __slots__ = ("address", "steps", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.address = tensor.data_ptr()
        self.version = tensor._version
        self.steps = _STEPS.taken

    def stands(self) -> bool:
        """Whether nothing is known to have been written to it."""
        tensor = self.tensor
        return tensor._version == self.version and tensor.data_ptr() == self.address and _STEPS.taken == self.steps

    def is_of(self, tensor: Tensor) -> bool:
        """Whether a tensor is the same one, and stands."""
        return tensor is self.tensor and self.stands()


def _kind(tensor: Tensor) -> type[_Values] | type[Version] | None:
    """How changes of a tensor are seen; None where they cannot be."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
        return None
    if tensor.device.type != "cpu":
        return None if tensor.is_inference() else Version
    return _Values if tensor.dim() and tensor.is_contiguous() else None


def watched(tensors: Iterable[Tensor]) -> Literal["by value", "by version"] | None:
    """How changes of some tensors are seen; None where they cannot be, or where numbers are symbols.

    That is while a compiler or torch.jit.trace looks on, inside of a transform of torch.func, and for tensors that are
    views in another order, subclasses or without data.
    """
    if torch.compiler.is_compiling() or traced() or transformed():
        return None
    kinds = {_kind(tensor) for tensor in tensors}
    if None in kinds:
        return None
    return "by version" if Version in kinds else "by value"


class Snapshot:
    """What some tensors hold now; :meth:`of` makes one."""

    __slots__ = ("by_value", "seen")

    def __init__(self, seen: Sequence[_Values | Version]) -> None:
        self.seen = seen
        self.by_value = all(isinstance(one, _Values) for one in seen)
        """Whether every change is seen; otherwise keep nothing longer than through steps of decoding."""

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Snapshot | None":
        """A snapshot; None where :func:`watched` says that a later change could not be seen."""
        if watched(tensors) is None:
            return None
        return cls([kind(tensor) for tensor in tensors if (kind := _kind(tensor)) is not None])

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """None: the copy of a tensor was not seen."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def stands(self) -> bool:
        """Whether the same tensors hold the same still."""
        return all(one.stands() for one in self.seen)

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether some tensors, these or others, hold what was seen. Others never do where values are not compared."""
        return len(tensors) == len(self.seen) and all(
            one.is_of(tensor) for one, tensor in zip(self.seen, tensors, strict=True)
        )


_VERSION = attrgetter("_version")
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of a number: numpy does not know every dtype of torch."""


class Together:
    """A snapshot of many small tensors, compared in few operations: their number is that of the users of a batch.

    It keeps the tensors, but tells only of what they hold; that they still lie where they lay is for the caller.

    Args:
        tensors: some that :func:`watched` has an answer for.
        by_value: whether it is by their values.
    """

    __slots__ = ("_addresses", "_alike", "_steps", "_versions", "by_value", "tensors")

    def __init__(self, tensors: Sequence[Tensor], *, by_value: bool) -> None:
        self.tensors = tensors
        self.by_value = by_value
        by_shape: dict[Any, list[Tensor]] = {}
        for tensor in tensors if by_value else ():
            by_shape.setdefault((tensor.shape, tensor.dtype), []).append(tensor)
        self._alike = [(alike, _held(alike)) for alike in by_shape.values()]
        self._versions, self._addresses, self._steps = self._now()

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Together | None":
        """One of these tensors; None where :func:`watched` says that a later change could not be seen."""
        how = watched(tensors)
        return None if how is None else cls(tensors, by_value=how == "by value")

    def _now(self) -> tuple[list[int], list[int], int]:
        if self.by_value:
            return [], [], 0
        return [*map(_VERSION, self.tensors)], [*map(Tensor.data_ptr, self.tensors)], _STEPS.taken

    def stand(self) -> bool:
        """Whether they hold the same still."""
        if transformed():
            return False
        if not self.by_value:
            return self._now() == (self._versions, self._addresses, self._steps)
        return all(_held(alike) == kept for alike, kept in self._alike)


def _held(alike: Sequence[Tensor]) -> tuple[torch.dtype, torch.Size, bytes]:
    """What they hold, one after the other. The bytes, so that not even the sign of a zero goes unseen."""
    stacked = torch.stack([*alike])
    plain = stacked if stacked.dtype is torch.float32 else stacked.view(_INTEGERS[stacked.element_size()])
    return stacked.dtype, stacked.shape, plain.numpy().tobytes()

"""Factors of the adapters that were used last, within a number of bytes; all that are missing are made at once."""

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from randbasis.bank.forms import Form, View
from randbasis.bank.resident import Resident


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """One adapter in one form.

    Attributes:
        tensors: of :meth:`Form.make`, of this adapter alone.
        views: what each matrix needs.
    """

    tensors: tuple[Tensor, ...]
    views: list[View]


class PreparedAdapters:
    """Adapters in the forms that batches took them in, least recently used first.

    Nothing here is locked: the bank calls under its own lock. A batch holds what it uses, so dropping frees nothing
    under it.

    Args:
        limit: bytes that may be kept.

    Attributes:
        nbytes: bytes that are kept.
        seconds: that making them took in all.
        made: how many were made.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self.seconds, self.made = 0.0, 0
        self._kept: OrderedDict[tuple[int, str, torch.dtype, torch.device], Prepared] = OrderedDict()

    def missing(self, residents: Sequence[Resident], form: Form, dtype: torch.dtype, device: torch.device) -> int:
        """How many are not there."""
        return sum((id(one), form.name, dtype, device) not in self._kept for one in residents)

    def get(
        self, residents: Sequence[Resident], form: Form, dtype: torch.dtype, device: torch.device
    ) -> list[Prepared]:
        """Each adapter in a form; all that are missing are made in one call.

        Args:
            residents: distinct adapters of one profile.
            form: of that profile.
            dtype: that the model computes in.
            device: of the model.
        """
        keys = [(id(one), form.name, dtype, device) for one in residents]
        missing = [at for at, key in enumerate(keys) if key not in self._kept]
        found = {at: self._kept[key] for at, key in enumerate(keys) if key in self._kept}
        if missing:
            found |= dict(zip(missing, self._make([residents[at] for at in missing], form, dtype, device), strict=True))
        if form.kept:
            for at, key in enumerate(keys):
                if key not in self._kept:
                    self.nbytes += _bytes(found[at])
                    self._kept[key] = found[at]
                self._kept.move_to_end(key)
            self._shrink()
        return [found[at] for at in range(len(keys))]

    def forget(self, resident: Resident) -> None:
        """Drop all forms of an adapter that is gone."""
        for key in [key for key in self._kept if key[0] == id(resident)]:
            self.nbytes -= _bytes(self._kept.pop(key))

    def _make(
        self, residents: Sequence[Resident], form: Form, dtype: torch.dtype, device: torch.device
    ) -> list[Prepared]:
        began = time.perf_counter()
        rows = torch.stack([one.values() for one in residents]).to(device, torch.float32)
        # What is kept may meet any later pass: an inference tensor could not.
        with torch.inference_mode(False), torch.no_grad():
            tensors = form.make(rows.clone() if rows.is_inference() else rows, dtype)
        made: list[Prepared] = []
        for at in range(len(residents)):
            mine = [one.narrow(form.axis, at, 1) for one in tensors]
            # Each is dropped by itself, and so must not hold the others' memory.
            own = tuple([one.clone() for one in mine] if form.kept and len(residents) > 1 else mine)
            made.append(Prepared(own, form.views(own)))
        self.seconds += time.perf_counter() - began
        self.made += len(made)
        return made

    def _shrink(self) -> None:
        while self.nbytes > self.limit and self._kept:
            _, dropped = self._kept.popitem(last=False)
            self.nbytes -= _bytes(dropped)


def _bytes(prepared: Prepared) -> int:
    return sum(one.numel() * one.element_size() for one in prepared.tensors)

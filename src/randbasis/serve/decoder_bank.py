"""A bank in front of a decoder whose batches are packed: what would break the batch of all is refused for one."""

from functools import cached_property
from typing import Any

import torch

from randbasis.adapter_file import PackedAdapter
from randbasis.adapter_file.contents import SAVED_PREFIX
from randbasis.bank import AdapterBank
from randbasis.errors import AdapterRefusedError
from randbasis.store import StoredAdapter

LARGEST = 1e4
"""A coefficient that was trained is hundreds of times smaller."""


class DecoderBank(AdapterBank):
    """A bank of adapters that packed batches can have.

    In a packed batch the output layer sees the last token of each request alone, and the input layer no vectors, so
    that neither can be told whose rows it sees; and what was trained whole must have the shape that the base has it in.
    """

    def load(self, name: str, source: Any, *, version: int | None = None, pin: bool = False) -> Any:
        """See :meth:`AdapterBank.load`.

        Raises:
            AdapterRefusedError: a packed batch cannot have it.
        """
        packed = source.packed() if isinstance(source, StoredAdapter) else PackedAdapter.from_bytes(source)
        whole = {key.removeprefix(SAVED_PREFIX): tensor for key, tensor in packed.extra.items()}
        for path in (*packed.spec.shapes, *(key.rpartition(".")[0] for key in whole)):
            if path in self._ends:
                raise AdapterRefusedError(
                    f"adapters that change {path!r}, where tokens come in or go out, cannot be in a batch with others; "
                    "merge it into a model of its own (randbasis export --to merged)"
                )
        for key, tensor in whole.items():
            shape = self._shapes.get(key, tensor.shape)
            if shape != tensor.shape:
                raise AdapterRefusedError(
                    f"{key!r} was trained in shape {[*tensor.shape]}, the base has it in {[*shape]}, and one batch "
                    "cannot have both; merge it into a model of its own (randbasis export --to merged)"
                )
        _check_size(packed)
        return super().load(name, source, version=version, pin=pin)

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        """Of all tensors of the base."""
        state: dict[str, Any] = self.model.state_dict()
        return {key: tensor.shape for key, tensor in state.items()}

    @cached_property
    def _ends(self) -> frozenset[str]:
        """Paths of the layers where tokens come in and go out."""
        model: Any = self.model
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        return frozenset(name for name, module in model.named_modules() if any(module is one for one in ends))


def _check_size(packed: PackedAdapter) -> None:
    """Raise where sums would leave the range of numbers: what is no number in one run of tokens spreads to all."""
    sizes = [float(one.abs().max()) for one in (packed.values(), *packed.extra.values()) if one.numel()]
    # One by one: the greatest of several passes over what is no number.
    greatest = next((size for size in sizes if not size <= LARGEST), None)
    if greatest is not None:
        raise AdapterRefusedError(
            f"an adapter must have numbers of at most {LARGEST:g} to be in a batch with others, got {greatest:g}; "
            "its training diverged, train it anew with a smaller learning rate"
        )

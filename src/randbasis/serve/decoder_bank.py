"""A bank in front of a decoder whose batches are packed: what would break the batch of all is refused for one."""

from typing import Any

from randbasis.adapter_file import PackedAdapter
from randbasis.adapter_file.contents import SAVED_PREFIX
from randbasis.bank import AdapterBank
from randbasis.errors import AdapterRefusedError
from randbasis.store import StoredAdapter


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
        ends = self._ends()
        whole = {key.removeprefix(SAVED_PREFIX): tensor for key, tensor in packed.extra.items()}
        for path in (*packed.spec.shapes, *(key.rpartition(".")[0] for key in whole)):
            if path in ends:
                raise AdapterRefusedError(
                    f"adapters that change {path!r}, where tokens come in or go out, cannot be in a batch with others; "
                    "merge it into a model of its own (randbasis export --to merged)"
                )
        own: dict[str, Any] = self.model.state_dict()
        for key, tensor in whole.items():
            if key in own and own[key].shape != tensor.shape:
                raise AdapterRefusedError(
                    f"{key!r} was trained in shape {[*tensor.shape]}, the base has it in {[*own[key].shape]}, and one "
                    "batch cannot have both; merge it into a model of its own (randbasis export --to merged)"
                )
        return super().load(name, source, version=version, pin=pin)

    def _ends(self) -> set[str]:
        model: Any = self.model
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        return {name for name, module in model.named_modules() if any(module is one for one in ends)}

"""PACKED ADAPTER → AN ADAPTER IN A MODEL: coefficients, streams and heads set where they belong, without a file.

All is compared before the first value is written, as where a state is loaded (:mod:`randbasis.tuner.checked_loading`).
"""

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from randbasis.adapter_file import PackedAdapter
from randbasis.errors import AdapterFilesError
from randbasis.tuner.checked_loading import adapted_layers
from randbasis.tuner.coefficients import Streams
from randbasis.tuner.saved_files import SAVED_PREFIX


def fill(model: nn.Module, adapter: str, packed: PackedAdapter, where: str) -> None:
    """Give an adapter of a model the values of a packed one.

    Args:
        model: as PEFT wraps it.
        adapter: its name in the model; it has the matrices of the packed one, with the same meaning.
        packed: what to set; its numbers are those of its spec (:meth:`PackedAdapter.check`).
        where: what it was read from, for messages.

    Raises:
        AdapterFilesError: the adapter in the model has a head that the packed one has not.
    """
    places = {
        (key.removeprefix(SAVED_PREFIX), one.part.name): (layer, index, one)
        for key, layer in adapted_layers(model)
        for index, one in enumerate(layer.adapted.get(adapter, ()))
    }
    heads = _heads(model, adapter, packed.extra, where) if packed.extra else ()
    with torch.no_grad():
        values = packed.values()
        for number, (one, start) in enumerate(zip(packed.spec.matrices, packed.spec.starts, strict=True)):
            layer, index, adapted = places[one.name, one.part]
            own = layer.trained_coefficients(adapter, adapted)
            for name, stored in one.coefficients(values, start).items():
                own[name].copy_(stored)
            if packed.streams is not None:
                cast("Streams", layer.randbasis_streams[adapter]).weight[index].copy_(packed.streams[number])
        for target, values in heads:
            target.copy_(values)


def _heads(model: nn.Module, adapter: str, extra: Mapping[str, Tensor], where: str) -> list[tuple[Tensor, Tensor]]:
    """Each tensor of the model that was trained whole, with its values; as PEFT finds them."""
    stored = dict(extra)
    for path, module in cast("Iterator[tuple[str, nn.Module]]", model.named_modules()):
        if not isinstance(module, AuxiliaryTrainingWrapper):
            continue
        for name, place in cast("dict[str, str]", module.adapter_state_dict_load_map(adapter)).items():
            saved = f"{path}.{name}"
            if saved not in stored:
                raise AdapterFilesError(
                    f"{where}: the adapter must have all that was trained whole beside it (modules_to_save), it has no "
                    f"{saved!r}; take it from where it was saved"
                )
            stored[f"{path}.{place}"] = stored.pop(saved)
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return [(own[name], values) for name, values in stored.items() if name in own]

"""The fast path of ``nn.TransformerEncoderLayer``: in evaluation it hands all weights to one kernel and calls no layer.

An adapter inside would be trained and then not be seen. The layer asks for its activation first, and the stack of
layers whether it may pack a padded batch: with these answered no, both call their layers as in training.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from randbasis.tuner.layer_adapters import LayerAdapters


@dataclass(frozen=True, slots=True)
class Switched:
    """An attribute that was changed, and what it was."""

    module: nn.Module
    name: str
    before: Any

    def restore(self) -> None:
        """Put it back."""
        setattr(self.module, self.name, self.before)


def call_every_layer(model: nn.Module) -> list[Switched]:
    """Turn the fast path off around adapted layers; returns what was changed, nothing where it is off already."""
    switched: list[Switched] = []
    for module, name, off in _switches(model):
        before = getattr(module, name, off)
        if before and any(isinstance(inner, LayerAdapters) for inner in module.modules()):
            switched.append(Switched(module, name, before))
            setattr(module, name, off)
    return switched


def _switches(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            yield module, "activation_relu_or_gelu", 0
        elif isinstance(module, nn.TransformerEncoder):
            yield module, "use_nested_tensor", False

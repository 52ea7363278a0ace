"""What an adapter is made for, as its configuration says it when it is saved: shapes, rows and digests of layers."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from randbasis.tuner.base_shapes import compress_shapes
from randbasis.tuner.base_weight import weights_digest
from randbasis.tuner.checked_loading import adapted_layers
from randbasis.tuner.config import RandbasisConfig


def made_for(
    model: nn.Module, adapter: str, config: RandbasisConfig, model_config: Mapping[str, Any]
) -> dict[str, Any]:
    """Options of a configuration and their values, without those that say nothing.

    Args:
        model: with the adapter.
        adapter: its name.
        config: of the adapter.
        model_config: of the base model.
    """
    shapes: dict[str, tuple[int, int]] = {}
    rows: dict[str, tuple[int, int]] = {}
    digests: list[tuple[str, int, str | None]] = []
    for key, layer in adapted_layers(model):
        if adapter in layer.adapted:
            shapes[key] = layer.out_features, layer.in_features
            parts = [one.part for one in layer.adapted[adapter] if one.part.name]
            rows |= {f"{key}[{part.name}]": (part.start, part.stop) for part in parts}
            digests += [(key, one.part.start, one.bound.digest) for one in layer.adapted[adapter]]
    told = {
        "base_shapes": compress_shapes(shapes),
        "base_rows": compress_shapes(rows) if rows else None,
        "base_model_type": model_config.get("model_type"),
        "base_weights": weights_digest(digests) if config.method_cls.needs_base else None,
    }
    return {name: value for name, value in told.items() if value}

"""The layers of a plain model that an adapter can be for: found by what they have, whoever wrote them."""

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from randbasis.batch_rows import TOKENS_FIRST


def layer_shape(module: nn.Module) -> tuple[int, int] | None:
    """``(out, in)`` of a linear layer: of torch, ``Conv1D`` of transformers, or a quantized one; else None."""
    names = ("out_features", "in_features"), ("outfeatures", "infeatures"), ("nf", "nx")
    found = next((pair for pair in names if all(isinstance(getattr(module, one, None), int) for one in pair)), None)
    return None if found is None else cast("tuple[int, int]", tuple(getattr(module, one) for one in found))


def linear_shapes(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Module path → ``(out, in)`` of every linear layer."""
    return {name: shape for name, module in modules.items() if (shape := layer_shape(module)) is not None}


def architecture_of(model: nn.Module) -> str | None:
    """``model_type`` of the model's configuration, where it has one."""
    kind: Any = getattr(getattr(model, "config", None), "model_type", None)
    return kind if isinstance(kind, str) and kind else None


def tokens_first(model: nn.Module) -> bool:
    """Whether some layers see ``[tokens, rows, width]``: with as many tokens as rows nothing else would tell."""
    return architecture_of(model) in TOKENS_FIRST or any(
        isinstance(module, nn.MultiheadAttention) and not module.batch_first for module in model.modules()
    )

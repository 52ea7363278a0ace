"""Whether a model has a place for what an adapter holds, before the first layer is touched.

PEFT and transformers leave out what has none, and a head that is not loaded answers as it was drawn.
"""

from collections.abc import Mapping
from typing import cast

from torch import nn

from randbasis.errors import BaseMismatchError
from randbasis.tuner.adapter_dir import plain_path
from randbasis.tuner.registration import PREFIX


def check_places(model: nn.Module, stored: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise unless a model has the layers of an adapter, and parameters of the shapes that were trained whole.

    Args:
        model: the base, which may have other adapters.
        stored: tensor name → shape, as adapters are saved.
        where: the adapter, for the message.

    Raises:
        BaseMismatchError: it has not.
    """
    modules = {plain_path(name) for name, _ in cast("nn.Module", model).named_modules()}
    layers = {_layer(name) for name in stored if f".{PREFIX}" in name}
    if layers and not layers & modules:
        raise BaseMismatchError(
            f"{where}: the model must have the layers of the adapter, such as {min(layers)!r}, {type(model).__name__} "
            f"has none of them; {_way_out(min(layers))}"
        )
    known = {plain_path(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in stored.items():
        path = plain_path(name)
        if f".{PREFIX}" in name or known.get(path) == shape:
            continue
        if path in known and _has_tokens(model, path):
            raise BaseMismatchError(
                f"{where}: the adapter was made for {shape[0]} tokens, the rows of {path!r}, and the model has "
                f"{known[path][0]}; resize it first: model.resize_token_embeddings({shape[0]})"
            )
        found = f"shape {list(known[path])}" if path in known else "nothing"
        raise BaseMismatchError(
            f"{where}: the model must have a parameter {path!r} of shape {list(shape)}, which was trained "
            f"beside the adapter, got {found}; load it on a model with the same head; {_way_out(path)}"
        )


def _layer(name: str) -> str:
    return plain_path(name.partition(f".{PREFIX}")[0])


def _has_tokens(model: nn.Module, path: str) -> bool:
    """Whether a parameter has a row for each token."""
    module = model.get_submodule(path.rpartition(".")[0]) if path.count(".") else model
    return isinstance(module, nn.Embedding) or path.rpartition(".")[0].rpartition(".")[2] == "lm_head"


def _way_out(path: str) -> str:
    if path.startswith("encoder."):
        return (
            "it may be of `randbasis train`, whose head on pooled hidden states no class of transformers has: "
            "`randbasis predict` and `randbasis evaluate` load it"
        )
    return "name the base model, and the class of it, that the adapter was trained on"

"""Whether a model has a place for what was trained whole beside an adapter, before the first layer is touched.

PEFT and transformers leave out what has none, and a head that is not loaded answers as it was drawn.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import cast

from torch import nn

from randbasis.errors import BaseMismatchError
from randbasis.tuner.registration import PREFIX
from randbasis.tuner.saved_files import plain_path


def check_places(
    model: nn.Module, stored: Mapping[str, tuple[int, ...]], where: str, saved: Collection[str] | None = None
) -> None:
    """Raise unless a model has parameters of the shapes that were trained whole.

    Args:
        model: the base, which may have other adapters.
        stored: tensor name → shape, as adapters are saved.
        where: the adapter, for the message.
        saved: names of modules that the model must have; paths may differ, since PEFT can rename them when it loads.
            None wants each parameter under its path.

    Raises:
        BaseMismatchError: it has not.
    """
    known = {plain_path(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    modules = cast("Iterator[tuple[str, nn.Module]]", model.named_modules())
    names = {part for name, _ in modules for part in name.split(".")}
    for name, shape in stored.items():
        path = plain_path(name)
        if f".{PREFIX}" in name or known.get(path) == shape:
            continue
        absent = saved is None or bool({*path.split(".")} & ({*saved} - names))
        if path not in known and not absent:
            continue
        if path in known and _has_tokens(model, path):
            raise BaseMismatchError(
                f"{where}: the adapter was made for {shape[0]} tokens, the rows of {path!r}, and the model has "
                f"{known[path][0]}; resize it first: model.resize_token_embeddings({shape[0]})"
            )
        found = f"shape {list(known[path])}" if path in known else "nothing"
        raise BaseMismatchError(
            f"{where}: the model must have a parameter {path!r} of shape {list(shape)}, which was trained "
            f"beside the adapter, got {found}; load it on a model with the same head"
        )


def _has_tokens(model: nn.Module, path: str) -> bool:
    """Whether a parameter has a row for each token."""
    above = path.rpartition(".")[0]
    modules = cast("Iterator[tuple[str, nn.Module]]", model.named_modules())
    tables = {plain_path(name) for name, module in modules if isinstance(module, nn.Embedding)}
    return above in tables or above.rpartition(".")[2] == "lm_head"

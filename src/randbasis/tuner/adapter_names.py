"""Names of adapters: which can be kept apart from the words of a model's paths, and whose tensor a key is."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from randbasis.batch_rows import BASE
from randbasis.errors import AdapterNameError
from randbasis.tuner.registration import PREFIX

_OURS = re.compile(rf"(.*\.)?{PREFIX}[^.]*\.(?P<adapter>[^.]+)\.weight")


def adapter_of(key: str) -> str | None:
    """The adapter that a key of a model's state dict belongs to, by the end of the key; None for other tensors."""
    found = _OURS.fullmatch(key)
    return found["adapter"] if found else None


def belongs_to(key: str, adapter: str) -> bool:
    """Whether a key of a model's state dict is of a tensor of this adapter."""
    return adapter_of(key) == adapter


def without_adapter(key: str, adapter: str) -> str:
    """A key of a model's state dict as it stands in a file."""
    return key.removesuffix(f".{adapter}.weight") + ".weight" if belongs_to(key, adapter) else key


def path_words(model: nn.Module) -> set[str]:
    """All words of the keys of a model's state dict but for the names of adapters."""
    containers = (f".{PREFIX}", ".modules_to_save.")
    keys = (key for key, _ in cast("Iterator[tuple[str, nn.Module]]", model.named_modules()))
    return {"weight", "bias"}.union(
        *(key.split(".") for key in keys if not any(one in f".{key}" for one in containers))
    )


def check_name(name: Any, model: nn.Module, others: Mapping[str, Any], config: Any) -> None:
    """Raise unless an adapter can have this name beside the others of a model.

    Args:
        name: of the adapter.
        model: the base model.
        others: configurations of the other adapters, by their names.
        config: its configuration.

    Raises:
        AdapterNameError: torch takes no such name, it has a meaning of its own, or PEFT would lose what is saved.
    """
    _check_word(name)
    heads = sorted({*_heads([config, *others.values()])})
    if name in (head.rpartition(".")[2] for head in heads):
        raise AdapterNameError(
            f"an adapter cannot be called {name!r} where modules_to_save names a module so, got {heads}: PEFT takes "
            f"the adapter's tensors for that module; call it for example {f'adapter_{name}'!r}"
        )
    if not others:
        return
    words = _words_of_kept_modules(model, heads)
    clash = next((one for one in (name, *others) if one in words), None)
    if clash is not None:
        raise AdapterNameError(
            f"an adapter cannot be called {clash!r} on this model: PEFT takes every tensor with {clash!r} in its path "
            f"for one of that adapter when it saves another, and so loses {words[clash]!r}, which is saved whole; "
            f"call it for example {f'adapter_{clash}'!r}"
        )


def _check_word(name: Any) -> None:
    if not isinstance(name, str) or not name or "." in name or name.startswith(("/", "\\")):
        raise AdapterNameError(
            f"an adapter's name must be a string that is not empty, has no dot and is no absolute path, since it "
            f"becomes the name of a module and of a folder, got {name!r}; use for example 'default'"
        )
    if name == BASE or name.startswith(PREFIX):
        means = "no adapter in a mixed batch" if name == BASE else "a tensor of an adapter"
        raise AdapterNameError(
            f"an adapter cannot be called {name!r}, which stands for {means} here; use for example 'default'"
        )
    if hasattr(nn.ModuleDict(), name):
        raise AdapterNameError(
            f"an adapter cannot be called {name!r}, which is an attribute of the module of torch that holds adapters "
            f"by their names; call it for example {f'adapter_{name}'!r}"
        )


def _heads(configs: Iterable[Any]) -> Iterator[str]:
    for config in configs:
        yield from cast("list[str]", getattr(config, "modules_to_save", None) or [])


def _words_of_kept_modules(model: nn.Module, heads: Iterable[str]) -> dict[str, str]:
    """Words of the paths of what PEFT saves whole beside adapters: heads, and embeddings where they were resized."""
    wanted = tuple(heads)
    kept: list[tuple[str, nn.Module]] = []
    embeddings = _embeddings(model)
    for key, module in cast("Iterator[tuple[str, nn.Module]]", model.named_modules()):
        named = any(key == head or key.endswith(f".{head}") for head in wanted)
        if isinstance(module, AuxiliaryTrainingWrapper):
            kept.append((key, cast("nn.Module", module.original_module)))
        elif (named or module in embeddings) and ".modules_to_save." not in key:
            kept.append((key, module))
    words: dict[str, str] = {}
    for key, module in kept:
        for name in module.state_dict():
            for word in f"base_model.model.modules_to_save.{key}.{name}".split("."):
                words.setdefault(word, key)
    return words


def _embeddings(model: nn.Module) -> set[nn.Module]:
    """Input and output embeddings of a model of transformers."""
    found: set[nn.Module] = set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, getter)() if hasattr(model, getter) else None
        except NotImplementedError:
            continue
        if isinstance(module, nn.Module):
            found.add(module)
    return found

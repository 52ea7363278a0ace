"""What a configuration seems to ask for and does not get: names that match nothing, and experts in one tensor."""

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from torch import nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from randbasis.errors import near
from randbasis.tuner.base_shapes import generic_path
from randbasis.tuner.config import RandbasisConfig

_EMPTY_WORDS = frozenset({"proj", "linear", "weight", "layer", "layers", "dense"})


def warn_of_gaps(model: nn.Module, config: RandbasisConfig, matched: Sequence[str], *, all_linear: bool) -> None:
    """Warn of names and layer numbers that match no module, and of experts that the names seem to mean.

    Args:
        model: before the adapter is put on it.
        config: with its names.
        matched: the modules that it matches.
        all_linear: whether every linear layer was asked for.
    """
    unmatched = _unmatched_names(config, matched)
    keys = [key for key, _ in cast("Iterator[tuple[str, nn.Module]]", model.named_modules())]
    if unmatched:
        last = {key.rpartition(".")[2] for key in keys if key and not key.rpartition(".")[2].isdigit()}
        hints = "; ".join(f"{name!r}: {near(name.rpartition('.')[2], last)}" for name in unmatched)
        _warn(
            f"target_modules entries {unmatched} match no module of this model and adapt nothing, the others are "
            f"adapted; correct them or leave them out ({hints})"
        )
    if missing := _missing_layers(config, matched):
        _warn(
            f"layers_to_transform numbers {missing} match no target of this model and adapt nothing; the last number "
            "is one less than the number of layers"
        )
    experts = dict(_expert_weights(model))
    if experts and (all_linear or unmatched or _means_any(config, list(experts))):
        _warn(_about_experts(model, experts))


def _unmatched_names(config: RandbasisConfig, matched: Sequence[str]) -> list[str]:
    if config.target_modules is None or isinstance(config.target_modules, str):
        return []
    return sorted([name for name in config.target_modules if not names_any(name, matched)])


def names_any(name: str, keys: Iterable[str]) -> bool:
    """Whether an entry of ``target_modules`` names any of these module paths: whole, or the end of it."""
    return any(f".{key}".endswith(f".{name}") for key in keys)


def _missing_layers(config: RandbasisConfig, matched: Sequence[str]) -> list[int]:
    wanted = config.layers_to_transform
    if wanted is None:
        return []
    numbers = {wanted} if isinstance(wanted, int) else set(wanted)
    found = {int(number) for key in matched for number in re.findall(r"(?<=\.)\d+(?=\.)", key)}
    return sorted(numbers - found)


def _expert_weights(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Parameters that hold one matrix for each expert: path and how many numbers."""
    for key, module in cast("Iterator[tuple[str, nn.Module]]", model.named_modules()):
        if isinstance(module, _ConvNd):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and min(parameter.shape) > 1 and "embed" not in name and "position" not in name:
                yield f"{key}.{name}" if key else name, parameter.numel()


def _means_any(config: RandbasisConfig, experts: Sequence[str]) -> bool:
    """Whether a name shares a word with the path of an expert's weight (gate_proj, gate_up_proj), or a pattern fits."""
    if isinstance(config.target_modules, str):
        return any(re.fullmatch(config.target_modules, path) for path in experts)
    words = {word for path in experts for end in path.split(".")[-2:] for word in end.split("_")} - _EMPTY_WORDS
    return any(words & set(name.rpartition(".")[2].split("_")) for name in config.target_modules or ())


def _about_experts(model: nn.Module, experts: dict[str, int]) -> str:
    count = sum(experts.values())
    embeddings = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    total = sum(p.numel() for p in model.parameters() if p.dim() >= 2 and p not in embeddings)
    kinds = sorted({generic_path(path) for path in experts})
    shown = ", ".join(kinds[:4]) + (", ..." if len(kinds) > 4 else "")
    return (
        f"3-dimensional weights of experts are not adapted, whatever target_modules says: {shown} keep {count:,} "
        f"parameters, {100 * count / total:.1f} % of all matrices of this model without its embeddings; "
        "only linear layers are adapted"
    )


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)

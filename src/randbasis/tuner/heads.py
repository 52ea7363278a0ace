"""What was trained whole beside adapters (``modules_to_save``), when the adapters are combined."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from randbasis.errors import CombinationError

_ONE = 1e-6


def check_heads(model: nn.Module, adapters: Sequence[str], weights: Sequence[float]) -> None:
    """Raise unless the weighted sum of the heads of some adapters is a head; nothing to do where they have none.

    Args:
        model: with the adapters.
        adapters: their names.
        weights: one factor for each.

    Raises:
        CombinationError: one has a head that another lacks, they differ in shape, or the weights do not sum to one.
    """
    for key, wrapper in _wrappers(model):
        heads = [dict(_state(wrapper, name)) for name in adapters]
        if not any(heads):
            continue
        for name, head in zip(adapters[1:], heads[1:], strict=True):
            differing = sorted(n for n in heads[0].keys() | head.keys() if not _alike(heads[0].get(n), head.get(n)))
            if differing:
                raise _no_sum(
                    f"{key}.{differing[0]} differs in shape or dtype, or is in one alone, of {adapters[0]!r} and "
                    f"{name!r}"
                )
        if abs(math.fsum(weights) - 1) > _ONE:
            raise _no_sum(
                f"the weights sum to {math.fsum(weights):.6g}, and {key} is made of weights, not changes of weights"
            )


def combine_heads(model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter: str) -> None:
    """Give an adapter the weighted sum of the heads of others; see :func:`check_heads`.

    Args:
        model: with the adapters, the new one included.
        adapters: names of the others.
        weights: one factor for each.
        adapter: name of the new one.
    """
    for _, wrapper in _wrappers(model):
        sources = [_state(wrapper, name) for name in adapters]
        for name, target in _state(wrapper, adapter).items():
            values = [source[name] for source in sources if name in source]
            if not values:
                continue
            if target.is_floating_point():
                total = sum((w * v.double() for w, v in zip(weights, values, strict=True)), start=torch.zeros(()))
                target.copy_(total)
            else:
                target.copy_(values[0])


def put_back_heads(model: nn.Module) -> None:
    """Put the base model's own modules in the place of those that were trained whole."""
    for key, wrapper in list(_wrappers(model)):
        model.set_submodule(key, cast("nn.Module", wrapper.original_module))


def _wrappers(model: nn.Module) -> Iterator[tuple[str, ModulesToSaveWrapper]]:
    for key, module in cast("Iterator[tuple[str, nn.Module]]", model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            yield key, module


def _state(wrapper: ModulesToSaveWrapper, adapter: str) -> Mapping[str, Tensor]:
    heads = wrapper.modules_to_save
    return heads[adapter].state_dict() if adapter in heads else {}


def _alike(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None or first.shape != second.shape or first.dtype != second.dtype:
        return False
    return first.is_floating_point() or torch.equal(first, second)


def _no_sum(what: str) -> CombinationError:
    return CombinationError(
        "modules_to_save of adapters must be of one shape, and the weights sum to one, to be combined with them: "
        f"{what}; combine adapters without modules_to_save, or choose weights that sum to one"
    )

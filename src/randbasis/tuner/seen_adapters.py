"""Which adapters a walk through the modules of a model comes across: all of them, or those that the walk is about.

To put an adapter on, PEFT walks through all modules a dozen times, and every adapter that is there already brings two
more for each layer: the hundredth would take as long as the first fifty together. Nothing of that work is about the
others, so they are not shown to it.
"""

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self, cast

from torch import nn

_SEEN: ContextVar[tuple[str, ...] | None] = ContextVar("seen adapters", default=None)
"""Names; None for all. Of this thread alone: others see everything meanwhile."""


@contextmanager
def seeing_only(*adapters: str) -> Generator[None]:
    """Let walks see these adapters alone, for as long as this is entered."""
    token = _SEEN.set(adapters)
    try:
        yield
    finally:
        _SEEN.reset(token)


class ByAdapter(nn.ModuleDict):
    """What a layer holds for each of its adapters, by their names.

    ``named_modules``, and with it ``modules`` and ``parameters``, and ``state_dict`` leave out what is not to be seen;
    asked for by its name, an adapter is always there.
    """

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Generator[tuple[str, nn.Module]]:
        """As of every module, of the adapters that are to be seen."""
        seen = _SEEN.get()
        if seen is None:
            yield from super().named_modules(memo, prefix, remove_duplicate)
            return
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        for name, child in self._shown(seen):
            yield from child.named_modules(memo, f"{prefix}.{name}" if prefix else name, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of every module, of the adapters that are to be seen."""
        seen = _SEEN.get()
        if seen is None or "destination" not in kwargs:
            return cast("Any", super()).state_dict(*args, **kwargs)
        for name, child in self._shown(seen):
            cast("Any", child).state_dict(**(kwargs | {"prefix": f"{kwargs['prefix']}{name}."}))
        return kwargs["destination"]

    def train(self, mode: bool = True) -> Self:
        """As of every module; what it holds has nothing that depends on the mode, and there may be much of it."""
        self.training = mode
        for child in self._modules.values():
            if child._modules:  # a parametrization, say
                child.train(mode)
            else:
                vars(child)["training"] = mode
        return self

    def _shown(self, seen: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
        return [(name, self._modules[name]) for name in seen if name in self._modules]

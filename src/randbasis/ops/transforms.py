"""Whose hands a computation is in: torch.func, forward-mode derivatives and torch.jit.trace see only torch operations.

The loops that make a basis write to memory that these do not watch. So a frozen basis is made outside of them, where
tensors are plain, and a product with it inside of a transform is one of torch's own operations.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch._functorch.pyfunctorch import (
    temporarily_clear_interpreter_stack,  # pyright: ignore[reportUnknownVariableType]
)
from torch.autograd import forward_ad
from torch.utils._python_dispatch import (
    _disable_current_modes,  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
)

from randbasis.errors import DifferentiationError

_C = cast("Any", torch)._C
_no_modes = cast("Any", _disable_current_modes)
_no_transforms = cast("Any", temporarily_clear_interpreter_stack)
FORWARD = cast("Any", forward_ad)
FUNCTORCH = _C._functorch


def transformed() -> bool:
    """Whether torch.func (grad, vmap, jvp, ...) or forward-mode differentiation is at work.

    False under a compiler, which has a way of its own through both.
    """
    if torch.compiler.is_compiling():
        return False
    return FORWARD._current_level >= 0 or FUNCTORCH.peek_interpreter_stack() is not None


def traced() -> bool:
    """Whether torch.jit.trace is recording."""
    return not torch.compiler.is_compiling() and _C._get_tracing_state() is not None


def recorded() -> bool:
    """Whether :func:`transformed` or :func:`traced`, so that only operations of torch will be seen."""
    if torch.compiler.is_compiling():
        return False
    level, stack = FORWARD._current_level, FUNCTORCH.peek_interpreter_stack()
    return level >= 0 or stack is not None or _C._get_tracing_state() is not None


def watched() -> bool:
    """Whether more than autograd looks on: :func:`recorded`, or a dispatch mode such as fake tensors and counters."""
    return recorded() or bool(_C._len_torch_dispatch_stack())


@contextmanager
def outside() -> Generator[None]:
    """A block whose tensors are plain: not traced, not transformed, not fake, fit for any later use."""
    tracing = _C._get_tracing_state()
    if tracing is not None:
        _C._set_tracing_state(None)
    try:
        with _no_transforms(), _no_modes(), torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        if tracing is not None:
            _C._set_tracing_state(tracing)


def check_differentiated_once() -> None:
    """Raise in a backward pass of ours that keeps no graph, when a graph of it is wanted (``create_graph=True``).

    Refused there and not at the second derivative: what needs no gradient by then would be taken for a constant.

    Raises:
        DifferentiationError: a graph is wanted.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise DifferentiationError(
            "create_graph must be False where an adapter forms ΔW: its backward pass keeps no graph, so second "
            "derivatives would be wrong, got create_graph=True; use contraction='token' in the adapter's config, "
            "or torch.func, whose transforms compose"
        )

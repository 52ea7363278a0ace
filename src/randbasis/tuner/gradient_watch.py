"""After the first backward pass: did every coefficient that trains get a gradient?

A layer whose weight is read by other code, or whose output nothing uses, trains nothing, and no error says so. Hooks on
what trains note what the first backward pass reaches, and are gone after it: later steps cost nothing.
"""

import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.distributed.tensor import DTensor

from randbasis.tuner.layer_adapters import LayerAdapters

_SHOWN = 5


class GradientWatch:
    """Watches the first backward pass of a model.

    Args:
        model: with its adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._reached: set[int] = set()
        self._handles: list[Any] = []
        self._queued = False
        self._segments = 0
        """Backward passes of which only checkpointed segments were heard to end; :meth:`start` counts them."""
        self._ended = False
        self.done = False
        # Reached by PEFT's and by transformers' way into a model; the layers themselves may never be called.
        self._entry: Any = model.register_forward_pre_hook(self._enter)

    def start(self) -> None:
        """A forward pass begins: watch what trains now, or judge a backward pass that could not judge itself."""
        if (
            self.done
            or not torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or cast("Any", torch.jit).is_tracing()
        ):
            return
        if not _inside_backward() and self._of_two_passes():
            self._judge()
        elif not self._handles:
            trained = [p for p in self._model.parameters() if p.requires_grad and p.is_leaf]
            self._handles = [p.register_post_accumulate_grad_hook(self._note) for p in trained]

    def _of_two_passes(self) -> bool:
        """Whether two backward passes went by that could not judge themselves: one alone may have been cut short.

        What ran out of memory is run again with a smaller batch, and has then reached all that it can.
        """
        self._segments += self._ended
        self._ended = self._queued = False
        return self._segments == 2

    def forget(self) -> None:
        """Other parameters train from now on: start anew, unless the first backward pass has been judged."""
        if not self._reached:
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def stop(self) -> None:
        """Take every hook off."""
        for handle in (*self._handles, self._entry):
            handle.remove()
        self._handles, self.done = [], True

    def _enter(self, *_: object) -> None:
        self.start()

    def _note(self, parameter: Tensor) -> None:
        # Called too where a Function gave None; where others have hooks, they may have taken the gradient away.
        if parameter.grad is not None or len(cast("Any", parameter)._post_accumulate_grad_hooks) > 1:
            self._reached.add(id(parameter))
        if not self._queued:
            self._queued = True
            cast("Any", torch.autograd.Variable)._execution_engine.queue_callback(self._finish)

    def _finish(self) -> None:
        # A checkpointed segment runs a backward pass of its own inside the real one: too early to judge.
        if _inside_backward_function():
            self._queued, self._ended = False, True
        elif not self.done:
            self._judge()

    def _judge(self) -> None:
        self.stop()
        coefficients = _trained_coefficients(self._model)
        missed = {key for key, own in coefficients.items() if not any(self._has_gradient(p) for p in own)}
        if not missed:
            return
        names = sorted(missed)
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        warnings.warn(
            f"{len(names)} of {len(coefficients)} adapted layers got no gradient in the first backward pass: {shown}. "
            "Either this batch did not need them (an expert that no token was sent to, a layer that is skipped at "
            "random), or the model does not call them at all and reads their weights in another way, or its loss does "
            "not depend on them; then they will never train: leave them out of target_modules",
            stacklevel=2,
        )

    def _has_gradient(self, parameter: Tensor) -> bool:
        return id(parameter) in self._reached or parameter.grad is not None

    def __deepcopy__(self, memo: dict[int, Any]) -> "GradientWatch":
        """The copy of a model is not watched."""
        return _unwatched()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unwatched, ()


def _unwatched() -> GradientWatch:
    watch = GradientWatch(nn.Module())
    watch.stop()
    return watch


def _trained_coefficients(model: nn.Module) -> Mapping[str, list[Tensor]]:
    """Layer and its coefficients that train; of sharded layers none, whose gradients come in another way."""
    found: dict[str, list[Tensor]] = {}
    for key, layer in cast("Iterator[tuple[str, nn.Module]]", model.named_modules()):
        if not isinstance(layer, LayerAdapters) or layer.merged or layer.disable_adapters:
            continue
        if getattr(layer, "_is_fsdp_managed_module", False):
            continue
        own = [p for name in layer.adapter_layer_names for p in cast("nn.Module", getattr(layer, name)).parameters()]
        trained = [p for p in own if p.requires_grad]
        if trained and not any(isinstance(p, DTensor) for p in trained):
            found[key] = cast("list[Tensor]", trained)
    return found


def _inside_backward() -> bool:
    return cast("Any", torch._C)._current_graph_task_id() != -1  # pyright: ignore[reportPrivateUsage]


def _inside_backward_function() -> bool:
    """Whether a function of autograd that is written in Python is running its backward."""
    frame = sys._getframe()  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        if frame.f_code is BackwardCFunction.apply.__code__:
            return True
        frame = frame.f_back
    return False

"""Factors of all layers at once; ``docs/factors.md`` gives the reasons.

Types and data flow::

    JointFactors   one a model, on hooks of it     which layers there are, which of them passes skip
        │ a pass begins (a hook)
        ▼
    ForwardPass    one a thread, until it ends     AdaptedPart of a layer → its sums, planned when the first layer asks
        │ a layer asks: factors_of
        ▼
    _Group         one a kind of sum               coefficients of all matrices that share it; their sums, made when the
                                                   first of them is asked for
        │ with gradients                           Values: these, for checkpoints, until the node has run its way back
        ▼
    joint_sums     one node of autograd

Nothing outlives a pass but what the graph holds: the next pass reads coefficients anew, whoever has written to them. In
a pass a layer is given what was made only for the very tensors that it would have read itself, in their version; else
it makes its factors itself, which is always right.
"""

import threading
from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from randbasis.methods import Factors
from randbasis.ops import recorded, watched
from randbasis.tuner.adapted_part import AdaptedPart
from randbasis.tuner.joint_pass import SERVED, ForwardPass, checkpointed, effective, hooks_on_saved, say_once
from randbasis.tuner.joint_sums import joint_sums, same_sum
from randbasis.tuner.layer_adapters import LayerAdapters
from randbasis.tuner.seen_adapters import seeing_only

_C = cast("Any", torch)._C
_OPEN = threading.local()


# --- asking -----------------------------------------------------------------------------------------------------------


def factors_of(self: LayerAdapters, adapter: str, one: AdaptedPart) -> Factors | None:
    """The factors of one matrix, from a product for all layers or for this one; None where a layer makes them itself.

    Args:
        self: the layer that asks, which has this as its method.
        adapter: name of the adapter.
        one: its matrix on the layer; its method has sums.
    """
    if torch.compiler.is_compiling():
        return None
    passes: Sequence[ForwardPass] = getattr(_OPEN, "passes", ())
    goes_back = _C._current_graph_task_id() != -1
    if not (passes or goes_back or hooks_on_saved(False)) or watched():
        return None
    if goes_back:
        return _again(self, adapter, one)
    for opened in passes:
        found = opened.factors(self, adapter, one)
        if found is not None:
            return found
    return _alone(self, adapter, one) if checkpointed() else None


def _alone(layer: LayerAdapters, adapter: str, one: AdaptedPart, values: Sequence[Tensor | None] = ()) -> Factors:
    """Factors for one layer, which save nothing, as those for all save nothing."""
    own = layer.trained_coefficients(adapter, one)
    bits = layer.options[adapter].quantize_coefficients
    sums: list[Tensor] = []
    for place, (name, common) in enumerate(one.bound.sums.items()):
        counted = effective(own[name] if one.owner is None else layer.here(own[name]), bits)
        made = values[place] if values else None
        sums.append(joint_sums([common], [counted])[0] if made is None else same_sum(common, counted, made))
    return one.bound.factors_of(sums)


def _again(layer: LayerAdapters, adapter: str, one: AdaptedPart) -> Factors | None:
    if not checkpointed():
        if torch.is_grad_enabled() and layer.training:
            say_once("a reentrant checkpoint runs each layer in a graph of its own; use_reentrant=False has no such")
        return None
    own = layer.trained_coefficients(adapter, one)
    for served in reversed(SERVED.get(layer, {}).get(id(one), ())):
        values = served.values()
        there = served.bound is one.bound and any(value is not None for value in values)
        if there and all(seen.is_of(own[name]) for name, seen in served.seen.items()):
            return _alone(layer, adapter, one, values)
    return _alone(layer, adapter, one)


# --- when a pass begins and ends --------------------------------------------------------------------------------------


def _passes() -> list[ForwardPass]:
    """Those that are open in this thread."""
    passes: list[ForwardPass] | None = getattr(_OPEN, "passes", None)
    if passes is None:
        passes = _OPEN.passes = []
    return passes


class JointFactors:
    """The owner of the factors of a model; :meth:`on` makes it.

    Hooks tell it when a pass begins and ends: on the model, and on the models of transformers inside of it, which some
    callers call by themselves. Layers that are called in any other way make their factors themselves.
    """

    def __init__(self) -> None:
        self.idle: WeakSet[LayerAdapters] = WeakSet()
        """Layers that the last training pass did not call: their factors are not made before they are called again."""
        self._layers: WeakKeyDictionary[nn.Module, list[LayerAdapters]] = WeakKeyDictionary()

    @classmethod
    def on(cls, model: nn.Module) -> None:
        """Make one for a model, or let the one that it has know that it has other layers now; none for one layer.

        Args:
            model: with adapted layers.
        """
        for hook in vars(model)["_forward_pre_hooks"].values():
            if isinstance(there := getattr(hook, "__self__", None), cls):
                there._layers.clear()
                return
        with seeing_only():
            modules = list(model.modules())
        if sum(isinstance(module, LayerAdapters) for module in modules) == 1:
            return
        new = cls()
        for module in modules:
            if module is model or isinstance(module, PreTrainedModel):
                module.register_forward_pre_hook(new.enter)
                module.register_forward_hook(new.leave, always_call=True)

    def layers_of(self, root: nn.Module) -> list[LayerAdapters]:
        """The adapted layers of a module."""
        found = self._layers.get(root)
        if found is None:
            with seeing_only():  # a layer is found whatever adapters it has
                found = self._layers[root] = [one for one in root.modules() if isinstance(one, LayerAdapters)]
        return found

    def enter(self, module: nn.Module, *_: object) -> None:
        """A hook: a module begins. One that runs already was cut short before, where no hook could see it."""
        if torch.compiler.is_compiling() or recorded():
            return
        passes = _passes()
        for one in passes:
            if one.owner is self:
                if not any(running is module for running in one.inside):
                    one.inside.append(module)
                    return
                passes.remove(one)
                break
        passes.append(ForwardPass(self, self.layers_of(module), self.idle))
        passes[-1].inside.append(module)

    def leave(self, module: nn.Module, *_: object) -> None:
        """A hook: a module has ended, with a result or an error."""
        if torch.compiler.is_compiling() or recorded():
            return
        passes = _passes()
        for one in passes:
            if one.owner is self:
                for depth, running in enumerate(one.inside):
                    if running is module:
                        del one.inside[depth:]
                if not one.inside:
                    passes.remove(one)
                    one.close()
                return

    def __deepcopy__(self, memo: dict[int, Any]) -> "JointFactors":
        """The copy of a model looks for its own layers."""
        return JointFactors()

    def __reduce__(self) -> tuple[Any, ...]:
        return JointFactors, ()


def take_hooks_off(model: nn.Module) -> None:
    """Take those of :class:`JointFactors` off a model that has no adapted layer any more."""
    for module in model.modules():
        before, after, always = (
            cast("dict[int, Any]", vars(module)[kind])
            for kind in ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called")
        )
        for hooks in before, after:
            for number in [n for n, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), JointFactors)]:
                del hooks[number]
                always.pop(number, None)

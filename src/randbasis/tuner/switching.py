"""Which adapters of a model are active: PEFT's ``set_adapter``, in the time that a switch may take between two tokens.

PEFT walks through all modules of a model twice and sets every parameter of every adapter. Going over the adapted layers
alone, and setting only what changes, has the same effect.
"""

import warnings
from collections.abc import Iterable

from randbasis.tuner.layer import RandbasisLinear


def activate(
    layers: Iterable[RandbasisLinear], adapters: str | list[str], *, inference_mode: bool, new: str | None = None
) -> None:
    """Make adapters the active ones of some layers, as PEFT's ``set_adapter`` does.

    Args:
        layers: all adapted layers of a model.
        adapters: one name or several.
        inference_mode: leave the active ones frozen.
        new: the adapter that is being put on, which must not change what trains of the others.
    """
    names = [adapters] if isinstance(adapters, str) else adapters
    for layer in layers:
        if layer.merged:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=3)
            layer.unmerge()
        if new is None:
            layer.set_adapter(names, inference_mode)
        else:
            layer.let_train(new, new in names and not inference_mode)
            layer._active_adapter = names  # pyright: ignore[reportPrivateUsage]

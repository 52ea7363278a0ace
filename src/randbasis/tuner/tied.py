"""ONE VECTOR FOR MANY MATRICES, math (26): which of them holds it, in a model and in a folder.

The first matrix of a group has the coefficients as any other has: a module of its layer, which ``parameters()``, state
dicts and wrappers see once. The others know that layer, and not as a module of theirs. The first is that of the lowest
layer number, whatever order a model calls them in: a folder names it without a model.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from randbasis.adapter_file import SpecMatrix
from randbasis.adapter_file.spec import check_alike, check_tied
from randbasis.ties import UNTIED, owners
from randbasis.tuner.adapted_part import AdaptedPart
from randbasis.tuner.base_weight import layer_shape
from randbasis.tuner.chosen_targets import Target
from randbasis.tuner.layer import RandbasisLinear
from randbasis.tuner.saved_files import natural_order


def matrices_of(adapter: str, key: str, layer: RandbasisLinear) -> list[tuple[AdaptedPart, SpecMatrix]]:
    """What an adapter has on a layer, and how a spec tells it.

    Args:
        adapter: its name.
        key: module path of the layer.
        layer: which.
    """
    out, in_ = layer.out_features, layer.in_features
    return [
        (one, SpecMatrix(key, one.part.name, one.part.start, one.part.rows, out, in_, one.bound.method))
        for one in layer.adapted.get(adapter, ())
    ]


def holders(matrices: Sequence[SpecMatrix], tie: str) -> list[int]:
    """For each matrix the place of the one that holds its coefficients; its own where nothing is shared.

    Args:
        matrices: of one adapter, in any order.
        tie: which share.

    Raises:
        TieError: the method or the shapes do not allow it.
    """
    places = list(range(len(matrices)))
    if tie == UNTIED:
        return places
    order = sorted(places, key=lambda place: (natural_order(matrices[place].name), matrices[place].start))
    first = owners([matrices[place].name for place in order], tie)
    for place, owner in zip(order, first, strict=True):
        places[place] = order[owner]
        check_tied(matrices[place].method)
        check_alike(matrices[order[owner]], matrices[place], tie)
    return places


def check_targets(targets: Mapping[str, Target], modules: Mapping[str, nn.Module], tie: str) -> None:
    """Raise what :func:`tie_coefficients` would raise, before a layer is replaced.

    Args:
        targets: module path → method and parts.
        modules: of the model, by their paths.
        tie: which share.
    """
    if tie == UNTIED:
        return
    matrices: list[SpecMatrix] = []
    for key, (method, parts) in targets.items():
        out, in_ = cast("tuple[int, int]", layer_shape(_base_of(modules[key])))
        matrices += [SpecMatrix(key, part.name, part.start, part.rows, out, in_, method) for part in parts]
    holders(matrices, tie)


def tie_coefficients(adapter: str, layers: Iterable[tuple[str, RandbasisLinear]], tie: str) -> None:
    """Let the matrices of an adapter share their coefficients: all but the first of a group give up their own.

    Args:
        adapter: its name.
        layers: module path and layer, of all layers that it is on, its coefficients at their starts.
        tie: which share.

    Raises:
        TieError: the method or the shapes do not allow it; nothing was changed.
    """
    if tie == UNTIED:
        return
    found = [(layer, one, matrix) for key, layer in layers for one, matrix in matrices_of(adapter, key, layer)]
    for (layer, one, _), place in zip(found, holders([matrix for *_, matrix in found], tie), strict=True):
        owner, first, _ = found[place]
        if first is one:
            continue
        for attribute in one.attributes.values():
            del cast("nn.ModuleDict", getattr(layer, attribute))[adapter]
        one.attributes, one.owner = first.attributes, owner


def _base_of(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module

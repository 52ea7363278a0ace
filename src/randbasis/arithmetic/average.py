"""ADAPTERS + WEIGHTS → ONE ADAPTER: weighted sums of coefficients on one basis.

Coefficients of one method, seed, law and shape form a vector space, so a mean or a difference of adapters is an adapter
of the same size. Its ΔW is the weighted sum of the ΔW for PRANC (18), which is linear in its coefficients. NOLA (6),
VeRA (12) and RandLoRA (14) are bilinear in two vectors each: there it is another point, and its distance from the
weighted sum is told.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from randbasis.adapter_file import PackedAdapter
from randbasis.adapters.packed import write_adapter_dir
from randbasis.adapters.saved import AdapterLocation, common_task, open_adapter, paths_of
from randbasis.arithmetic.changes import OurChanges, read_packed
from randbasis.arithmetic.same_basis import check_same_basis
from randbasis.defaults import AVERAGED_HEADS
from randbasis.errors import HeadMismatchError, WeightsError, not_one_of
from randbasis.files.locations import local_output
from randbasis.files.output_checks import check_output_file, check_output_folder
from randbasis.low_rank import distance, norm, weighted_sum
from randbasis.progress import Track

HEADS = ("average", "first")
SUFFIX = ".safetensors"
"""End of the name of an output that is a packed file and not a directory."""
_ONE = 1e-6


@dataclass(frozen=True)
class Average:
    """What was written.

    Attributes:
        output: directory or packed file.
        method: of all of them.
        weights: one for each adapter.
        coefficients: how many there are.
        head: tensors of what was trained whole beside the adapter.
        norm: ``‖Σ wᵢ ΔWᵢ‖``; None where ΔW is made of the weights of the base model too, which are not at hand here.
        distance: between the ΔW that was written and ``Σ wᵢ ΔWᵢ``; None as the norm.
    """

    output: Path
    method: str
    weights: tuple[float, ...]
    coefficients: int
    head: int
    norm: float | None
    distance: float | None

    @property
    def relative(self) -> float | None:
        """The distance as a share of the norm of the weighted sum; None where that is 0 or not known."""
        return self.distance / self.norm if self.norm and self.distance is not None else None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "output": str(self.output),
            "method": self.method,
            "weights": list(self.weights),
            "coefficients": self.coefficients,
            "head_tensors": self.head,
            "norm_of_weighted_sum": self.norm,
            "distance_from_weighted_sum": self.distance,
            "relative_distance": self.relative,
        }


def average_adapters(
    adapters: Sequence[AdapterLocation],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    heads: str = AVERAGED_HEADS,
    base_name: str | None = None,
    model: str | None = None,
    overwrite: bool = False,
    track: Track = iter,
) -> Average:
    """Write the adapter whose coefficients are the weighted sum of those of others.

    Args:
        adapters: of this package and of one basis; where they are: see
            :func:`randbasis.adapters.saved.open_adapter`. The task that all of them have comes along.
        output: a packed file where its name ends in ``.safetensors``, else a directory; 32 bits a coefficient.
        weights: one for each adapter, of any sign and sum; None takes the mean.
        heads: ``"average"`` or ``"first"``: what becomes of modules that were trained whole beside the adapters. They
            are weights and not changes of weights, so they are averaged only with weights that sum to one.
        base_name: folder or hub name of the base to write; needed where the adapters call one base by several names.
        model: folder or hub name of the base, of which only the configuration is read; needed where a directory does
            not tell the shapes of its layers.
        overwrite: replace the output.
        track: shows the progress over the layers, whose ΔW are compared with the weighted sum.

    Raises:
        WeightsError: there is not one finite weight for each of at least one adapter, or ``heads`` is unknown.
        BasisMismatchError: method, seed, law, another hyper-parameter or the stored streams differ.
        MatrixMismatchError: the adapters adapt different matrices.
        BaseMismatchError: they were made for different bases.
        HeadMismatchError: what was trained beside them cannot be averaged.
        CoefficientValueError: a sum is not finite.
        OutputExistsError: the output exists and ``overwrite`` is not given.
        SaveError: it could not be written.
        RandbasisError: there is no such adapter, or a file of it is damaged; each rule has its class.
    """
    shares = _checked_weights(adapters, weights, heads)
    output = local_output(output)
    if output.suffix == SUFFIX:
        check_output_file(output, paths_of(*adapters), overwrite=overwrite)
    else:
        check_output_folder(output, paths_of(*adapters), overwrite=overwrite)
    saved = [open_adapter(one).ours() for one in adapters]
    names = [one.where for one in saved]
    packed = [read_packed(one, model) for one in saved]
    for name, one in zip(names[1:], packed[1:], strict=True):
        check_same_basis(packed[0], one, (names[0], name), base_name=base_name)
    extra = _heads(packed, shares, names) if heads == "average" else dict(packed[0].extra)
    values = sum((w * one.values().double() for w, one in zip(shares, packed, strict=True)), start=torch.zeros(()))
    first = packed[0].spec
    base = replace(first.base, name=Path(base_name).name) if base_name else first.base
    spec = replace(first, base=base, bits=32, group=0, task=common_task(saved))
    made = PackedAdapter.of(spec, values.float(), streams=packed[0].streams, extra=extra)
    size, apart = (None, None) if first.method.needs_base else _distances(made, packed, shares, track)
    if output.suffix == SUFFIX:
        made.write(output, overwrite=overwrite)
    else:
        name = base_name or saved[0].base_model or None  # with the folders above it
        write_adapter_dir(made, output, where=str(output), base_name=name, overwrite=overwrite)
    return Average(output, first.method.name, tuple(shares), first.count, len(extra), size, apart)


def _checked_weights(adapters: Sequence[object], weights: Sequence[float] | None, heads: str) -> list[float]:
    if heads not in HEADS:
        raise WeightsError(not_one_of("heads", heads, HEADS))
    if not adapters:
        raise WeightsError("adapters must be at least one, got none; name the adapters to average")
    if weights is None:
        return [1.0 / len(adapters)] * len(adapters)
    if len(weights) != len(adapters) or not all(math.isfinite(weight) for weight in weights):
        raise WeightsError(
            f"weights must be one finite number for each adapter, got {list(weights)} for {len(adapters)} adapters; "
            "leave them out for the mean"
        )
    return [float(weight) for weight in weights]


def _heads(packed: Sequence[PackedAdapter], weights: Sequence[float], names: Sequence[object]) -> dict[str, Tensor]:
    first = packed[0].extra
    shapes = [{name: (tensor.dtype, tensor.shape) for name, tensor in one.extra.items()} for one in packed]
    for name, other in zip(names[1:], shapes[1:], strict=True):
        if other != shapes[0]:
            differing = sorted(key for key in shapes[0].keys() | other.keys() if shapes[0].get(key) != other.get(key))
            raise _no_mean(f"{differing[0]!r} differs in shape or dtype, or is in one alone, of {names[0]} and {name}")
    if not first:
        return {}
    if abs(math.fsum(weights) - 1) > _ONE:
        raise _no_mean(f"the weights sum to {math.fsum(weights):.6g}, and heads are weights, not changes of weights")
    found: dict[str, Tensor] = {}
    for name, tensor in first.items():
        others = [one.extra[name] for one in packed]
        if tensor.is_floating_point():
            total = sum((w * other.double() for w, other in zip(weights, others, strict=True)), start=torch.zeros(()))
            found[name] = total.to(tensor.dtype)
        elif all(other.equal(tensor) for other in others):
            found[name] = tensor
        else:
            raise _no_mean(f"{name!r} is of {tensor.dtype} and not the same in all")
    return found


def _no_mean(what: str) -> HeadMismatchError:
    return HeadMismatchError(
        "what was trained whole beside the adapters must be of one shape, and the weights sum to one, to be averaged: "
        f"{what}; take that of the first adapter with heads='first'"
    )


def _distances(
    made: PackedAdapter, packed: Sequence[PackedAdapter], weights: Sequence[float], track: Track
) -> tuple[float, float]:
    """Norm of the weighted sum of the ΔW, and its distance from the ΔW of the summed coefficients."""
    result, changes = OurChanges(made), [OurChanges(one) for one in packed]
    norms: list[float] = []
    distances: list[float] = []
    with torch.no_grad():
        for key in track(list(result.shapes)):
            total = weighted_sum([(w, one.change(key)) for w, one in zip(weights, changes, strict=True)])
            norms.append(norm(total))
            distances.append(distance(result.change(key), total))
    return math.hypot(*norms), math.hypot(*distances)

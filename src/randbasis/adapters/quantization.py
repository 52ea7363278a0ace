"""QUANTIZED COEFFICIENTS of a trained adapter (PTQ), math (11), without data; what each precision costs and loses."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from randbasis.adapter_file import PackedAdapter
from randbasis.adapters.packed import exact, write_adapter_dir
from randbasis.adapters.saved import AdapterLocation, open_adapter, paths_of
from randbasis.codes import rounded
from randbasis.defaults import ONE_SCALE, QUANTIZED_BITS
from randbasis.errors import PrecisionError
from randbasis.files.output_checks import check_output_file, check_output_folder
from randbasis.low_rank import distance, norm
from randbasis.precision import CODED
from randbasis.progress import Track

PRECISIONS = (16, *CODED)
"""Bits that an adapter can be quantized to."""
PACKED_SUFFIX = ".safetensors"
"""How the name of an output ends that is to be a packed file."""


@dataclass(frozen=True)
class Precision:
    """What one precision costs and loses.

    Attributes:
        bits: of a coefficient.
        bytes: of the packed file.
        largest_error: ``max |c_q − c|`` over all coefficients.
        relative_error: ``‖c_q − c‖ / ‖c‖`` over all coefficients.
        delta_error: ``‖ΔW_q − ΔW‖ / ‖ΔW‖`` in the Frobenius norm over all matrices; None where ΔW is made of the
            weights of the base model too, which are not at hand here.
    """

    bits: int
    bytes: int
    largest_error: float
    relative_error: float
    delta_error: float | None


@dataclass(frozen=True)
class Quantization:
    """An adapter at each precision, and the one that was written.

    Attributes:
        source: directory or packed file.
        output: what was written; None where nothing was.
        bits: of the output.
        group: coefficients that share a scale; 0 for one scale a vector.
        coefficients: how many there are.
        matrices: how many they are of.
        exact_bytes: of the packed file without quantization.
        precisions: one entry for each of :data:`PRECISIONS`.
        needs_base: whether ΔW is made of the weights of the base model too.
    """

    source: str
    output: str | None
    bits: int
    group: int
    coefficients: int
    matrices: int
    exact_bytes: int
    precisions: tuple[Precision, ...]
    needs_base: bool

    def as_json(self) -> dict[str, Any]:
        """Plain values, one row a precision."""
        return {**self.__dict__, "precisions": [asdict(one) for one in self.precisions]}


def quantize_adapter(
    source: AdapterLocation,
    output: str | Path | None = None,
    *,
    bits: int = QUANTIZED_BITS,
    group: int = ONE_SCALE,
    model: str | None = None,
    base_name: str | None = None,
    overwrite: bool = False,
    track: Track = iter,
) -> Quantization:
    """Quantize the coefficients of a trained adapter, symmetric, one scale a vector or a group, math (11).

    Needs no data: the scales come from the coefficients alone. Heads and streams stay as they are.

    Args:
        source: where the adapter is: see :func:`randbasis.adapters.saved.open_adapter`. Its task comes along.
        output: a name that ends in ``.safetensors`` becomes a packed file, any other a directory for PEFT whose values
            are the quantized ones, in float32 (float16 at 16 bits); None writes nothing.
        bits: one of :data:`PRECISIONS`.
        group: with 8, 4, 3 or 2 bits, the number of coefficients that share a scale; 0 for one scale a vector.
        model: folder or hub name of the base, of which only the configuration is read; for directories that do not tell
            the shapes of their layers.
        base_name: name of the base to write; None takes the source's.
        overwrite: replace the output.
        track: shows the progress over the adapted matrices, such as ``rich.progress.track``.

    Raises:
        PrecisionError: there is no such precision, or a coefficient does not fit it.
        AdapterFilesError: the directory is incomplete, damaged or foreign.
        PackedFileError: the file breaks a rule of the format; each rule has its class.
        OutputExistsError: the output exists and ``overwrite`` is not given.
        SaveError: the output could not be written.
        RandbasisError: as :func:`randbasis.adapters.packed.pack_adapter` and :func:`randbasis.adapter_file.read`.
    """
    if bits not in PRECISIONS:
        raise PrecisionError(f"bits must be one of {list(PRECISIONS)}, got {bits!r}; 4 is the usual choice")
    to_file = str(output).endswith(PACKED_SUFFIX)
    if output is not None and to_file:
        check_output_file(output, paths_of(source), overwrite=overwrite)
    elif output is not None:
        check_output_folder(output, paths_of(source), overwrite=overwrite)
    found = open_adapter(source).ours()
    whole_name = base_name or found.base_model or None  # with the folders above it, which a packed file does not name
    name = base_name if to_file or not whole_name else Path(whole_name).name
    stored = exact(found, model=model, base_name=name)
    chosen = stored.at(bits, group)
    at_each = [chosen if one == bits else stored.at(one, group if one in CODED else 0) for one in PRECISIONS]
    needs_base = stored.spec.method.needs_base
    deltas = [None] * len(at_each) if needs_base else delta_errors(stored, at_each, track=track)
    precisions = [_precision(stored, one, error) for one, error in zip(at_each, deltas, strict=True)]
    if output is not None and to_file:
        chosen.write(output, overwrite=overwrite)
    elif output is not None:
        write_adapter_dir(chosen, output, where=found.where, base_name=whole_name, overwrite=overwrite)
    return Quantization(
        found.where,
        None if output is None else str(output),
        bits,
        group,
        stored.spec.count,
        stored.spec.size,
        len(stored.to_bytes()),
        tuple(precisions),
        needs_base,
    )


def quantize_tensors(tensors: Mapping[str, Tensor], bits: int, group: int = 0) -> dict[str, Tensor]:
    """Tensors of any adapter at so many bits, one scale a tensor or a group, in their own dtype.

    It is what :func:`quantize_adapter` does to coefficients, for those of other methods: of a LoRA of rank 1, each A
    and each B is one vector.

    Args:
        tensors: floating, of any shape.
        bits: 16, 8, 4, 3 or 2.
        group: with 8, 4, 3 or 2 bits, the number of entries that share a scale; 0 for one scale a tensor.

    Raises:
        PrecisionError: there is no such precision, or a value does not fit it.
        CoefficientValueError: a value is not finite.
    """
    return {
        name: rounded(tensor.detach().flatten(), [tensor.numel()], bits, group).to(tensor.dtype).view(tensor.shape)
        for name, tensor in tensors.items()
    }


def delta_errors(exact: PackedAdapter, others: Sequence[PackedAdapter], *, track: Track = iter) -> list[float]:
    """``‖ΔW_q − ΔW‖ / ‖ΔW‖`` of each of the others, in float64, over all matrices together.

    Args:
        exact: what to compare with.
        others: the same adapter with other coefficients.
        track: shows the progress over the matrices.
    """
    total, squares = 0.0, [0.0] * len(others)
    rows = list(zip(exact.matrices(), *(other.matrices() for other in others), strict=True))
    for first, *rest in track(rows):
        wanted = first[1].double().factors()
        total += norm(wanted) ** 2
        for index, (_, delta) in enumerate(rest):
            squares[index] += distance(wanted, delta.double().factors()) ** 2
    return [_ratio(math.sqrt(square), math.sqrt(total)) for square in squares]


def _precision(exact: PackedAdapter, quantized: PackedAdapter, delta_error: float | None) -> Precision:
    before = exact.values().double()
    error = quantized.values().double() - before
    return Precision(
        quantized.spec.bits,
        len(quantized.to_bytes()),
        float(error.abs().max()),
        _ratio(_norm(error), _norm(before)),
        delta_error,
    )


def _norm(values: Tensor) -> float:
    return math.sqrt(float(values.square().sum()))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0

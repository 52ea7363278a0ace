"""PEFT DIRECTORY ↔ PACKED FILE: the bridge between adapter directories, models and :mod:`randbasis.adapter_file`.

Lossless both ways at the stored precision: a file of 32 bits gives back the directory's tensors bit for bit, and what a
file of fewer bits was unpacked to packs into the same bytes again.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from randbasis.adapter_file import Base, PackedAdapter, Spec, SpecMatrix, Verification, group_matrices, verify
from randbasis.adapter_file.paths import check_name
from randbasis.adapters.base_model import linear_shapes, meta_model, read_config, shape_of
from randbasis.adapters.saved import AdapterLocation, SavedAdapter, open_adapter, open_packed, paths_of, write_task
from randbasis.adapters.spec_options import STREAMS, bare, config_of, named_tensors, short_options
from randbasis.codes import rounded
from randbasis.defaults import ONE_SCALE, PACKED_BITS
from randbasis.errors import (
    AdapterFilesError,
    BaseMismatchError,
    UnsafeNameError,
)
from randbasis.files.output_checks import check_output_file, check_output_folder
from randbasis.files.output_set import replaced_set
from randbasis.methods import check_coefficients
from randbasis.tuner.adapted_part import AdaptedPart
from randbasis.tuner.base_shapes import expected_shape
from randbasis.tuner.config import RandbasisConfig
from randbasis.tuner.meaning import MEANING, meaning_of, warn_of_no_meaning
from randbasis.tuner.registration import PREFIX
from randbasis.tuner.saved_files import CONFIG_FILE, SAVED_PREFIX, WEIGHTS_FILE
from randbasis.tuner.targets import Part, parts_of, resolve_parts
from randbasis.tuner.tied import holders

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that the coefficients of a directory may have."""


@dataclass(frozen=True)
class _Stored:
    """One adapted matrix and the names of its tensors in a directory."""

    matrix: SpecMatrix
    tensors: Mapping[str, str]
    streams: tuple[str, int] | None


# --- directory to file ---


def pack_adapter(
    source: AdapterLocation,
    file: str | Path,
    *,
    bits: int = PACKED_BITS,
    group: int = ONE_SCALE,
    bfloat16: bool = False,
    model: str | None = None,
    base_name: str | None = None,
    overwrite: bool = False,
) -> Verification:
    """Write an adapter as one packed file, and read it back to verify it.

    The file holds the task that training described, so that it can be used as the directory can.

    Of an adapter that was trained with ``quantize_coefficients`` the file holds the values that it computes with,
    without loss at those bits or at 32, and is an adapter like any other; the full-precision values, which only further
    training needs, stay in the directory.

    Args:
        source: where the adapter is: see :func:`randbasis.adapters.saved.open_adapter`.
        file: the file to write.
        bits: of a coefficient: 32 keeps the directory's dtype, 16 is float16 (bfloat16 where the directory has that),
            8, 4, 3 and 2 are codes with scales, math (11).
        group: coefficients that share a scale; 0 for one scale a vector.
        bfloat16: with 16 bits, bfloat16 instead of float16.
        model: folder or hub name of the base, of which only the configuration is read; needed for directories that do
            not tell the shapes of their layers.
        base_name: name of the base to write; None takes the directory's, without the folders above it. A packed file
            keeps its own.
        overwrite: replace the file.

    Raises:
        AdapterFilesError: the directory is incomplete, damaged or foreign.
        CoefficientCountError: coefficients do not fit the configuration.
        CoefficientValueError: coefficients are not finite.
        PrecisionError: the coefficients do not fit the precision asked for.
        OutputExistsError: the file exists and ``overwrite`` is not given.
        SaveError: the file could not be written.
    """
    check_output_file(file, paths_of(source), overwrite=overwrite)
    found = open_adapter(source).ours()
    packed = packed_of(found, bits=bits, group=group, bfloat16=bfloat16, model=model, base_name=base_name)
    packed.write(file, overwrite=overwrite)
    return verify(file)


def packed_of(
    found: SavedAdapter,
    *,
    bits: int = PACKED_BITS,
    group: int = ONE_SCALE,
    bfloat16: bool = False,
    model: str | None = None,
    base_name: str | None = None,
) -> PackedAdapter:
    """The packed adapter of a saved one; see :func:`pack_adapter`."""
    return exact(found, model=model, base_name=base_name).at(bits, group, bfloat16=bfloat16)


def exact(found: SavedAdapter, *, model: str | None = None, base_name: str | None = None) -> PackedAdapter:
    """A saved adapter with its coefficients as they are stored; arguments as for :func:`pack_adapter`."""
    if found.whole is not None:
        return found.whole
    stored = {(one.matrix.name, one.matrix.part): one for one in _tied(_stored(found, model), found.config.tie)}
    config, tensors = found.config, found.load()
    extra = {name: tensor for name, tensor in tensors.items() if f".{PREFIX}" not in name}
    _check_meaning(found, [one.matrix for one in stored.values()], tensors)
    _check_complete(found, stored.values(), tensors.keys() - extra.keys())
    name = base_name or _plain_name(config.base_model_name_or_path)
    base = Base(name, config.base_model_type, config.base_weights)
    groups = group_matrices(one.matrix for one in stored.values())
    options = short_options(config, [one.matrix for one in stored.values()])
    spec = Spec(bare(config.method_for("")), base, groups, 32, 0, (), options, found.task, config.tie)
    ordered = [stored[one.name, one.part] for one in spec.matrices]
    for one in ordered:
        coefficients = {name: tensors[tensor] for name, tensor in one.tensors.items()}
        check_coefficients(coefficients, one.matrix.shapes, f"{found.weights}: {one.matrix.name}")
    own = [one for place, one in enumerate(ordered) if spec.owners[place] == place]
    values = _joined(found, [tensors[tensor] for one in own for tensor in one.tensors.values()])
    if config.quantize_coefficients is not None:
        values = rounded(values, spec.vector_lengths, config.quantize_coefficients)
    streams = [tensors[one.streams[0]][one.streams[1]] for one in ordered if one.streams]
    return PackedAdapter.of(
        spec,
        values,
        streams=torch.stack(streams) if streams else None,
        extra=extra,
    )


def packed_bytes(
    config: RandbasisConfig, base: Base, layers: Iterable[tuple[str, int, Sequence[AdaptedPart]]], *, bits: int = 16
) -> int:
    """Size of the file that :func:`pack_adapter` writes of an adapter that is not there, without a head.

    Args:
        config: of the adapter.
        base: the base model.
        layers: module path, output rows and adapted matrices of each layer.
        bits: of a coefficient.
    """
    matrices = [
        SpecMatrix(
            key, one.part.name, one.part.start, one.part.rows, out, one.bound.in_features, bare(one.bound.method)
        )
        for key, out, parts in layers
        for one in parts
    ]
    groups = group_matrices(matrices)
    options = short_options(config, matrices)
    spec = Spec(bare(config.method_for("")), base, groups, bits, 0, peft=options, tie=config.tie)
    streams = None if spec.streams_shape is None else torch.tensor(spec.streams_of_paths, dtype=torch.int64)
    return len(PackedAdapter.of(spec, torch.zeros(spec.count), streams=streams).to_bytes())


def _stored(found: SavedAdapter, model: str | None) -> Iterator[_Stored]:
    config = found.config
    for key, (out, in_) in layer_shapes(found, model).items():
        method = bare(config.method_for(key))
        path = SAVED_PREFIX + key
        for index, part in enumerate(_parts(found, key, out, model)):
            matrix = SpecMatrix(key, part.name, part.start, part.rows, out, in_, method)
            names = {name: f"{path}.{PREFIX}{name}{part.suffix}.weight" for name in matrix.shapes}
            streams = None if method.shares_basis else (f"{path}.{STREAMS}.weight", index)
            yield _Stored(matrix, names, streams)


def _tied(stored: Iterable[_Stored], tie: str) -> list[_Stored]:
    """With the tensors of those that hold the coefficients for others too."""
    listed = list(stored)
    places = holders([one.matrix for one in listed], tie)
    return [replace(one, tensors=listed[place].tensors) for one, place in zip(listed, places, strict=True)]


def layer_shapes(found: SavedAdapter, model: str | None) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of each adapted layer, as the base model has it, or as the adapter was saved with.

    Args:
        found: the adapter.
        model: folder or hub name of the base, of which only the configuration is read; None takes what was saved.

    Raises:
        AdapterFilesError: the adapter does not say it.
        BaseMismatchError: the base model has no such layer.
    """
    if model is not None:
        known = linear_shapes(meta_model(read_config(model)))
        with found.on(model):
            return {key: _same_shape(found, key, shape_of(key, known)) for key in found.modules}
    shapes = {key: expected_shape(found.config.base_shapes, key) for key in found.modules}
    unknown = next((key for key, shape in shapes.items() if shape is None), None)
    if unknown is not None:
        raise AdapterFilesError(
            f"{found.where} must say which shape {unknown!r} has (base_shapes in its configuration), it does not; "
            "name the base model that it was made for"
        )
    return {key: shape for key, shape in shapes.items() if shape is not None}


def _same_shape(found: SavedAdapter, key: str, shape: tuple[int, int]) -> tuple[int, int]:
    """The shape of a layer in a base, unless the adapter says that it was made for another."""
    wanted = expected_shape(found.config.base_shapes, key)
    if wanted is not None and wanted != shape:
        raise BaseMismatchError(
            f"the first matrix that differs is {key!r}, {wanted[0]}×{wanted[1]} there and {shape[0]}×{shape[1]} here "
            "(out×in); give the model that the adapter was made for, or none"
        )
    return shape


def _parts(found: SavedAdapter, key: str, out: int, model: str | None) -> list[Part]:
    """The parts of a layer in the order of their rows, as the directory says or as the base model's heads tell."""
    config = found.config
    wanted = parts_of(key, config.target_slices)
    rows = {part: expected_shape(config.base_rows, f"{key}[{part}]") for part in wanted}
    if all(rows.values()):
        said = [Part(part, *bounds) for part, bounds in rows.items() if bounds is not None]
        return sorted(said, key=lambda part: part.start) or [Part("", 0, out)]
    name = model or config.base_model_name_or_path
    if not name:
        raise AdapterFilesError(
            f"{found.where} must say which rows of {key!r} its parts {wanted} are (base_rows in its configuration), it "
            "does not; name the base model that it was made for"
        )
    return resolve_parts(key, wanted, out, read_config(name).to_dict())


def _check_complete(found: SavedAdapter, stored: Iterable[_Stored], ours: set[str]) -> None:
    named: set[str] = set()
    for one in stored:
        named |= set(one.tensors.values()) | ({one.streams[0]} if one.streams else set())
    missing, unknown = sorted(named - ours), sorted(ours - named)
    if missing or unknown:
        what = f"no {missing[0]!r}" if missing else f"{unknown[0]!r}, which it does not imply"
        raise AdapterFilesError(
            f"{found.weights} must have the tensors that {CONFIG_FILE} implies, got {what}; the two files do not "
            "belong together: take the directory from where the adapter was saved"
        )


def _check_meaning(found: SavedAdapter, matrices: list[SpecMatrix], tensors: dict[str, Tensor]) -> None:
    """Take what the coefficients mean out of the tensors, and raise unless it is what the configuration says."""
    config = found.config
    method, bits = config.method_for(""), config.quantize_coefficients
    meaning = meaning_of(method, bits, matrices, config.base_weights, tie=config.tie)
    names = [name for name in tensors if name.endswith(f".{MEANING}.weight")]
    for name in names:
        meaning.check(tensors.pop(name), str(found.where))
    if not names:
        warn_of_no_meaning(meaning, str(found.where))


def _joined(found: SavedAdapter, coefficients: list[Tensor]) -> Tensor:
    dtypes = {tensor.dtype for tensor in coefficients}
    if len(dtypes) != 1 or not dtypes <= set(FLOATS):
        raise AdapterFilesError(
            f"{found.weights} must have all coefficients in one of {', '.join(map(str, FLOATS))}, got "
            f"{', '.join(sorted(map(str, dtypes)))}; save the adapter again with one dtype"
        )
    return torch.cat([tensor.reshape(-1) for tensor in coefficients])


def _plain_name(name: str | None) -> str | None:
    """A base model's name without the folders of this machine."""
    if not name:
        return None
    try:
        check_name(name, "the base model", "the adapter")
    except UnsafeNameError:
        plain = Path(name).name
        warnings.warn(
            f"the packed file names the base model {plain!r} and not {name!r}, a path of this machine; "
            "give base_name to name it otherwise",
            stacklevel=4,
        )
        return plain or None
    return name


# --- file to directory ---


def unpack_adapter(
    file: AdapterLocation, path: str | Path, *, base_name: str | None = None, overwrite: bool = False
) -> PackedAdapter:
    """Write a packed file as a PEFT directory, which ``PeftModel.from_pretrained`` reads; its task lies beside it.

    Args:
        file: the packed adapter, wherever it is; see :func:`randbasis.adapters.saved.open_packed`.
        path: the directory; see :mod:`randbasis.files.output_set` for what stays in it.
        base_name: folder or hub name of the base for the configuration; None takes the one in the file.
        overwrite: replace an adapter that is there.

    Raises:
        RandbasisError: the file breaks a rule; see :func:`randbasis.adapter_file.read`.
        OutputExistsError: the directory is not empty and ``overwrite`` is not given, or the file lies inside of it.
        LocationError: the directory is not of this machine.
        SaveError: it could not be written.
    """
    check_output_folder(path, paths_of(file), overwrite=overwrite)
    found = open_packed(file)
    adapter = exact(found)
    write_adapter_dir(adapter, path, where=found.where, base_name=base_name, overwrite=overwrite)
    return adapter


def write_adapter_dir(
    adapter: PackedAdapter,
    path: str | Path,
    *,
    where: str,
    base_name: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a packed adapter as a PEFT directory; see :func:`unpack_adapter`.

    Args:
        where: what it was read from, for messages.
    """
    config = config_of(adapter.spec, where, base_name)
    folder = check_output_folder(path, (), overwrite=overwrite)
    with replaced_set(folder) as stage:
        _write_dir(stage, adapter, config)


def _write_dir(path: Path, adapter: PackedAdapter, config: RandbasisConfig) -> None:
    save_file(named_tensors(adapter), path / WEIGHTS_FILE, metadata={"format": "pt"})
    config.save_pretrained(str(path))
    write_task(path, config.base_model_name_or_path, adapter.spec.method.name, adapter.spec.task)

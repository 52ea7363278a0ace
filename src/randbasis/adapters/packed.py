"""PEFT DIRECTORY ↔ PACKED FILE: the bridge between adapter directories, models and :mod:`randbasis.adapter_file`.

Lossless both ways at the stored precision: a file of 32 bits gives back the directory's tensors bit for bit, and what a
file of fewer bits was unpacked to packs into the same bytes again.
"""

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from randbasis.adapter_file import Base, PackedAdapter, Spec, SpecMatrix, Verification, group_matrices, read, verify
from randbasis.adapter_file.codec import rounded
from randbasis.adapter_file.paths import check_name
from randbasis.adapters.adapter_dir import AdapterDir, read_adapter_dir
from randbasis.adapters.base_model import linear_shapes, meta_model, read_config, shape_of
from randbasis.errors import (
    AdapterFilesError,
    PrecisionError,
    RandbasisError,
    SpecValueError,
    UnsafeNameError,
)
from randbasis.files.output_set import check_file_output, check_output, replaced_set
from randbasis.methods import Method, check_coefficients
from randbasis.tuner.adapted_part import AdaptedPart
from randbasis.tuner.base_shapes import compress_shapes, expected_shape
from randbasis.tuner.config import RandbasisConfig, config_class
from randbasis.tuner.meaning import MEANING, meaning_of, meaning_tensor, warn_of_no_meaning
from randbasis.tuner.registration import PREFIX
from randbasis.tuner.saved_files import CONFIG_FILE, SAVED_PREFIX, WEIGHTS_FILE
from randbasis.tuner.targets import Part, parts_of, resolve_parts

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that the coefficients of a directory may have."""
_STREAMS = f"{PREFIX}streams"
_ELSEWHERE = {
    *("method", "seed", "law", "peft_type", "peft_version", "inference_mode"),
    *("base_model_name_or_path", "base_shapes", "base_rows", "base_model_type"),
    "quantize_coefficients",
}
"""Keys of a PEFT configuration that the spec holds in its own words, or that PEFT fills in when it writes.

The values in a file are what the adapter computes with, so that what quantized them in training has no place in it.
"""
_UNORDERED = ("target_modules", "exclude_modules")


@dataclass(frozen=True)
class _Stored:
    """One adapted matrix and the names of its tensors in a directory."""

    matrix: SpecMatrix
    tensors: Mapping[str, str]
    streams: tuple[str, int] | None


# --- directory to file ---


def pack_adapter(
    source: str | Path,
    file: str | Path,
    *,
    bits: int = 16,
    group: int = 0,
    bfloat16: bool = False,
    model: str | None = None,
    base_name: str | None = None,
    overwrite: bool = False,
) -> Verification:
    """Write an adapter directory as one packed file, and read it back to verify it.

    Of an adapter that was trained with ``quantize_coefficients`` the file holds the values that it computes with,
    without loss at those bits or at 32, and is an adapter like any other; the full-precision values, which only further
    training needs, stay in the directory.

    Args:
        source: the directory.
        file: the file to write.
        bits: of a coefficient: 32 keeps the directory's dtype, 16 is float16 (bfloat16 where the directory has that),
            8, 4, 3 and 2 are codes with scales, math (11).
        group: coefficients that share a scale; 0 for one scale a vector.
        bfloat16: with 16 bits, bfloat16 instead of float16.
        model: folder or hub name of the base, of which only the configuration is read; needed for directories that do
            not tell the shapes of their layers.
        base_name: name of the base to write; None takes the directory's, without the folders above it.
        overwrite: replace the file.

    Raises:
        AdapterFilesError: the directory is incomplete, damaged or foreign.
        CoefficientCountError: coefficients do not fit the configuration.
        CoefficientValueError: coefficients are not finite.
        PrecisionError: the coefficients do not fit the precision asked for.
        OutputExistsError: the file exists and ``overwrite`` is not given.
        SaveError: the file could not be written.
    """
    found = read_adapter_dir(source)
    check_file_output(file, (source,), overwrite=overwrite)
    packed = packed_of(found, bits=bits, group=group, bfloat16=bfloat16, model=model, base_name=base_name)
    packed.write(file, overwrite=overwrite)
    return verify(file)


def packed_of(
    found: AdapterDir,
    *,
    bits: int = 16,
    group: int = 0,
    bfloat16: bool = False,
    model: str | None = None,
    base_name: str | None = None,
) -> PackedAdapter:
    """The packed adapter of a directory; see :func:`pack_adapter`."""
    stored = {(one.matrix.name, one.matrix.part): one for one in _stored(found, model)}
    config, tensors = found.config, found.load()
    extra = {name: tensor for name, tensor in tensors.items() if f".{PREFIX}" not in name}
    _check_meaning(found, [one.matrix for one in stored.values()], tensors)
    _check_complete(found, stored.values(), tensors.keys() - extra.keys())
    base = Base(base_name or _plain_name(config.base_model_name_or_path), config.base_model_type)
    groups = group_matrices(one.matrix for one in stored.values())
    spec = Spec(_bare(config.method_for("")), base, groups, bits, group, peft=_peft_options(config))
    ordered = [stored[one.name, one.part] for one in spec.matrices]
    for one in ordered:
        coefficients = {name: tensors[tensor] for name, tensor in one.tensors.items()}
        check_coefficients(coefficients, one.matrix.shapes, f"{found.weights}: {one.matrix.name}")
    values = _joined(found, [tensors[tensor] for one in ordered for tensor in one.tensors.values()])
    if config.quantize_coefficients is not None:
        values = rounded(values, spec.vector_lengths, config.quantize_coefficients)
    if bfloat16 and bits != 16:
        raise PrecisionError(f"bfloat16 has 16 bits, got bits={bits}; leave one of the two out")
    streams = [tensors[one.streams[0]][one.streams[1]] for one in ordered if one.streams]
    return PackedAdapter.of(
        spec,
        values.bfloat16() if bfloat16 else values,
        streams=torch.stack(streams) if streams else None,
        extra=extra,
    )


def packed_bytes(config: RandbasisConfig, base: Base, layers: Iterable[tuple[str, int, Sequence[AdaptedPart]]]) -> int:
    """Size of the file that :func:`pack_adapter` writes at 16 bits of an adapter that is not there, without a head.

    Args:
        config: of the adapter.
        base: the base model.
        layers: module path, output rows and adapted matrices of each layer.
    """
    matrices = [
        SpecMatrix(
            key, one.part.name, one.part.start, one.part.rows, out, one.bound.in_features, _bare(one.bound.method)
        )
        for key, out, parts in layers
        for one in parts
    ]
    spec = Spec(_bare(config.method_for("")), base, group_matrices(matrices), 16, 0, peft=_peft_options(config))
    own = [one for one in matrices if not one.method.shares_basis]
    streams = torch.zeros(len(own), len(own[0].method.roles), dtype=torch.int64) if own else None
    return len(PackedAdapter.of(spec, torch.zeros(spec.count), streams=streams).to_bytes())


def _stored(found: AdapterDir, model: str | None) -> Iterator[_Stored]:
    config = found.config
    for key, (out, in_) in _layer_shapes(found, model).items():
        method = _bare(config.method_for(key))
        path = SAVED_PREFIX + key
        for index, part in enumerate(_parts(found, key, out, model)):
            matrix = SpecMatrix(key, part.name, part.start, part.rows, out, in_, method)
            names = {name: f"{path}.{PREFIX}{name}{part.suffix}.weight" for name in matrix.shapes}
            streams = None if method.shares_basis else (f"{path}.{_STREAMS}.weight", index)
            yield _Stored(matrix, names, streams)


def _layer_shapes(found: AdapterDir, model: str | None) -> dict[str, tuple[int, int]]:
    if model is not None:
        known = linear_shapes(meta_model(read_config(model)))
        return {key: shape_of(key, known) for key in found.modules}
    shapes = {key: expected_shape(found.config.base_shapes, key) for key in found.modules}
    unknown = next((key for key, shape in shapes.items() if shape is None), None)
    if unknown is not None:
        raise AdapterFilesError(
            f"{found.path} must say which shape {unknown!r} has (base_shapes in its configuration), it does not; "
            "name the base model that it was made for"
        )
    return {key: shape for key, shape in shapes.items() if shape is not None}


def _parts(found: AdapterDir, key: str, out: int, model: str | None) -> list[Part]:
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
            f"{found.path} must say which rows of {key!r} its parts {wanted} are (base_rows in its configuration), it "
            "does not; name the base model that it was made for"
        )
    return resolve_parts(key, wanted, out, read_config(name).to_dict())


def _check_complete(found: AdapterDir, stored: Iterable[_Stored], ours: set[str]) -> None:
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


def _check_meaning(found: AdapterDir, matrices: list[SpecMatrix], tensors: dict[str, Tensor]) -> None:
    """Take what the coefficients mean out of the tensors, and raise unless it is what the configuration says."""
    meaning = meaning_of(found.config.method_for(""), found.config.quantize_coefficients, matrices)
    names = [name for name in tensors if name.endswith(f".{MEANING}.weight")]
    for name in names:
        meaning.check(tensors.pop(name), str(found.path))
    if not names:
        warn_of_no_meaning(meaning, str(found.path))


def _joined(found: AdapterDir, coefficients: list[Tensor]) -> Tensor:
    dtypes = {tensor.dtype for tensor in coefficients}
    if len(dtypes) != 1 or not dtypes <= set(FLOATS):
        raise AdapterFilesError(
            f"{found.weights} must have all coefficients in one of {', '.join(map(str, FLOATS))}, got "
            f"{', '.join(sorted(map(str, dtypes)))}; save the adapter again with one dtype"
        )
    return torch.cat([tensor.reshape(-1) for tensor in coefficients])


def _peft_options(config: RandbasisConfig) -> dict[str, Any]:
    """The options that are not the usual ones and that the spec does not hold in its own words."""
    mine, usual = (_plain(one.to_dict()) for one in (config, config_class(config.method)()))
    held = _ELSEWHERE | config.hyperparameters().keys()
    options = {key: value for key, value in mine.items() if key not in held and value != usual[key]}
    for key in _UNORDERED:
        if isinstance(options.get(key), list):
            options[key].sort()
    return options


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(options, default=sorted))


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


def _is_of(method: Method, wanted: Method) -> bool:
    return method == wanted or _bare(method) == wanted


def _bare(method: Method) -> Method:
    return replace(method, basis_storage="auto")


# --- file to directory ---


def unpack_adapter(
    file: str | Path, path: str | Path, *, base_name: str | None = None, overwrite: bool = False
) -> PackedAdapter:
    """Write a packed file as a PEFT directory, which ``PeftModel.from_pretrained`` reads.

    Args:
        file: the packed file.
        path: the directory; see :mod:`randbasis.files.output_set` for what stays in it.
        base_name: folder or hub name of the base for the configuration; None takes the one in the file.
        overwrite: replace an adapter that is there.

    Raises:
        RandbasisError: the file breaks a rule; see :func:`randbasis.adapter_file.read`.
        OutputExistsError: the directory is not empty and ``overwrite`` is not given, or the file lies inside of it.
        LocationError: the directory is not of this machine.
        SaveError: it could not be written.
    """
    check_output(path, (file,), overwrite=overwrite)
    adapter = read(file)
    write_adapter_dir(adapter, path, where=str(file), base_name=base_name, overwrite=overwrite)
    return adapter


def write_adapter_dir(
    adapter: PackedAdapter,
    path: str | Path,
    *,
    where: str,
    base_name: str | None = None,
    overwrite: bool = False,
    beside: Mapping[str, str] | None = None,
) -> None:
    """Write a packed adapter as a PEFT directory; see :func:`unpack_adapter`.

    Args:
        where: what it was read from, for messages.
        beside: name → text of further files of the directory.
    """
    config = config_of(adapter.spec, where, base_name)
    folder = check_output(path, (), overwrite=overwrite)
    with replaced_set(folder) as stage:
        _write_dir(stage, adapter, config)
        for name, text in (beside or {}).items():
            (stage / name).write_text(text, encoding="utf-8")


def _write_dir(path: Path, adapter: PackedAdapter, config: RandbasisConfig) -> None:
    save_file(_named_tensors(adapter), path / WEIGHTS_FILE, metadata={"format": "pt"})
    config.save_pretrained(str(path))


def _named_tensors(adapter: PackedAdapter) -> dict[str, Tensor]:
    tensors = dict(adapter.extra)
    streams: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    for one, delta in adapter.matrices():
        suffix = Part(one.part, one.start, one.start + one.rows).suffix
        for name, values in delta.coefficients.items():
            tensors[f"{SAVED_PREFIX}{one.name}.{PREFIX}{name}{suffix}.weight"] = values.clone()
        streams.setdefault(one.name, []).append((one.start, delta.bound.site.streams))
    if adapter.streams is not None:
        for name, rows in streams.items():
            stored = torch.tensor([values for _, values in sorted(rows)], dtype=torch.int64)
            tensors[f"{SAVED_PREFIX}{name}.{_STREAMS}.weight"] = stored
    return tensors | meaning_tensor(adapter.spec.method, None, adapter.spec.matrices)


def config_of(spec: Spec, where: str, base_name: str | None = None) -> RandbasisConfig:
    """The PEFT configuration of a spec.

    Args:
        spec: of a packed adapter.
        where: what it was read from, for messages.
        base_name: folder or hub name of the base; None takes the spec's.

    Raises:
        SpecValueError: the options for PEFT mean other matrices, methods or values than the spec lists.
        RandbasisError: an option is one that the method cannot take.
    """
    common = spec.method
    rows = {f"{one.name}[{one.part}]": (one.start, one.start + one.rows) for one in spec.matrices if one.part}
    told: dict[str, Any] = {
        **{key: value for key, value in vars(common).items() if key != "basis_storage"},
        "method": common.name,
        "base_model_name_or_path": base_name or spec.base.name,
        "base_model_type": spec.base.architecture,
        "base_shapes": compress_shapes(spec.shapes),
        "base_rows": compress_shapes(rows) or None,
        "inference_mode": True,
    }
    # A file that another writer made may not say how PEFT picks the layers: by their paths, then.
    picked: dict[str, Any] = {"target_modules": list(spec.shapes)}
    try:
        config = RandbasisConfig(**(picked | deepcopy(dict(spec.peft)) | told))  # PEFT writes into lists
        agrees = not (spec.peft.keys() & told.keys()) and _means(config, spec)
    except RandbasisError as error:
        raise type(error)(f"{where}: {error}") from error
    except (TypeError, KeyError, AttributeError, ValueError, re.error) as error:
        raise SpecValueError(
            f"{where}: peft in the spec must hold options of {common.name}, but {type(error).__name__}: {error}; "
            "pack the adapter again"
        ) from error
    if not agrees:
        raise SpecValueError(
            f"{where}: peft in the spec must mean the matrices and hyper-parameters that the spec lists, got "
            f"{dict(spec.peft)}; pack the adapter again"
        )
    return config


def _means(config: RandbasisConfig, spec: Spec) -> bool:
    """Whether a configuration gives each matrix of a spec the same method, and each layer the same parts."""
    parts: dict[str, set[str]] = {}
    for one in spec.matrices:
        parts.setdefault(one.name, set()).update([one.part] if one.part else [])
    return (
        config.quantize_coefficients is None
        and all(set(parts_of(name, config.target_slices)) == named for name, named in parts.items())
        and all(_is_of(config.method_for(one.name), one.method) for one in spec.matrices)
    )

"""FOREIGN ADAPTER → OURS: the nearest NOLA, VeRA or PRANC of a seed to each ΔW, as an adapter directory."""

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import check_target_module_exists  # pyright: ignore[reportUnknownVariableType]
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from randbasis.adapter_file import SpecMatrix
from randbasis.adapters.base_model import linear_shapes, meta_model, read_config, shape_of
from randbasis.adapters.saved import write_task
from randbasis.errors import BaseMismatchError, CoefficientValueError, ResidualError, TieError, UnknownMethodError
from randbasis.files.output_checks import check_output_folder
from randbasis.files.output_set import replaced_set
from randbasis.importing.least_squares import NEAREST, Bases, Fit, Stop, nearest, relative
from randbasis.importing.peft_adapter import PeftAdapter, read_peft_adapter
from randbasis.methods import Factors, Method, Site
from randbasis.progress import Track
from randbasis.ties import UNTIED
from randbasis.tuner.base_shapes import compress_shapes
from randbasis.tuner.config import NolaConfig, RandbasisConfig
from randbasis.tuner.meaning import meaning_tensor
from randbasis.tuner.registration import PREFIX
from randbasis.tuner.saved_files import SAVED_PREFIX, WEIGHTS_FILE

TARGET_WORDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Options of PEFT that pick the layers."""

_Fits = dict[str, tuple[Site, Fit]]


@dataclass(frozen=True)
class ImportedMatrix:
    """One matrix as it was and as it became.

    Attributes:
        name: module path in the base model.
        out_features: rows of ΔW.
        in_features: columns of ΔW.
        norm: ``‖ΔW‖``.
        distance: ``‖ΔW − ΔŴ‖``.
        turns: of the two halves of the least squares.
    """

    name: str
    out_features: int
    in_features: int
    norm: float
    distance: float
    turns: int

    @property
    def residual(self) -> float:
        """``‖ΔW − ΔŴ‖ / ‖ΔW‖``."""
        return relative(self.distance, self.norm)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "out": self.out_features,
            "in": self.in_features,
            "norm": self.norm,
            "residual": self.residual,
            "turns": self.turns,
        }


@dataclass(frozen=True)
class ImportedAdapter:
    """What was written, and how far it is from what was read.

    Attributes:
        output: the directory.
        source: method of PEFT.
        method: of this package.
        coefficients: how many there are now.
        parameters: how many numbers the source has for the same matrices, without its random matrices and its head.
        head: tensors of what was trained whole beside the adapter, copied as they are.
        matrices: one entry for each.
    """

    output: Path
    source: str
    method: str
    coefficients: int
    parameters: int
    head: int
    matrices: tuple[ImportedMatrix, ...]

    @property
    def residual(self) -> float:
        """``‖ΔW − ΔŴ‖ / ‖ΔW‖`` of all matrices together."""
        distance = math.hypot(*(one.distance for one in self.matrices))
        return relative(distance, math.hypot(*(one.norm for one in self.matrices)))

    @property
    def worst(self) -> ImportedMatrix:
        """The matrix with the largest residual."""
        return max(self.matrices, key=lambda one: one.residual)

    @property
    def mean(self) -> float:
        """Mean of the residuals of the matrices."""
        return math.fsum(one.residual for one in self.matrices) / len(self.matrices)

    def as_json(self) -> dict[str, Any]:
        """Plain values, one row a matrix."""
        return {
            "output": str(self.output),
            "source": self.source,
            "method": self.method,
            "matrices": len(self.matrices),
            "coefficients": self.coefficients,
            "source_parameters": self.parameters,
            "head_tensors": self.head,
            "residual": self.residual,
            "worst_residual": self.worst.residual,
            "worst_matrix": self.worst.name,
            "mean_residual": self.mean,
            "rows": [one.as_json() for one in self.matrices],
        }


def import_as_nearest(
    source: str | Path,
    output: str | Path,
    config: RandbasisConfig,
    *,
    model: str | None = None,
    limit: float | None = None,
    stop: Stop | None = None,
    overwrite: bool = False,
    track: Track = iter,
) -> ImportedAdapter:
    """Write the NOLA, VeRA or PRANC of a seed that is nearest to an adapter of PEFT, as an adapter directory.

    A few hundred numbers cannot say what a LoRA of other random matrices says: the residual is then near 1. It is 0, up
    to rounding, where the adapter was one of this seed and configuration. The task of a training run comes along.

    Args:
        source: directory of PEFT's LoRA, or of VeRA or RandLoRA with its random matrices.
        output: directory to write.
        config: method, seed, law and the other hyper-parameters; its targets are those of the source.
        model: folder or hub name of the base, of which only the configuration is read; LoRA can do without.
        limit: largest residual of all matrices together; nothing is written above it.
        stop: when the least squares end.
        overwrite: replace the output.
        track: shows the progress over the matrices.

    Raises:
        UnknownMethodError: the method is none of these.
        TieError: matrices are to share their coefficients.
        ResidualError: the residual is above the limit.
        CoefficientValueError: the source has a value that is not finite.
        OutputExistsError: the output exists, or is the source.
        SaveError: it could not be written.
        RandbasisError: what :func:`randbasis.importing.read_peft_adapter` refuses.
    """
    folder = check_output_folder(output, (source, model), overwrite=overwrite)
    if config.method not in NEAREST:
        raise UnknownMethodError(
            f"an adapter of PEFT becomes the nearest of {', '.join(map(repr, NEAREST))}, got {config.method!r}; use "
            "one of these, or merge it into its base model"
        )
    if config.tie != UNTIED:
        raise TieError(
            f"the nearest adapter is found for each matrix by itself, which needs tie={UNTIED!r}, got {config.tie!r}; "
            "import without it, or train a tied adapter on the data"
        )
    found = read_peft_adapter(source, model)
    base_type = None if model is None else _checked_type(found, model)
    bases, methods, fits = Bases(), dict[str, Method](), _Fits()
    with torch.no_grad():
        for key in track(found.layers):
            methods[key] = config.method_for(key)
            site = Site(*found.shape(key), methods[key].streams(key))
            bound = replace(methods[key], basis_storage="recompute").bind(site)  # a basis is asked for once
            fits[key] = site, nearest(bound, finite_factors(found, key), bases=bases, stop=stop)
    result = _result(found, folder, methods, fits)
    check_limit(result.residual, limit, f"the nearest {config.method} of this configuration")
    made = _config(found, config, model, base_type)
    tensors = found.load(found.head) | _tensors(fits, methods) | _meaning(fits, methods, made)
    with replaced_set(folder) as stage:
        save_file(tensors, stage / WEIGHTS_FILE, metadata={"format": "pt"})
        made.save_pretrained(str(stage))
        write_task(stage, found.saved.base_model, config.method, found.saved.task)
    return result


def finite_factors(found: PeftAdapter, key: str) -> Factors:
    """The factors of a layer.

    Raises:
        CoefficientValueError: a value is not finite.
    """
    factors = found.factors(key)
    for one in (factors.up, factors.down):
        if one is not None and not bool(torch.isfinite(one).all()):
            raise CoefficientValueError(
                f"{found.path}: the values of {key!r} must be finite, got one that is not; use an earlier checkpoint"
            )
    return factors


def check_limit(residual: float, limit: float | None, what: str) -> None:
    """Raise if something is further from its source than the caller allows.

    Args:
        residual: ``‖ΔW − ΔŴ‖ / ‖ΔW‖`` of all matrices together.
        limit: the largest that is allowed; None allows all.
        what: is that far.

    Raises:
        ResidualError: the residual is above the limit.
    """
    if limit is not None and not residual <= limit:
        raise ResidualError(
            f"limit {limit} is the largest residual ‖ΔW − ΔŴ‖ / ‖ΔW‖ that was allowed, {what} is {residual:.4g} away "
            "and was not written; allow more coefficients or rank, raise the limit, or train on the data instead"
        )


def target_words(found: PeftAdapter) -> dict[str, Any]:
    """What picks the layers of an adapter: its own words where they pick them all, else the path of each."""
    words = {name: found.options.get(name) for name in TARGET_WORDS}
    probe = NolaConfig(**cast("Any", words))
    if words["target_modules"] and all(check_target_module_exists(probe, key) for key in found.layers):
        return words
    return {"target_modules": found.layers}


def _result(found: PeftAdapter, output: Path, methods: Mapping[str, Method], fits: _Fits) -> ImportedAdapter:
    own = {f"{SAVED_PREFIX}{key}.{name}" for key in found.layers for name in found.tensors}
    return ImportedAdapter(
        output,
        found.kind,
        next(iter(methods.values())).name,
        sum(methods[key].count(one.out_features, one.in_features) for key, (one, _) in fits.items()),
        sum(math.prod(found.stored[name]) for name in own),
        len(found.head),
        tuple(
            ImportedMatrix(key, one.out_features, one.in_features, fit.norm, fit.distance, len(fit.residuals))
            for key, (one, fit) in fits.items()
        ),
    )


def _tensors(fits: _Fits, methods: Mapping[str, Method]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for key, (site, fit) in fits.items():
        for name, values in fit.coefficients.items():
            tensors[f"{SAVED_PREFIX}{key}.{PREFIX}{name}.weight"] = values.contiguous()
        if not methods[key].shares_basis:
            tensors[f"{SAVED_PREFIX}{key}.{PREFIX}streams.weight"] = torch.tensor([site.streams], dtype=torch.int64)
    return tensors


def _meaning(fits: _Fits, methods: Mapping[str, Method], made: RandbasisConfig) -> dict[str, Tensor]:
    matrices = [
        SpecMatrix(key, "", 0, one.out_features, one.out_features, one.in_features, methods[key])
        for key, (one, _) in fits.items()
    ]
    return meaning_tensor(made.method_for(""), made.quantize_coefficients, matrices)


def _config(found: PeftAdapter, config: RandbasisConfig, model: str | None, base_type: str | None) -> RandbasisConfig:
    """The configuration of what was made: hyper-parameters as asked for, layers and head those of the source."""
    told: dict[str, Any] = {
        **dict.fromkeys(TARGET_WORDS),
        **target_words(found),
        "modules_to_save": found.options.get("modules_to_save"),
        "task_type": found.options.get("task_type"),
        "base_model_name_or_path": model or found.options.get("base_model_name_or_path"),
        "base_model_type": base_type,
        "base_shapes": compress_shapes({key: found.shape(key) for key in found.layers}),
        "inference_mode": True,
    }
    return type(config)(**(deepcopy(config.to_dict()) | told))


def _checked_type(found: PeftAdapter, model: str) -> str:
    """``model_type`` of the base, whose layers must have these shapes."""
    base = read_config(model)
    known = linear_shapes(meta_model(base))
    for key in found.layers:
        (out, in_), (rows, cols) = found.shape(key), shape_of(key, known)
        if (out, in_) != (rows, cols):
            raise BaseMismatchError(
                f"{found.path}: {key!r} is {out}×{in_} (out×in) in the adapter, but {rows}×{cols} in {model}; "
                "name the base model that it was made for"
            )
    return str(base.model_type)

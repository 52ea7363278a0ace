"""What a saved adapter holds: counts, and norm and spectrum of each ΔW, without the base model's weights."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from randbasis.adapters.base_model import hollow_model, read_config
from randbasis.adapters.packed import layer_shapes
from randbasis.adapters.saved import AdapterLocation, SavedAdapter, open_adapter
from randbasis.errors import AdapterFilesError
from randbasis.methods import Factors, no_weights
from randbasis.progress import Track
from randbasis.tuner.adapted_part import AdaptedPart
from randbasis.tuner.config import RandbasisConfig
from randbasis.tuner.layer import RandbasisLinear
from randbasis.tuner.registration import PREFIX

FULL_SPECTRUM_SIDE = 4096
"""Smaller side up to which the spectrum of a ΔW that is not of low rank is computed, by default."""


@dataclass(frozen=True)
class MatrixReport:
    """One adapted matrix.

    Attributes:
        name: module path in the base model.
        part: part of a fused projection, empty for the whole layer.
        out_features: rows of ΔW.
        in_features: columns of ΔW.
        coefficients: how many it has; 0 where an earlier matrix has them for it (``tie``).
        norm: Frobenius norm of ΔW.
        singular_values: of ΔW, largest first, as many as its factors allow; None where ΔW was too large for them.
    """

    name: str
    part: str
    out_features: int
    in_features: int
    coefficients: int
    norm: float
    singular_values: tuple[float, ...] | None

    @property
    def spectral_norm(self) -> float | None:
        """The largest singular value."""
        return None if self.singular_values is None else max(self.singular_values, default=0.0)

    @property
    def effective_rank(self) -> float | None:
        """``exp(−Σ pᵢ ln pᵢ)``, ``pᵢ = σᵢ / Σ σ`` (Roy and Vetterli, EUSIPCO 2007); 0 for ΔW = 0."""
        if self.singular_values is None:
            return None
        total = math.fsum(self.singular_values)
        shares = [value / total for value in self.singular_values if value > 0]
        return math.exp(-math.fsum(share * math.log(share) for share in shares)) if shares else 0.0

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        values = self.singular_values
        return {
            "name": self.name,
            "part": self.part,
            "out": self.out_features,
            "in": self.in_features,
            "coefficients": self.coefficients,
            "norm": self.norm,
            "spectral_norm": self.spectral_norm,
            "effective_rank": self.effective_rank,
            "singular_values": None if values is None else [float(f"{value:.6g}") for value in values],
        }


@dataclass(frozen=True)
class Inspection:
    """What a saved adapter holds.

    Attributes:
        adapter: where it is.
        base_model: folder or hub name of the base that it names.
        config: its configuration.
        head_parameters: what was trained whole beside the adapter.
        bytes: size of the file of tensors.
        matrices: one entry for each adapted matrix, in the model's order.
        task: what it was trained for, as training described it; empty where nobody did.
    """

    adapter: str
    base_model: str
    config: RandbasisConfig
    head_parameters: int
    bytes: int
    matrices: tuple[MatrixReport, ...]
    task: Mapping[str, Any]

    @property
    def coefficients(self) -> int:
        """All coefficients."""
        return sum(matrix.coefficients for matrix in self.matrices)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The hyper-parameters of the method, seed and law first."""
        options = self.config.hyperparameters()
        return {"seed": options.pop("seed"), "law": options.pop("law"), **options}

    def as_json(self) -> dict[str, Any]:
        """Plain values, one row a matrix."""
        return {
            "adapter": self.adapter,
            "base_model": self.base_model,
            "task": dict(self.task) or None,
            "method": self.config.method,
            "seed": self.config.seed,
            "law": self.config.law,
            "options": self.hyperparameters,
            "coefficients": self.coefficients,
            "head_parameters": self.head_parameters,
            "bytes": self.bytes,
            "matrices": len(self.matrices),
            "rows": [matrix.as_json() for matrix in self.matrices],
        }


def inspect_adapter(
    adapter: AdapterLocation,
    model: str | None = None,
    *,
    full_spectrum_side: int = FULL_SPECTRUM_SIDE,
    track: Track = iter,
) -> Inspection:
    """Read an adapter and look at each of its ΔW.

    Args:
        adapter: where it is: see :func:`randbasis.adapters.saved.open_adapter`.
        model: folder or hub name of the base, of which only the configuration is read. None takes the shapes that the
            adapter was saved with; slices of attention projections need the configuration all the same.
        full_spectrum_side: smaller side up to which a ΔW that is not of low rank gets a spectrum.
        track: shows the progress over the adapted matrices, such as ``rich.progress.track``.

    Raises:
        AdapterFilesError: a file is missing, damaged or foreign.
        RandbasisError: as :func:`randbasis.adapters.saved.open_adapter`.
        BaseMismatchError: the adapter was made for another base model.
        CoefficientCountError: coefficients do not fit the configuration.
        CoefficientValueError: coefficients are not finite.
        BaseWeightError: ΔW is made of the weights of the base model too.
        DataMissingError: the configuration of the base model is needed and cannot be read.
    """
    found = open_adapter(adapter).ours()
    if found.config.method_cls.needs_base:
        raise no_weights(found.config.method)
    adapted = _restored(found, model)
    entries = [(key, layer, one) for key, layer in _layers(adapted) for one in layer.matrices("default")]
    reports: list[MatrixReport] = []
    for key, layer, one in track(entries):
        norm, values = _spectrum(layer, one, full_spectrum_side)
        out, in_ = one.bound.out_features, one.bound.in_features
        reports.append(MatrixReport(key, one.part.name, out, in_, one.count, norm, values))
    return Inspection(
        found.where,
        model or found.config.base_model_name_or_path or "",
        found.config,
        sum(torch.Size(shape).numel() for shape in found.head.values()),
        found.bytes,
        tuple(reports),
        found.task,
    )


def spectrum(factors: Factors) -> Tensor:
    """Singular values of ``ΔW = up @ down``, largest first: by two thin QR decompositions where the rank is low.

    Args:
        factors: ``[out, q]`` and ``[q, in]``.
    """
    up, down = factors.up, factors.down
    if up is None or up.shape[1] >= min(up.shape[0], down.shape[1]):
        return _singular_values(factors.matrix())
    qr = cast("Callable[[Tensor], tuple[Tensor, Tensor]]", torch.linalg.qr)
    return _singular_values(qr(up)[1] @ qr(down.T)[1].T)


def _singular_values(matrix: Tensor) -> Tensor:
    return cast("Any", torch.linalg.svdvals)(matrix)


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(cast("list[float]", values.tolist()))


def _spectrum(layer: RandbasisLinear, one: AdaptedPart, side: int) -> tuple[float, tuple[float, ...] | None]:
    """Norm and singular values of one ΔW in float64."""
    smaller = min(one.bound.out_features, one.bound.in_features)
    delta = one.bound.delta({name: c.detach() for name, c in layer.coefficients("default", one).items()}).double()
    if one.bound.rank < smaller:
        values = _numbers(spectrum(delta.factors()))
        return math.hypot(*values), values
    matrix = delta.matrix()
    norm = math.sqrt(float(matrix.square().sum()))
    return norm, _numbers(_singular_values(matrix)) if smaller <= side else None


def _restored(found: SavedAdapter, model: str | None) -> PeftModel:
    """The adapter with its coefficients, on a model that has only the layers it adapts."""
    hollow = hollow_model(layer_shapes(found, model), _model_config(found, model))
    adapted = cast("PeftModel", get_peft_model(cast("Any", hollow), found.bare_config(hollow)))
    tensors = {name: tensor for name, tensor in found.load().items() if f".{PREFIX}" in name}
    set_peft_model_state_dict(adapted, tensors)
    return adapted


def _model_config(found: SavedAdapter, model: str | None) -> dict[str, Any]:
    """The configuration of the base, which knows how many rows the q of a fused projection has; a spec says it."""
    if model is None and (found.whole is not None or not found.config.target_slices):
        return {}
    name = model or found.config.base_model_name_or_path
    if not name:
        raise AdapterFilesError(
            f"{found.where} adapts slices of fused projections and does not name its base model, whose configuration "
            "tells where they lie; name the base model"
        )
    return read_config(name).to_dict()


def _layers(adapted: PeftModel) -> Iterator[tuple[str, RandbasisLinear]]:
    for key, module in cast("Iterator[tuple[str, nn.Module]]", adapted.get_base_model().named_modules()):
        if isinstance(module, RandbasisLinear):
            yield key, module

"""What an adapter would cost on a model that is not there: counts and file sizes from a configuration alone.

The adapter is put on the base model's modules on the meta device by the same code that puts it on a real model, so a
plan holds exactly the matrices and tensors that training would have, and refuses exactly what training would refuse.
"""

import json
import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict  # pyright: ignore[reportUnknownVariableType]
from torch import nn

from randbasis.adapter_file import Base
from randbasis.adapters.base_model import meta_model, read_config
from randbasis.adapters.packed import packed_bytes
from randbasis.errors import HyperparameterError
from randbasis.methods import Bound, Method, Site
from randbasis.tuner.adapted_part import AdaptedPart
from randbasis.tuner.config import RandbasisConfig, VeraConfig
from randbasis.tuner.layer import RandbasisLinear
from randbasis.tuner.saved_files import SAVED_PREFIX
from randbasis.tuner.targets import Part

_COMMON = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern")
_DTYPES = {
    torch.float32: ("F32", 4),
    torch.float16: ("F16", 2),
    torch.bfloat16: ("BF16", 2),
    torch.int64: ("I64", 8),
    torch.uint8: ("U8", 1),
}

TensorSpecs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Tensor name → dtype and shape."""


@dataclass(frozen=True, slots=True)
class PlannedMatrix:
    """One adapted matrix.

    Attributes:
        name: module path in the base model.
        part: part of a fused projection, empty for the whole layer.
        out_features: rows of ΔW.
        in_features: columns of ΔW.
        coefficients: what is trained and saved for it; 0 where another matrix has them for it (``tie``).
    """

    name: str
    part: str
    out_features: int
    in_features: int
    coefficients: int


@dataclass(frozen=True)
class Plan:
    """Counts and sizes of an adapter, math §4; what is trained whole beside it (a head) is not counted.

    Attributes:
        model: folder or hub name.
        architecture: class of the base model.
        base_parameters: parameters of the base model: of a decoder with its output layer, of everything else without
            its head and pooler.
        method: name of the method, ``"lora"`` included.
        options: its hyper-parameters.
        matrices: one entry for each adapted matrix, in the model's order.
        bytes: size of ``adapter_model.safetensors`` with float32 coefficients, which is what is saved by default.
        bytes_16bit: the same with 16-bit coefficients.
        bytes_packed: size of the packed file at 16 bits; None for LoRA, which has none.
        expert_parameters: weights of experts that lie in three-dimensional tensors, which no adapter here changes.
    """

    model: str
    architecture: str
    base_parameters: int
    method: str
    options: Mapping[str, Any]
    matrices: tuple[PlannedMatrix, ...]
    bytes: int
    bytes_16bit: int
    bytes_packed: int | None
    expert_parameters: int

    @property
    def coefficients(self) -> int:
        """All coefficients: math (9), (13), (16), (18), (26)."""
        return sum(matrix.coefficients for matrix in self.matrices)

    @property
    def lora_rank_1(self) -> int:
        """What LoRA of rank one trains on the same matrices: Σ (in + out)."""
        return sum(matrix.in_features + matrix.out_features for matrix in self.matrices)

    def as_json(self) -> dict[str, Any]:
        """Plain values, one row a matrix."""
        return {
            "model": self.model,
            "architecture": self.architecture,
            "base_parameters": self.base_parameters,
            "method": self.method,
            "options": dict(self.options),
            "coefficients": self.coefficients,
            "bytes": self.bytes,
            "bytes_16bit": self.bytes_16bit,
            "bytes_packed": self.bytes_packed,
            "expert_parameters": self.expert_parameters,
            "lora_rank_1": self.lora_rank_1,
            "matrices": len(self.matrices),
            "rows": [
                {
                    "name": one.name,
                    "part": one.part,
                    "out": one.out_features,
                    "in": one.in_features,
                    "coefficients": one.coefficients,
                }
                for one in self.matrices
            ],
        }


@dataclass(frozen=True)
class AdaptedBase:
    """What adapters of any method have in common on one base: the matrices, looked at once.

    Attributes:
        name: of the base, as a packed file tells it.
        architecture: class of the base model.
        parts: module path, output rows of the layer, and for each matrix there its part and its columns.
        targets: modules that are adapted.
    """

    name: Base
    architecture: str
    parts: tuple[tuple[str, int, tuple[tuple[Part, int], ...]], ...]
    targets: str | list[str]

    @property
    def matrices(self) -> list[tuple[str, int, int]]:
        """Module path, rows and columns of each matrix."""
        return [(key, part.rows, in_) for key, _, parts in self.parts for part, in_ in parts]

    @property
    def entries(self) -> int:
        """Weights that are adapted: Σ in·out, the multiply-adds of a token."""
        return sum(out * in_ for _, out, in_ in self.matrices)

    @property
    def lora_rank_1(self) -> int:
        """What LoRA of rank one trains: Σ (in + out)."""
        return sum(out + in_ for _, out, in_ in self.matrices)

    def bounds(self, config: RandbasisConfig) -> list[Bound[Any]]:
        """The method of a configuration on each matrix; nothing is drawn."""
        return [one.bound for _, _, parts in self.layers(config) for one in parts]

    def layers(self, config: RandbasisConfig) -> list[tuple[str, int, list[AdaptedPart]]]:
        """What :func:`randbasis.adapters.packed.packed_bytes` counts."""
        return [
            (
                key,
                out,
                [AdaptedPart(part, _bound(config.method_for(key), part.rows, in_, key), {}) for part, in_ in parts],
            )
            for key, out, parts in self.parts
        ]

    def file_bytes(self, config: RandbasisConfig, bits: int) -> int:
        """Bytes of the packed file of an adapter of that configuration, without a head."""
        # As long as the digest that nobody knows before there are weights.
        base = replace(self.name, weights="0" * 16) if config.method_cls.needs_base else self.name
        return packed_bytes(config, base, self.layers(config), bits=bits)

    def lora(self, rank: int, bits: int) -> TensorSpecs:
        """The tensors of PEFT's LoRA of that rank on the same matrices."""
        dtype = torch.float32 if bits == 32 else torch.float16
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for key, _, parts in self.parts:
            for part, in_ in parts:
                path = f"{SAVED_PREFIX}{key}{part.suffix}"
                tensors[f"{path}.lora_A.weight"] = (dtype, (rank, in_))
                tensors[f"{path}.lora_B.weight"] = (dtype, (part.rows, rank))
        return tensors


@lru_cache(maxsize=4096)
def _bound(method: Method, out: int, in_: int, key: str) -> Bound[Any]:
    return method.bind(Site(out, in_, method.streams(key)))


def adapted_base(model: str | Path, targets: str | list[str]) -> AdaptedBase:
    """Look at a base from its configuration alone.

    Args:
        model: a folder with a ``config.json``, or a hub name.
        targets: modules to adapt, as in a configuration of PEFT.

    Raises:
        DataMissingError: the configuration of the base model cannot be read.
        RandbasisError: what putting an adapter on the model would raise, such as a target that matches nothing.
    """
    base = meta_model(read_config(str(model)))
    if hasattr(base, "pooler"):
        del base.pooler
    adapted = _adapted(base, VeraConfig(r=1, target_modules=targets, basis_storage="recompute"))
    parts = tuple(
        (key, layer.out_features, tuple((one.part, one.bound.in_features) for one in layer.matrices("default")))
        for key, layer in _layers(adapted)
    )
    name = Path(model).name if Path(model).exists() else str(model)
    # As PEFT saves it: all-linear by the names of layers.
    made = cast("str | set[str] | list[str]", cast("Any", adapted.peft_config["default"]).target_modules)
    resolved = made if isinstance(made, str) else sorted(made)
    return AdaptedBase(Base(name, cast("Any", base).config.model_type, None), type(base).__name__, parts, resolved)


def plan(model: str | Path, config: PeftConfig | None) -> Plan:
    """Count what an adapter would have, from the base model's configuration alone; no weights are read.

    Decoders are taken with, everything else without their head; ``"all-linear"`` leaves the head and the pooler out.

    Args:
        model: a folder with a ``config.json``, or a hub name.
        config: any configuration of this package, or PEFT's LoRA, whose targets may be slices here too.

    Raises:
        DataMissingError: the configuration of the base model cannot be read.
        HyperparameterError: the configuration is of another method of PEFT.
        RandbasisError: what putting the adapter on the model would raise, such as a target that matches nothing.
    """
    if not isinstance(config, (RandbasisConfig, LoraConfig)):
        kind = "no adapter" if config is None else type(config).__name__
        raise HyperparameterError(
            f"only methods of randbasis and PEFT's LoraConfig can be planned, got {kind}; use for example NolaConfig"
        )
    base = meta_model(read_config(str(model)))
    if hasattr(base, "pooler"):
        del base.pooler
    architecture, parameters = type(base).__name__, sum(p.numel() for p in base.parameters())
    experts = sum(p.numel() for name, p in base.named_parameters() if p.ndim == 3 and "expert" in name)
    adapted = _adapted(base, _counted(config))
    packed = None
    if isinstance(config, LoraConfig):
        matrices, tensors = _lora(adapted)
        options: dict[str, Any] = {"r": config.r}
    else:
        matrices = tuple(_matrices(adapted))
        tensors = _saved(adapted)
        packed = _packed(adapted, config, str(model))
        options = config.hyperparameters()
    half = {
        name: (torch.float16 if dtype.is_floating_point else dtype, shape) for name, (dtype, shape) in tensors.items()
    }
    return Plan(
        str(model),
        architecture,
        parameters,
        "lora" if isinstance(config, LoraConfig) else config.method,
        options,
        matrices,
        safetensors_bytes(tensors),
        safetensors_bytes(half),
        packed,
        experts,
    )


def safetensors_bytes(tensors: TensorSpecs) -> int:
    """Exact size of the file that PEFT's ``save_pretrained`` writes for these tensors.

    Eight bytes of length, a JSON header padded to a multiple of eight, and the values: wide dtypes first, then by name.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-_DTYPES[item[1][0]][1], item[0])):
        label, size = _DTYPES[dtype]
        end = position + size * math.prod(shape)
        header[name] = {"dtype": label, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + position


def _counted(config: RandbasisConfig | LoraConfig) -> RandbasisConfig:
    """A configuration with the same targets, of a method of ours, that keeps no basis and knows no head."""
    if isinstance(config, LoraConfig):
        counted: RandbasisConfig = VeraConfig(r=config.r, **deepcopy({name: getattr(config, name) for name in _COMMON}))
    else:
        counted = deepcopy(config)
    counted.basis_storage = "recompute"
    counted.init_weights = True
    counted.modules_to_save = None
    counted.task_type = None
    counted.base_model_name_or_path = None
    return counted


def _adapted(base: nn.Module, config: RandbasisConfig) -> PeftModel:
    with torch.device("meta"):
        return cast("PeftModel", get_peft_model(cast("Any", base), config))


def _packed(adapted: PeftModel, wanted: RandbasisConfig, model: str) -> int:
    """Size of the packed file: the options as PEFT saves them, those that were only changed for counting put back."""
    base = cast("Any", adapted.get_base_model())
    config = deepcopy(cast("RandbasisConfig", adapted.peft_config["default"]))
    config.basis_storage, config.init_weights = wanted.basis_storage, wanted.init_weights
    config.task_type = wanted.task_type
    if config.task_type is None:
        config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    name = Path(model).name if Path(model).exists() else model
    layers = ((key, layer.out_features, list(layer.matrices("default"))) for key, layer in _layers(adapted))
    weights = "0" * 16 if config.method_cls.needs_base else None  # as long as the digest that no plan knows
    return packed_bytes(config, Base(name, base.config.model_type, weights), layers)


def _layers(adapted: PeftModel) -> Iterator[tuple[str, RandbasisLinear]]:
    for key, module in cast("Iterator[tuple[str, nn.Module]]", adapted.get_base_model().named_modules()):
        if isinstance(module, RandbasisLinear):
            yield key, module


def _matrices(adapted: PeftModel) -> Iterator[PlannedMatrix]:
    for key, layer in _layers(adapted):
        for one in layer.matrices("default"):
            out, in_ = one.bound.out_features, one.bound.in_features
            yield PlannedMatrix(key, one.part.name, out, in_, one.count)


def _saved(adapted: PeftModel) -> TensorSpecs:
    state = get_peft_model_state_dict(adapted, save_embedding_layers=cast("Any", False))
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}


def _lora(adapted: PeftModel) -> tuple[tuple[PlannedMatrix, ...], TensorSpecs]:
    """LoRA's ``r (in + out)`` on the same matrices; PEFT's own cannot adapt slices, so this is by formula."""
    matrices: list[PlannedMatrix] = []
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for key, layer in _layers(adapted):
        for one in layer.matrices("default"):
            r, out, in_ = one.bound.method.r, one.bound.out_features, one.bound.in_features
            matrices.append(PlannedMatrix(key, one.part.name, out, in_, r * (in_ + out)))
            path = f"{SAVED_PREFIX}{key}{one.part.suffix}"
            tensors[f"{path}.lora_A.weight"] = (torch.float32, (r, in_))
            tensors[f"{path}.lora_B.weight"] = (torch.float32, (out, r))
    return tuple(matrices), tensors

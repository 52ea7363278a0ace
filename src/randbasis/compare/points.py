"""TRAINED RUN → POINTS: the ways to store it, each with its bytes and the model as it would come back from the file.

A LoRA can be truncated: the singular value decomposition of each ΔW, its leading terms, each quantized with one scale a
vector. That is the adapter that a small file of random coefficients has to beat, and not a LoRA of 16 bits.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from randbasis.adapter_file import Base
from randbasis.adapters.budget import stored_bytes
from randbasis.adapters.packed import packed_bytes
from randbasis.adapters.quantization import quantize_tensors
from randbasis.codes import rounded
from randbasis.compare.study import PointSpec
from randbasis.low_rank import triangular
from randbasis.train.trainer import parameter_groups
from randbasis.tuner.config import NolaConfig, RandbasisConfig
from randbasis.tuner.layer import RandbasisLinear

HEAD_BYTES = 4
"""Of a parameter of a head, in every file."""


@dataclass(frozen=True)
class Stored:
    """Bytes of one way to store a run.

    Attributes:
        total: of the file.
        head: of these, the head's.
    """

    total: int
    head: int


@contextmanager
def as_stored(model: nn.Module, spec: PointSpec) -> Generator[None]:
    """The trained model as it would come back from a file of that precision and rank, within the block."""
    parameters = parameter_groups(model)["adapter"]
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        if spec.rank is not None:
            for layer in lora_layers(model):
                _truncate(layer, spec.rank, spec.bits)
        elif spec.bits != 32:
            _set(parameters, _quantized(model, kept, spec.bits))
        yield
    finally:
        _set(parameters, kept)


def bytes_of(model: nn.Module, spec: PointSpec, head_parameters: int, overhead: int, saved: int) -> Stored:
    """What the file would have.

    Of our methods it is the packed file; of PEFT's as trained, what PEFT saves. A LoRA of few bits is in the same
    container as ours, and so is a rival that is a seed and coefficients, unless PEFT's own header is smaller.

    Args:
        model: the trained model.
        spec: how it is stored.
        head_parameters: trained numbers of the head.
        overhead: bytes of the header of a packed file for these matrices.
        saved: bytes of what PEFT itself saves, head included.
    """
    head = HEAD_BYTES * head_parameters
    if not isinstance(model, PeftModel):
        return Stored(saved, head)
    config = model.peft_config["default"]
    if isinstance(config, RandbasisConfig):
        return Stored(file_bytes(model, config, spec.bits) + head, head)
    if spec == PointSpec():
        return Stored(saved, head)
    layers = list(lora_layers(model))
    if layers:
        numbers, vectors = _numbers_of_lora(layers, spec.rank)
    else:
        sizes = [one.numel() for one in parameter_groups(model)["adapter"].values()]
        numbers, vectors = sum(sizes), len(sizes)
        overhead = min(overhead, saved - head - 4 * numbers)
    return Stored(overhead + stored_bytes(numbers, vectors, spec.bits) + head, head)


def _numbers_of_lora(layers: Iterable[LoraLayer], rank: int | None) -> tuple[int, int]:
    """Numbers and vectors, DoRA's magnitudes included."""
    numbers = vectors = 0
    for layer in layers:
        a, b = _pair(layer)
        kept = min(rank or a.shape[0], a.shape[0])
        magnitudes = _magnitudes(layer)
        numbers += kept * (a.shape[1] + b.shape[0]) + magnitudes
        vectors += 2 * kept + (magnitudes > 0)
    return numbers, vectors


def file_bytes(model: PeftModel, config: RandbasisConfig, bits: int) -> int:
    """Bytes of the packed file of an adapter of ours, without a head."""
    base: Any = model.get_base_model()
    name = str(getattr(base.config, "_name_or_path", "")).rstrip("/").rpartition("/")[2]
    weights = "0" * 16 if config.method_cls.needs_base else None
    layers = [
        (key, layer.out_features, list(layer.matrices("default")))
        for key, layer in base.named_modules()
        if isinstance(layer, RandbasisLinear)
    ]
    return packed_bytes(config, Base(name, base.config.model_type, weights), layers, bits=bits)


def header_bytes(model: nn.Module, targets: tuple[str, ...], head: list[str]) -> int:
    """Bytes of the header of a packed file for the matrices that an adapter on these targets has.

    Args:
        model: adapted in place; give one that is not used again.
        targets: names of modules.
        head: modules that are trained whole instead.
    """
    from peft import get_peft_model

    wanted = "all-linear" if targets == ("all-linear",) else list(targets)
    config = NolaConfig(
        r=1, num_basis=1, target_modules=wanted, exclude_modules=head or None, basis_storage="recompute"
    )
    adapted: Any = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    matrices = sum(len(list(one.matrices("default"))) for one in adapted.modules() if isinstance(one, RandbasisLinear))
    return file_bytes(adapted, adapted.peft_config["default"], 16) - stored_bytes(2 * matrices, 0, 16)


def lora_layers(model: nn.Module) -> Iterator[LoraLayer]:
    """The layers of a LoRA, DoRA included."""
    return (module for module in model.modules() if isinstance(module, LoraLayer))


def _pair(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    return cast(Tensor, layer.lora_A["default"].weight), cast(Tensor, layer.lora_B["default"].weight)


def _magnitudes(layer: LoraLayer) -> int:
    vectors = layer.lora_magnitude_vector
    return cast(Tensor, vectors["default"].weight).numel() if "default" in vectors else 0


@torch.no_grad()
def _truncate(layer: LoraLayer, rank: int, bits: int) -> None:
    """The leading terms of ``B A``, ``√σ`` on either side, each vector at so many bits; the other terms are 0."""
    a, b = _pair(layer)
    left, of_b = triangular(b.double())
    right, of_a = triangular(a.double().T)
    u, s, vt = cast("Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]", torch.linalg.svd)(of_b @ of_a.T)
    count = min(rank, len(s))
    root = s[:count].sqrt()
    up, down = left @ u[:, :count] * root, root[:, None] * (right @ vt[:count].T).T
    a.zero_()
    b.zero_()
    a[:count] = _vectors(down, bits).to(a.dtype)
    b[:, :count] = _vectors(up.T.contiguous(), bits).T.to(b.dtype)


def _vectors(rows: Tensor, bits: int) -> Tensor:
    """Rows at so many bits, one scale each."""
    if bits == 32:
        return rows
    flat = rows.float().flatten()
    return rounded(flat, [rows.shape[1]] * rows.shape[0], bits).view(rows.shape).to(rows.dtype)


def _quantized(model: nn.Module, values: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Coefficients with one scale a tensor, as a packed file has them; of a LoRA one scale a vector of rank one."""
    found = quantize_tensors({name: one for name, one in values.items() if not _is_of_lora(name)}, bits)
    for name, one in values.items():
        if _is_of_lora(name):
            by_row = one if "lora_A" in name or one.ndim < 2 else one.T
            rows = _vectors(by_row.reshape(-1, by_row.shape[-1]).contiguous(), bits).view(by_row.shape)
            found[name] = rows if by_row is one else rows.T
    return found


def _is_of_lora(name: str) -> bool:
    """Whether a parameter is of PEFT's LoRA; a part of a word says nothing, since ``randlora_lambda`` has it, too."""
    return any(part.startswith("lora_") for part in name.split("."))


@torch.no_grad()
def _set(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])

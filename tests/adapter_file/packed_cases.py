"""Small packed adapters: one of each method, precision and oddity that the format knows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from randbasis.adapter_file import Base, PackedAdapter, Spec, SpecMatrix, group_matrices
from randbasis.methods import Method, Nola, Pranc, RandLora, Vera

BASE = Base("acme/tiny-llama", "llama")
METHODS: dict[str, Method] = {
    "nola": Nola(r=2, num_basis=5, num_basis_b=3, alpha=2.0, seed=2**64 - 1),
    "vera": Vera(r=3, d_initial=0.1, seed=1, law="uniform"),
    "randlora": RandLora(r=3, scaling="paper", law="sparse(3)"),
    "pranc": Pranc(num_basis=4, law="normal"),
    "nola-own-basis": Nola(r=2, num_basis=3, alpha=0.5, share_basis=False, parametrization="plain"),
    "pranc-own-basis": Pranc(num_basis=2, share_basis=False),
    "nola-hashed": Nola(r=2, num_basis=5, num_basis_b=3, alpha=2.0, law="hashed"),
    "pranc-hashed": Pranc(num_basis=4, share_basis=False, law="hashed"),
}
TASK = {
    "task": "sequence-classification", "labels": ["no", "yes"], "max_length": 128, "pooling": "mean",
    "columns": {"text": "a", "text_pair": None, "label": "y"},
}  # fmt: skip
PRECISIONS = [(32, 0), (16, 0), (8, 0), (4, 0), (3, 0), (2, 0), (8, 2), (4, 3), (3, 1), (2, 4)]


def matrices(method: Method, layers: Sequence[int] = (0, 1)) -> list[SpecMatrix]:
    """A whole layer and two parts of a fused one in each layer, and one matrix with a rank of its own."""
    found: list[SpecMatrix] = []
    for layer in layers:
        found.append(SpecMatrix(f"model.layers.{layer}.up_proj", "", 0, 6, 6, 4, method))
        found.append(SpecMatrix(f"model.layers.{layer}.c_attn", "q", 0, 4, 12, 4, method))
        found.append(SpecMatrix(f"model.layers.{layer}.c_attn", "v", 8, 4, 12, 4, method))
    odd = {"num_basis": 1} if isinstance(method, Pranc) else {"r": 1}
    return [*found, SpecMatrix("score", "", 0, 3, 3, 4, replace(method, **odd))]


def numbers(count: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


def adapter_of(
    method: Method,
    bits: int = 32,
    group: int = 0,
    *,
    values: Tensor | None = None,
    adapted: Sequence[SpecMatrix] | None = None,
    extra: Mapping[str, Tensor] | None = None,
    peft: Mapping[str, Any] | None = None,
    task: Mapping[str, Any] | None = None,
) -> PackedAdapter:
    groups = group_matrices(matrices(method) if adapted is None else adapted)
    spec = Spec(method, BASE, groups, bits, group, peft=peft or {}, task=task or {})
    streams = None
    if not method.shares_basis:
        streams = torch.tensor([one.method.streams(f"{one.name}[{one.part}]") for one in spec.matrices])
    given = numbers(spec.count) if values is None else values
    return PackedAdapter.of(spec, given, streams=streams, extra=extra)


def heads() -> dict[str, Tensor]:
    """Tensors of several dtypes and shapes, an empty one and a scalar, as training leaves them beside an adapter."""
    return {
        "base_model.model.score.weight": numbers(12, 2).reshape(3, 4),
        "base_model.model.score.bias": numbers(3, 3, torch.bfloat16),
        "base_model.model.steps": torch.tensor(7),
        "base_model.model.mask": torch.tensor([True, False, True]),
        "base_model.model.none": torch.empty(0, 4, dtype=torch.float16),
    }


def content(adapter: PackedAdapter) -> tuple[Any, ...]:
    """Everything that two equal adapters have alike, bit for bit."""

    def raw(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        flat = tensor.contiguous().reshape(-1)
        return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""

    extra = {name: raw(tensor) for name, tensor in adapter.extra.items()}
    return adapter.spec, raw(adapter.coefficients), raw(adapter.scales), raw(adapter.streams), extra


#: Name → adapter: what the seed corpus of the fuzzer and the tests of whole files are made of.
CASES: dict[str, PackedAdapter] = {
    **{name: adapter_of(method, 16) for name, method in METHODS.items()},
    **{f"nola-{bits}-{group}": adapter_of(METHODS["nola"], bits, group) for bits, group in PRECISIONS},
    "bfloat16": adapter_of(METHODS["vera"], 16, values=numbers(50, 4, torch.bfloat16)),
    "task": adapter_of(METHODS["vera"], 16, task=TASK),
    "heads": adapter_of(METHODS["nola"], 4, extra=heads(), peft={"task_type": "SEQ_CLS", "dropout": 0.25}),
}

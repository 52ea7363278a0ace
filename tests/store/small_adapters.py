"""Small packed adapters: the number decides every byte."""

import hashlib

import torch

from randbasis.adapter_file import Base, PackedAdapter, Spec, SpecMatrix, group_matrices
from randbasis.methods import Nola, Vera

NOLA = Nola(seed=3, r=2, num_basis=4, alpha=2.0)
VERA = Vera(seed=3, r=4, d_initial=0.1)


def adapter(number: int, *, vera: bool = False, architecture: str = "llama", layers: int = 2) -> PackedAdapter:
    method = VERA if vera else NOLA
    matrices = [SpecMatrix(f"model.layers.{i}.q_proj", "", 0, 16, 16, 16, method) for i in range(layers)]
    spec = Spec(method, Base("base", architecture), group_matrices(matrices), 32)
    values = torch.arange(spec.count, dtype=torch.float32) + number
    return PackedAdapter.of(spec, values)


def packed(number: int, *, vera: bool = False, architecture: str = "llama", layers: int = 2) -> bytes:
    return adapter(number, vera=vera, architecture=architecture, layers=layers).to_bytes()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

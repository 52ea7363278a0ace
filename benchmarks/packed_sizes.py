"""``python -m benchmarks.packed_sizes``: what packed files of NOLA on LLaMA-2 7B, 13B and 70B weigh, as a table.

The models are modules on the meta device, the adapters real PEFT directories with random coefficients from a seeded
generator, the files written by ``randbasis pack`` and verified. The limits are those of docs/adapter-file.md.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from randbasis import NolaConfig
from randbasis.adapters.packed import pack_adapter

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16
HEADER_LIMIT = 2000
SCALE_BYTES = 4


@dataclass(frozen=True)
class Size:
    """One published architecture: width, inner width, layers, heads, key-value heads, and ``k = l`` of its NOLA."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int
    basis: int

    @property
    def coefficients(self) -> int:
        """Math (9), for seven linear layers in each block."""
        return self.layers * len(TARGETS) * 2 * self.basis

    def limit(self, bits: int) -> int:
        """Bytes that the file may have: coefficients rounded up to whole kilobytes, scales, and 2 KB."""
        scales = 0 if bits == 16 else SCALE_BYTES * self.layers * len(TARGETS) * 2
        return -(-self.coefficients * bits // 8000) * 1000 + scales + HEADER_LIMIT

    def adapted(self) -> PeftModel:
        """The model with its adapter, without memory for either."""
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            name_or_path=f"meta-llama/{self.name}-hf",
        )
        adapter = NolaConfig(
            r=RANK, num_basis=self.basis, target_modules=TARGETS, basis_storage="recompute", task_type="CAUSAL_LM"
        )
        with torch.device("meta"):
            return cast("PeftModel", get_peft_model(cast("Any", LlamaForCausalLM(config)), adapter))

    def write_directory(self, path: Path) -> None:
        """The adapter as `save_pretrained` writes it, with random coefficients."""
        model = self.adapted()
        generator = torch.Generator().manual_seed(self.basis)
        state = get_peft_model_state_dict(model, save_embedding_layers=cast("Any", False))
        tensors = {
            name: 0.1 * torch.randn(one.shape, generator=generator) if one.is_floating_point() else one
            for name, one in state.items()
        }
        path.mkdir(parents=True)
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        config = model.peft_config["default"]
        config.inference_mode = True
        config.save_pretrained(str(path))


SIZES = (
    Size("Llama-2-7b", 4096, 11008, 32, 32, 32, 128),
    Size("Llama-2-13b", 5120, 13824, 40, 40, 40, 256),
    Size("Llama-2-70b", 8192, 28672, 80, 64, 8, 512),
)


def rows() -> Iterator[tuple[Size, int, int, int]]:
    """Architecture, bits, bytes of the directory's tensors, and bytes of the packed file."""
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            directory = Path(folder) / size.name
            size.write_directory(directory)
            before = (directory / "adapter_model.safetensors").stat().st_size
            for bits in (16, 4):
                packed = pack_adapter(directory, directory.with_suffix(f".{bits}"), bits=bits)
                assert packed.adapter.spec.count == size.coefficients
                yield size, bits, before, packed.bytes


def main() -> None:
    """Print the table; a file above its limit is an error."""
    table = Table(title=f"NOLA, rank {RANK}, seven linear layers")
    for name in ("model", "k = l", "coefficients", "bits", "PEFT directory", "packed file", "limit"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for size, bits, before, after in rows():
        numbers = (size.basis, size.coefficients, bits, before, after, size.limit(bits))
        table.add_row(size.name, *(f"{number:,}" for number in numbers))
        if after > size.limit(bits):
            raise SystemExit(f"{size.name} at {bits} bits has {after} bytes, more than {size.limit(bits)}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

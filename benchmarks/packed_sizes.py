"""What packed files of NOLA on LLaMA-2 7B, 13B and 70B weigh, beside the PEFT directories that they are made from.

The models are modules on the meta device, the adapters real PEFT directories with random coefficients from a seeded
generator, the files written as ``randbasis pack`` writes them. The limits are those of docs/adapter-file.md.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.case import Built, Case, CheckFailed, Side
from randbasis import NolaConfig
from randbasis.adapters.packed import pack_adapter

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16
HEADER_LIMIT = 2000
SCALE_BYTES = 4
DIRECTORY = "PEFT directory"
PACKED = {"packed, 16 bits": 16, "packed, 4 bits": 4}


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


TINY = Size("tiny", 64, 128, 2, 4, 2, 8)


def cases(*, tiny: bool = False, everything: bool = False) -> Iterator[Case]:
    """A case an architecture.

    Args:
        tiny: one of two small layers.
        everything: no more cases.
    """
    del everything
    for size in (TINY,) if tiny else SIZES:
        yield Case(
            family="packed size",
            name=f"files of NOLA r={RANK} k={size.basis} on {size.name}",
            sides=(DIRECTORY, *PACKED),
            build=partial(_build, size),
            parameters={"model": size.name, "k = l": size.basis, "coefficients": size.coefficients},
            measure=lambda call: float(str(call())),
            quantity="bytes",
            rounds=1,
            warms_up=False,
        )


def _build(size: Size, sides: Sequence[str]) -> Built:
    weighed = _weighed(size)
    return Built({name: Side(partial(weighed.__getitem__, name)) for name in sides}, partial(_check, size, weighed))


def _weighed(size: Size) -> dict[str, int]:
    """Bytes of the directory's tensors and of the packed files."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, size.name)
        size.write_directory(directory)
        weighed = {DIRECTORY: (directory / "adapter_model.safetensors").stat().st_size}
        for name, bits in PACKED.items():
            packed = pack_adapter(directory, directory.with_suffix(f".{bits}"), bits=bits)
            if packed.contents.spec.count != size.coefficients:
                raise CheckFailed(f"{size.name} has {packed.contents.spec.count} coefficients, not {size.coefficients}")
            weighed[name] = packed.bytes
    return weighed


def _check(size: Size, weighed: dict[str, int]) -> str:
    """Every packed file against its limit."""
    for name, bits in PACKED.items():
        if weighed[name] > size.limit(bits):
            raise CheckFailed(f"{name}: {weighed[name]} bytes, more than {size.limit(bits)}")
    return "at most " + ", ".join(f"{size.limit(bits):,} at {bits} bits" for bits in PACKED.values())

"""Adapters of PEFT's own methods on tiny models, as if trained, in folders."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

TOKENS = torch.arange(24).view(2, 12)
WEIGHTS = "adapter_model.safetensors"


def seeded(kind: Any, config: Any, seed: int = 0) -> PreTrainedModel:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return kind(config).eval()


def gpt2() -> PreTrainedModel:
    """Its linear layers are ``Conv1D``, with a weight of ``[in, out]``."""
    sizes = {"vocab_size": 32, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return seeded(GPT2LMHeadModel, GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def llama() -> PreTrainedModel:
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
    return seeded(LlamaForCausalLM, LlamaConfig(**sizes, **heads))


def bert() -> PreTrainedModel:
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"intermediate_size": 48, "max_position_embeddings": 16, "num_labels": 3}
    return seeded(BertForSequenceClassification, BertConfig(**sizes, **more))


def adapted(model: PreTrainedModel, config: peft.PeftConfig, folder: Path, seed: int = 1) -> Any:
    """The model with an adapter of random values, saved in a folder."""
    with torch.random.fork_rng(devices=()):
        found = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in found.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    found.save_pretrained(str(folder))
    return found


def peft_deltas(model: Any) -> dict[str, Tensor]:
    """ΔW ``[out, in]`` of each adapted layer, as PEFT itself forms it."""
    layers: Iterator[tuple[str, nn.Module]] = model.get_base_model().named_modules()
    found: dict[str, Tensor] = {}
    for name, layer in layers:
        if isinstance(layer, BaseTunerLayer) and hasattr(layer, "get_delta_weight"):
            delta = layer.get_delta_weight("default").detach().double()
            conv = type(layer.get_base_layer()).__name__ == "Conv1D"
            found[name] = delta.T if conv else delta
    return found


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a folder in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

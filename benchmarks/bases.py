"""Base models to time adapters on: random or real weights, frozen, the same for all sides of a case."""

import copy
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

LENGTH = 128
"""Tokens of a row in training."""
CHECK_VOCABULARY = 512
GPT2_WORDS, LLAMA_WORDS = 50257, 8192
RANDOM_WEIGHTS = ", random weights"
DATA = Path(os.environ.get("RANDBASIS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
MINILM = DATA / "minilm_l6_h384"


@dataclass(frozen=True)
class Base:
    """An architecture at a size.

    Attributes:
        name: for people.
        make: a model of so many layers and so many words.
        layers: usual number of layers.
        vocabulary: usual number of words.
        targets: names of the adapted layers, or a regular expression.
        classes: of a classifier; 0 for a language model.
        transposed: whether the adapted layers hold their weights as ``[in, out]``.
    """

    name: str
    make: Callable[[int, int], nn.Module]
    layers: int
    vocabulary: int
    targets: tuple[str, ...] | str
    classes: int = 0
    transposed: bool = False

    def model(self, *, small: bool = False) -> nn.Module:
        """A frozen model in float32, without dropout, by a seed of its own.

        Args:
            small: of one layer and few words, as wide as the real one.
        """
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.make(1, CHECK_VOCABULARY) if small else self.make(self.layers, self.vocabulary)
        return model.requires_grad_(False)

    def matches(self, path: str) -> bool:
        """Whether a module is adapted."""
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, path) is not None
        return path.rpartition(".")[2] in self.targets

    def batch(self, tokens: int, *, small: bool = False, length: int = LENGTH) -> dict[str, Tensor]:
        """Random input with labels.

        Args:
            tokens: in all rows together.
            small: for the small model.
            length: tokens of a row.
        """
        generator = torch.Generator().manual_seed(1)
        shape = (max(1, tokens // length), min(tokens, length))
        words = torch.randint(CHECK_VOCABULARY if small else self.vocabulary, shape, generator=generator)
        labels = torch.randint(self.classes, shape[:1], generator=generator) if self.classes else words
        return {"input_ids": words, "labels": labels}


def twin(model: nn.Module) -> nn.Module:
    """A copy with modules of its own around the same parameters and buffers."""
    kept: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, kept)


def gpt2(layers: int, width: int, vocabulary: int = GPT2_WORDS) -> Base:
    """GPT-2-like, random weights; its four matrices a layer are adapted, the fused one as a whole."""
    return Base(
        f"GPT-2 {layers}×{width}" + ("" if vocabulary == GPT2_WORDS else f", {vocabulary:,} words"),
        partial(_gpt2, width),
        layers,
        vocabulary,
        ("c_attn", "c_proj", "c_fc"),
        transposed=True,
    )


def _gpt2(width: int, layers: int, vocabulary: int) -> nn.Module:
    heads = max(1, width // 64)
    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        vocab_size=vocabulary,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)


def llama(layers: int, width: int, vocabulary: int = LLAMA_WORDS) -> Base:
    """Llama-like (SwiGLU, two query heads a key head), random weights; its seven matrices a layer are adapted."""
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return Base(f"Llama {layers}×{width}", partial(_llama, width), layers, vocabulary, targets)


def _llama(width: int, layers: int, vocabulary: int) -> nn.Module:
    heads = max(2, width // 64)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        vocab_size=vocabulary,
    )
    return LlamaForCausalLM(config)


def minilm(*, real: bool = True) -> Base:
    """MiniLM (6×384) as a classifier, with its pretrained weights where they are; six matrices a layer are adapted."""
    weights = MINILM if real and (MINILM / "model.safetensors").exists() else None
    name = "MiniLM 6×384" + ("" if weights else RANDOM_WEIGHTS)
    targets = r".*\.layer\.\d+\..*\.(query|key|value|dense)"
    return Base(name, partial(_minilm, weights), 6, 30522, targets, classes=2)


def _minilm(weights: Path | None, layers: int, vocabulary: int) -> nn.Module:
    shape = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if weights is not None and layers == 6:
        return AutoModelForSequenceClassification.from_pretrained(weights, dtype=torch.float32, **no_dropout)
    config = BertConfig(num_hidden_layers=layers, vocab_size=vocabulary, **shape, **no_dropout)
    return AutoModelForSequenceClassification.from_config(config)

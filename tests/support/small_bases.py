"""Small random base models in folders, and adapters on them, for the commands that read folders."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from randbasis import RandbasisConfig


def config_folder(folder: Path, **options: Any) -> Path:
    """A folder with nothing but a config.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(options))
    return folder


def gpt2(seed: int = 0, **options: Any) -> PreTrainedModel:
    sizes = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, **options}
    return _seeded(GPT2LMHeadModel, GPT2Config(**sizes, bos_token_id=0, eos_token_id=0), seed)


def llama(seed: int = 0, **options: Any) -> PreTrainedModel:
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **options,
    }
    return _seeded(LlamaForCausalLM, LlamaConfig(**sizes, max_position_embeddings=16), seed)


def bert(seed: int = 0, *, classes: int | None = None) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=classes or 2,
    )
    return _seeded(BertForSequenceClassification if classes else BertModel, config, seed)


def saved(model: PreTrainedModel, folder: Path) -> str:
    """The base in a folder, with a tokenizer beside it."""
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return str(folder)


def adapted(model: PreTrainedModel, config: RandbasisConfig, folder: Path) -> Any:
    """The model with a random adapter, saved in a folder."""
    with torch.random.fork_rng(devices=()):
        peft_model = get_peft_model(model, deepcopy(config)).eval()
    generator = torch.Generator().manual_seed(11)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data + 0.3 * noise
    peft_model.save_pretrained(str(folder))
    return peft_model


def _seeded(kind: Any, config: Any, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return kind(config).eval()

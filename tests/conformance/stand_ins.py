"""Tiny randomly initialised models under the hub names that PEFT's tests load.

``from_pretrained("org/name")`` prefers a local directory of that name, so a run whose working directory holds these
folders needs no network and no patch. Only the names that the converted tests load are here; none of those tests
needs a tokenizer.
"""

from pathlib import Path
from typing import Any

import torch
import transformers

# Weights of standard deviation 0.02 would leave activations of about 1e-4 at width 32, below the tolerances of the
# tests, which could then not tell an adapted model from its base.
_SHARED = {
    "initializer_range": 0.2,
    "vocab_size": 256,
    "pad_token_id": 0,
    "bos_token_id": 4,
    "eos_token_id": 5,
}
_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 2}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
# 4-bit quantization packs blocks of 64 weights along a row.
_OPT = {
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_BART = {
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")},
    "d_model": 32,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 5,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}

STAND_INS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", {**_OPT, "num_hidden_layers": 2}),
    # Quantized, so the rounding error that twelve layers amplify must stay small.
    "peft-internal-testing/opt-125m": (
        "OPTForCausalLM",
        {**_OPT, "num_hidden_layers": 12, "initializer_range": 0.05},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", _GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**_GPT, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _DECODER),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", _DECODER),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", _DECODER),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", {**_DECODER, "head_dim": 8}),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", _BART),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", _ENCODER),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", _ENCODER),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", _ENCODER),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", _ENCODER),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", _ENCODER),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        _ENCODER,
    ),
}


def write_stand_ins(folder: Path) -> list[str]:
    """Save every stand-in that ``folder`` lacks and return the names of the new ones."""
    missing = [name for name in STAND_INS if not (folder / name / "model.safetensors").exists()]
    for name in missing:
        architecture, shape = STAND_INS[name]
        model_class = getattr(transformers, architecture)
        config = model_class.config_class(**{**_SHARED, **shape})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model_class(config).save_pretrained(folder / name)
    return missing

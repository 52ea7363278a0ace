"""Compare our LoRA adapters in GGUF with llama.cpp itself, on a tiny random model of every family.

    python tests/conformance/llama_cpp_lora.py LLAMA_CPP                   factors, with its convert_lora_to_gguf.py
    python tests/conformance/llama_cpp_lora.py LLAMA_CPP --python PYTHON   and logits, with its llama_decode

LLAMA_CPP is a checkout of llama.cpp (the source distribution of llama-cpp-python holds one, vendor/llama.cpp), and
PYTHON an interpreter with llama-cpp-python. No line of llama.cpp is in this repository.

Exit code: 0 when all factors are equal bit for bit (but for gpt2, whose LoRA that converter transposes) and all logits
are those of transformers, else 1.
"""

import argparse
import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from randbasis import NolaConfig
from randbasis.export import export_gguf_lora, export_peft_lora
from randbasis.export.gguf_lora import FAMILIES

HERE = Path(__file__).resolve().parent
TOKENS = list(range(3, 15))
TRANSPOSED = {"gpt2"}
CLOSE = 1e-3
"""Largest difference of logits; the adapter moves them by about one. Tables of GELU in llama.cpp cost a few 1e-4."""
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
WIDE_HEADS: dict[str, Any] = {"head_dim": 32, "query_pre_attn_scalar": 32}
MORE: dict[str, dict[str, Any]] = {"qwen3": {"head_dim": 32}, "gemma": {"head_dim": 32}, "gemma2": WIDE_HEADS}
MORE["gemma3_text"] = WIDE_HEADS
MORE["gpt2"] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64}
# Its converter wants a known vocabulary, which random weights have not.
BASE_WRITER = """
import sys
from pathlib import Path
checkout, source, target = sys.argv[1:]
sys.path[:0] = [checkout, checkout + "/gguf-py"]
import gguf, torch
from conversion import ModelBase, get_model_class
options = ModelBase.load_hparams(Path(source), False)
known = get_model_class(options["architectures"][0])
class Model(known):
    model_arch = known.model_arch
    def set_vocab(self):
        self._set_vocab_none()
        if not any("vocab_size" in name for part in self.gguf_writer.kv_data for name in part):
            self.gguf_writer.add_vocab_size(options["vocab_size"])
with torch.inference_mode():
    Model(Path(source), gguf.LlamaFileType.ALL_F32, Path(target), hparams=options).write()
"""


def make(architecture: str, folder: Path) -> None:
    """A random base and an adapter on all its linear layers but the output's."""
    config = AutoConfig.for_model(architecture, **SIZES | MORE.get(architecture, {}))
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    base.save_pretrained(folder / "base")
    words = {f"w{index}": index for index in range(SIZES["vocab_size"])}  # gemma3's embeddings are cut to these
    (folder / "base" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}, "added_tokens": []}))
    adapted = get_peft_model(base, NolaConfig(r=4, num_basis=6, target_modules="all-linear"))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape)
    adapted.save_pretrained(str(folder / "adapter"))
    export_peft_lora(folder / "adapter", folder / "lora", base=str(folder / "base"))
    export_gguf_lora(folder / "adapter", folder / "ours.gguf", base=str(folder / "base"))


def factors_agree(folder: Path, checkout: Path) -> bool:
    """Whether names, types and values are those of llama.cpp's own converter."""
    script = [sys.executable, "-W", "ignore", checkout / "convert_lora_to_gguf.py", "--outfile", folder / "theirs.gguf"]
    quiet_run([*script, "--base", folder / "base", folder / "lora"])
    ours, theirs = (
        {one.name: one for one in gguf.GGUFReader(folder / f"{who}.gguf").tensors} for who in ("ours", "theirs")
    )
    return ours.keys() == theirs.keys() and all(
        one.tensor_type == theirs[name].tensor_type
        and one.shape.tolist() == theirs[name].shape.tolist()
        and np.array_equal(one.data, theirs[name].data)
        for name, one in ours.items()
    )


def logits_apart(folder: Path, checkout: Path, python: str) -> tuple[float, float]:
    """Largest difference of logits with the adapter between llama.cpp and transformers, and what the adapter does."""
    quiet_run([sys.executable, "-W", "ignore", "-c", BASE_WRITER, checkout, folder / "base", folder / "base.gguf"])
    words = ",".join(map(str, TOKENS))
    files = [folder / "base.gguf", folder / "ours.gguf", words, folder / "logits.npy"]
    quiet_run([python, HERE / "llama_cpp_logits.py", *files])
    base = AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager").eval()
    with torch.no_grad():
        plain = deepcopy(base)(torch.tensor([TOKENS])).logits[0].numpy()
        model = PeftModel.from_pretrained(base, folder / "adapter").eval()
        want = model(torch.tensor([TOKENS])).logits[0].numpy()
    return float(abs(np.load(folder / "logits.npy") - want).max()), float(abs(want - plain).max())


def quiet_run(command: list[Any]) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    if done.returncode:
        raise SystemExit(f"{command[:4]} failed:\n{done.stderr[-2000:]}")


ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, metavar="LLAMA_CPP")
    parser.add_argument("--python", help="interpreter with llama-cpp-python")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="only these")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failures = 0
    for architecture in options.family or FAMILIES:
        with TemporaryDirectory() as name:
            folder = Path(name)
            make(architecture, folder)
            equal = factors_agree(folder, options.checkout)
            failures += equal == (architecture in TRANSPOSED)
            said = f"{architecture:12} factors {'equal' if equal else 'differ'}"
            if options.python:
                apart, effect = logits_apart(folder, options.checkout, options.python)
                failures += apart > CLOSE
                said += f", logits {apart:.1e} apart, moved by {effect:.2f}"
            print(said, flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())

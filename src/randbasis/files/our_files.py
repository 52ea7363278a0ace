"""Which files of a folder this package wrote: by name, or by what stands in them."""

import json
import re
from pathlib import Path

ADAPTER_SET = frozenset(
    {
        *("adapter_config.json", "adapter_model.safetensors", "head.safetensors", "packed.safetensors"),
        *("task.json", "summary.json", "history.jsonl", "loss.png", "run.yaml"),
        *("checkpoints", ".checkpoints-before", "base-config"),
    }
)
"""Names of what this package writes of an adapter; a model card, whose name anybody uses, is told by its content."""
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Files of a tokenizer or image processor."""
MODEL_SET = frozenset({"config.json", "generation_config.json", "model.safetensors.index.json", *COMPANIONS})
"""Names of what this package writes of a whole model, beside its weights."""
MERGED_MARK = "merged_by"
"""Key of a ``config.json`` that this package wrote."""
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_ANY_WEIGHTS = re.compile(r"(model|pytorch_model|tf_model|flax_model).*\.(safetensors|bin|h5|msgpack|json)")
_CARD = "README.md"
_CARD_LIBRARY = "library_name: peft"


def our_names(folder: Path, *, model: bool) -> set[str]:
    """Names of ours in a folder: of an adapter, and of a model where ``model`` says so or one of ours is there."""
    model = model or _has_our_model(folder)
    return {path.name for path in folder.iterdir() if is_ours(path, model=model)}


def is_ours(path: Path, *, model: bool) -> bool:
    """Whether a file is one of an adapter, or with ``model`` of a whole model."""
    if path.name == _CARD:
        return _is_card(path)
    return path.name in ADAPTER_SET or (model and (path.name in MODEL_SET or bool(_WEIGHTS.fullmatch(path.name))))


def has_foreign_model(folder: Path) -> bool:
    """Whether a folder holds a whole model that this package did not write."""
    names = [path.name for path in folder.iterdir()]
    return "config.json" in names and any(map(_ANY_WEIGHTS.fullmatch, names)) and not _has_our_model(folder)


def _is_card(path: Path) -> bool:
    """Whether a file is a model card of an adapter, which tells of the adapter that it lies beside."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return text.startswith("---\n") and _CARD_LIBRARY in text.partition("\n---")[0]


def _has_our_model(folder: Path) -> bool:
    try:
        found: object = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and MERGED_MARK in found

"""Tiny random models with tokenizers, written once, and rows that a tiny model can learn."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

GOOD = ["good", "great", "fine", "lovely"]
BAD = ["bad", "awful", "poor", "sad"]
OTHER = ["film", "book", "song", "day", "a", "the", "very", "so"]
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "cls_token": "<s>",
           "sep_token": "</s>"}  # fmt: skip


def words_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", "<pad>", *GOOD, *BAD, *OTHER]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **SPECIAL)


def letters_tokenizer() -> PreTrainedTokenizerFast:
    letters = ["<unk>", "<s>", "</s>", "<pad>", *"abcdefghijklmnopqrstuvwxyz =>"]
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=48, **SPECIAL)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT without a head, 2 layers of width 16."""
    folder = str(tmp_path_factory.mktemp("encoder"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=32, max_position_embeddings=32, pad_token_id=3))  # fmt: skip
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of characters, 2 layers of width 32."""
    folder = str(tmp_path_factory.mktemp("language"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=33, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                             num_key_value_heads=2, intermediate_size=64, max_position_embeddings=48,
                                             bos_token_id=1, eos_token_id=2, pad_token_id=3,
                                             tie_word_embeddings=False, initializer_range=0.3))  # fmt: skip
    model.save_pretrained(folder)
    letters_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A ViT with a head of five classes, 2 layers of width 16, for images of 32 pixels."""
    folder = str(tmp_path_factory.mktemp("vision"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                                    intermediate_size=32, image_size=32, patch_size=8,
                                                    num_labels=5))  # fmt: skip
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def sentences(count: int, seed: int) -> list[dict[str, str]]:
    """Sentences with one telling word each, and its label."""
    generator = random.Random(seed)
    rows: list[dict[str, str]] = []
    for i in range(count):
        words = [*generator.sample(OTHER, generator.randint(2, 5)), generator.choice(GOOD if i % 2 else BAD)]
        generator.shuffle(words)
        rows.append({"sentence": " ".join(words), "label": "pos" if i % 2 else "neg"})
    return rows


def write_csv(path: Path, rows: list[dict[str, str]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


@pytest.fixture(scope="session")
def sentences_csv(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_csv(tmp_path_factory.mktemp("rows") / "train.csv", sentences(64, 1))


@pytest.fixture(scope="session")
def held_csv(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_csv(tmp_path_factory.mktemp("rows") / "held.csv", sentences(24, 2))


@pytest.fixture(scope="session")
def pairs_jsonl(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prompts of one letter, answered by it three times; the second of two references differs."""
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    letters = "abcdefghij"
    rows = [{"mr": letter, "ref": [f"{letter}{letter} {letter}", f"{letter} {letter}"]} for letter in letters]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reddish and bluish images in ``train`` and ``test``."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for label, channel in (("red", 0), ("blue", 2)):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 60, (40, 40, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / split / label / f"{i}.png")
    return folder

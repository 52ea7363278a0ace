"""A study over the tiny models and rows of the training tests."""

from dataclasses import replace
from pathlib import Path

import pytest

from randbasis.train import DataSettings, LoopSettings, TrainSettings
from studies import Row, Setting, Study

ROWS = (
    Row("frozen + head", "none", 0.0, (1e-2, 1e-1)),
    Row("LoRA r=1", "lora", 1.0, (1e-2, 1e-1)),
    Row("NOLA, half", "nola", 0.5, (1e-2, 1e-1)),
)


@pytest.fixture
def text_setting(encoder: str, sentences_csv: str, held_csv: str) -> Setting:
    data = DataSettings(sentences_csv, eval=held_csv, text_column="sentence", label_column="label", limit=32)
    loop = LoopSettings(batch_size=8, max_steps=3, threads=1)
    base = TrainSettings("sequence-classification", encoder, data, output="", loop=loop, pooling="mean")
    return Setting("words", base, targets=("query", "value"), seeds=2, sweep_steps=2, dev_rows=12)


@pytest.fixture
def text_study(text_setting: Setting) -> Study:
    return Study("words", "Words", ROWS, (text_setting,), ("accuracy", "loss"))


@pytest.fixture
def image_setting(vision_model: str, image_folder: Path) -> Setting:
    data = DataSettings(image_folder, shots=2)
    loop = LoopSettings(batch_size=4, max_steps=2, threads=1)
    base = TrainSettings("image-classification", vision_model, data, output="", loop=loop, image_size=16)
    return Setting("colours", base, targets=("q_proj", "v_proj"), seeds=4, sweep_steps=2, dev_rows=3, sample_sets=2)


@pytest.fixture
def language_study(language_model: str, pairs_jsonl: str) -> Study:
    data = DataSettings(pairs_jsonl, eval=pairs_jsonl, prompt_column="mr", target_column="ref", limit=8, eval_limit=3)
    loop = LoopSettings(batch_size=4, max_steps=2, threads=1)
    base = TrainSettings("causal-lm", language_model, data, output="", loop=loop, max_length=32, end_token="</s>")
    setting = Setting("letters", base, targets=("all-linear",), seeds=2, sweep_steps=2, dev_rows=4, dev=pairs_jsonl)
    rows = (replace(ROWS[0], rates=()), ROWS[2])
    return Study("letters", "Letters", rows, (setting,), ("bleu", "loss"))

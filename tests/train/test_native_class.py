"""A classifier is trained in the class that transformers has for it, and loads there; else the summary says so."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_runs import words_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    pipeline,
)

from randbasis.export import export_merged, export_peft_lora
from randbasis.train import AdapterSettings, DataSettings, LoopSettings, TrainSettings, prepare, train
from randbasis.use import UseSettings, predict

METHODS = {
    "nola": AdapterSettings(method="nola", rank=2, basis=8),
    "lora": AdapterSettings(method="lora", rank=2),
    "loraxs": AdapterSettings(method="loraxs", rank=2),
}
TEXTS = ["a good day", "the awful film", "so poor a song", "lovely book"]


@pytest.fixture
def run(encoder: str, sentences_csv: str, held_csv: str, tmp_path: Path) -> TrainSettings:
    data = DataSettings(sentences_csv, eval=held_csv, text_column="sentence", label_column="label")
    loop = LoopSettings(max_steps=8, batch_size=8, learning_rate=2e-2, eval_every=8, threads=1)
    return TrainSettings("sequence-classification", encoder, data, tmp_path / "run", adapter=METHODS["nola"], loop=loop)


def ours(run: TrainSettings) -> list[list[float]]:
    """Probabilities of the texts, class by class, as the command answers."""
    rows = Path(run.output).with_name("texts.jsonl")
    rows.write_text("".join(json.dumps({"sentence": text}) + "\n" for text in TEXTS))
    answers = predict(UseSettings(run.output, data=rows, threads=1))
    places = {"neg": 0, "pos": 1}
    return [
        [row["probability"] if places[row["prediction"]] == i else 1 - row["probability"] for i in range(2)]
        for row in answers
    ]


def by_pipeline(tokenizer: Any = None, **options: Any) -> list[list[float]]:
    """The same from transformers' pipeline, in the order of the class numbers."""
    answers = pipeline("text-classification", tokenizer=tokenizer, top_k=None, **options)(TEXTS)
    return [[part["score"] for part in sorted(answer, key=lambda part: part["label"])] for answer in answers]


@pytest.mark.parametrize("method", METHODS)
def test_a_pipeline_loads_the_folder_of_a_run(method: str, run: TrainSettings):
    run = replace(run, adapter=METHODS[method])
    outcome = train(run)
    assert outcome.summary["loaded_by"] == (
        "randbasis; PEFT and AutoModelForSequenceClassification after import randbasis"
    )
    assert outcome.task.auto_class == type(outcome.model.get_base_model()).__name__.replace("Bert", "AutoModel")
    torch.testing.assert_close(by_pipeline(model=str(run.output)), ours(run), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["nola", "lora"])
def test_peft_loads_the_folder_of_a_run(method: str, run: TrainSettings):
    train(replace(run, adapter=METHODS[method]))
    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(run.model), run.output)
    answers = by_pipeline(AutoTokenizer.from_pretrained(run.model), model=model.eval())
    torch.testing.assert_close(answers, ours(run), rtol=1e-4, atol=1e-5)


def test_the_merged_and_the_exported_answer_alike_with_the_names_of_the_classes(run: TrainSettings, tmp_path: Path):
    train(run)
    export_merged(run.output, tmp_path / "merged", dtype="float32")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == {0: "neg", 1: "pos"}
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    torch.testing.assert_close(by_pipeline(tokenizer, model=merged), ours(run), rtol=1e-4, atol=1e-5)
    assert export_peft_lora(run.output, tmp_path / "lora").head != "apart"
    base = AutoModelForSequenceClassification.from_pretrained(run.model)
    lora = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    torch.testing.assert_close(by_pipeline(tokenizer, model=lora), ours(run), rtol=1e-4, atol=1e-5)


def test_three_classes_load_where_their_number_is_said(run: TrainSettings, tmp_path: Path):
    path = tmp_path / "three.jsonl"
    rows = [{"sentence": text, "label": label} for text, label in zip(TEXTS * 4, "abcb" * 4, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = train(replace(run, data=replace(run.data, train=path, eval=path)))
    inputs = AutoTokenizer.from_pretrained(run.model)(TEXTS, return_tensors="pt", padding=True)
    model = AutoModelForSequenceClassification.from_pretrained(run.output, num_labels=3).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, outcome.model.eval()(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_under_a_head_of_ours_the_summary_says_that_we_alone_load_it(run: TrainSettings):
    outcome = train(replace(run, pooling="mean"))
    assert (outcome.task.auto_class, outcome.summary["loaded_by"]) == (None, "randbasis alone")
    assert json.loads((outcome.output / "task.json").read_text())["task"]["pooling"] == "mean"


def test_an_encoder_that_transformers_does_not_classify_with_is_pooled_and_told(run: TrainSettings, tmp_path: Path):
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        encoder = CLIPTextModel(CLIPTextConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1,
                                               num_attention_heads=2, intermediate_size=32,
                                               max_position_embeddings=32, eos_token_id=2))  # fmt: skip
    encoder.save_pretrained(tmp_path / "clip")
    words_tokenizer().save_pretrained(tmp_path / "clip")
    bare = replace(run, model=str(tmp_path / "clip"))
    with pytest.warns(UserWarning, match=r"no class for sequence classification with a clip_text_model.*pooling mean"):
        task = prepare(bare).task
    assert task.loaded_by() == "randbasis alone"
    assert train(replace(bare, pooling="mean")).summary["loaded_by"] == "randbasis alone"

"""Whole runs on tiny models: what they leave, what they leave alone, and that they go on as if never stopped."""

import errno
import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import torch as safetensors
from transformers import AutoTokenizer, BertModel

import randbasis.train.trainer as trainer_module
from randbasis.errors import (
    AdapterFilesError,
    AdapterMissingError,
    ColumnError,
    DataMissingError,
    EmptyDataError,
    HyperparameterError,
    LabelError,
    NonFiniteLossError,
    OutputExistsError,
    RandbasisError,
    RankError,
    SaveError,
    SettingError,
    TargetError,
    UnknownMethodError,
)
from randbasis.train import AdapterSettings, DataSettings, LoopSettings, TextClassification, TrainSettings, train
from randbasis.train.tabular import read_table
from randbasis.train.trainer import last_checkpoint
from randbasis.use import UseSettings, evaluate, predict, write_lines

LORA = AdapterSettings(method="lora", rank=2)
NOLA = AdapterSettings(method="nola", rank=2, basis=8, seed=5)
QUANTIZED = replace(NOLA, quantize_coefficients=3)
SHORT = LoopSettings(max_steps=8, batch_size=8, learning_rate=1e-2, eval_every=4, threads=1)


@pytest.fixture
def sentences_run(encoder: str, sentences_csv: str, held_csv: str, tmp_path: Path) -> TrainSettings:
    data = DataSettings(sentences_csv, eval=held_csv, text_column="sentence", label_column="label")
    pooling = "mean"  # learns in few steps where nothing is pretrained
    return TrainSettings(
        "sequence-classification", encoder, data, tmp_path / "run", adapter=LORA, loop=SHORT, pooling=pooling
    )


@pytest.fixture
def pairs_run(language_model: str, pairs_jsonl: str, tmp_path: Path) -> TrainSettings:
    data = DataSettings(pairs_jsonl, eval=pairs_jsonl, prompt_column="mr", target_column="ref")
    loop = replace(SHORT, max_steps=40, eval_every=20, learning_rate=3e-2)
    return TrainSettings("causal-lm", language_model, data, tmp_path / "run", adapter=LORA, loop=loop)


@pytest.fixture
def images_run(vision_model: str, image_folder: Path, tmp_path: Path) -> TrainSettings:
    loop = replace(SHORT, max_steps=20, eval_every=10, head_learning_rate=5e-2)
    return TrainSettings("image-classification", vision_model, DataSettings(image_folder), tmp_path / "run",
                         adapter=LORA, loop=loop)  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    stored = safetensors.load_file(next(folder.glob("*.safetensors")))
    return {name: value for name, value in stored.items() if "randbasis_meaning" not in name}


def losses(folder: Path) -> list[tuple[int, float | None, float | None]]:
    entries = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [(e["step"], e.get("loss"), e.get("eval_loss")) for e in entries if "train_runtime" not in e]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("adapter", [LORA, NOLA, AdapterSettings(method="none")], ids=lambda a: a.method)
@pytest.mark.parametrize("task", ["sentences_run", "pairs_run", "images_run"])
def test_a_run_learns_and_its_folder_reloads(task: str, adapter: AdapterSettings, request: pytest.FixtureRequest):
    settings: TrainSettings = replace(request.getfixturevalue(task), adapter=adapter)
    if task == "pairs_run" and adapter.method == "none":
        with pytest.raises(SettingError, match="trains only a head"):
            train(settings)
        assert not Path(settings.output).exists()
        return
    outcome = train(settings)
    summary = outcome.summary
    assert summary["after"]["loss"] < summary["before"]["loss"]
    expected = {"summary.json", "task.json", "history.jsonl", "loss.png", "run.yaml"}
    expected |= (
        {"head.safetensors"} if adapter.method == "none" else {"adapter_config.json", "adapter_model.safetensors"}
    )
    assert {file.name for file in outcome.output.iterdir()} == expected
    assert json.loads((outcome.output / "summary.json").read_text()) == summary
    assert (outcome.output / "loss.png").read_bytes().startswith(b"\x89PNG")
    saved = weights(outcome.output)
    assert sum(value.numel() for value in saved.values()) == summary["coefficients"] + summary["head_parameters"]
    assert summary["adapter_bytes"] == next(outcome.output.glob("*.safetensors")).stat().st_size
    again = evaluate(UseSettings(adapter=outcome.output, data=settings.data.eval or settings.data.train, threads=1))
    for name, value in summary["after"].items():
        assert again["metrics"][name] == pytest.approx(value, rel=1e-5, abs=1e-7)


def test_the_callers_random_state_and_threads_stay(sentences_run: TrainSettings):
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), torch.get_num_threads())
    train(replace(sentences_run, loop=replace(SHORT, max_steps=2, threads=1)))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.get_num_threads() == before[3] > 0


def test_the_same_settings_give_the_same_bytes(sentences_run: TrainSettings, tmp_path: Path):
    one = train(sentences_run)
    torch.manual_seed(1234)
    other = train(replace(sentences_run, output=tmp_path / "other"))
    assert same(weights(one.output), weights(other.output))
    third = train(replace(sentences_run, output=tmp_path / "third", loop=replace(SHORT, train_seed=1)))
    assert not same(weights(one.output), weights(third.output))


# Checkpoints are made after steps 3, 6, 9, 12; the first epoch ends after step 8.
@pytest.mark.parametrize(
    ("adapter", "stop"),
    [(LORA, 5), (LORA, 6), (LORA, 8), (NOLA, 12), (QUANTIZED, 7), (AdapterSettings(method="none"), 4)],
    ids=lambda value: getattr(value, "method", str(value)),
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    sentences_run: TrainSettings, tmp_path: Path, adapter: AdapterSettings, stop: int, monkeypatch: pytest.MonkeyPatch
):
    loop = replace(SHORT, max_steps=14, eval_every=3, schedule="cosine", early_stop=4)  # epochs of 8 steps; dropout 0.1
    settings = replace(sentences_run, adapter=adapter, loop=loop)
    whole = train(replace(settings, output=tmp_path / "whole"))

    collate, batches = TextClassification.training_collate, iter(range(10**6))

    def stopping(task: TextClassification, examples: Any) -> Any:
        if next(batches) == stop:
            raise KeyboardInterrupt
        return collate(task, examples)

    with monkeypatch.context() as patch:
        patch.setattr(TextClassification, "training_collate", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    resumed = train(replace(settings, resume=True))
    assert same(weights(whole.output), weights(resumed.output))
    for name in ("after", "before", "steps", "best_step", "coefficients"):
        assert resumed.summary[name] == whole.summary[name]
    assert losses(whole.output) == losses(resumed.output)


def test_a_run_goes_on_only_with_its_own_settings(sentences_run: TrainSettings):
    train(replace(sentences_run, keep_checkpoints=True))
    other = replace(sentences_run, resume=True, adapter=replace(LORA, rank=3), loop=replace(SHORT, learning_rate=0.5))
    with pytest.raises(SettingError, match=r"adapter.rank was 2 and is 3, loop.learning_rate was 0.01 and is 0.5"):
        train(other)
    train(replace(sentences_run, resume=True, loop=replace(SHORT, threads=2)))


def test_a_module_that_the_checkpoint_lacks_is_trained_and_saved(
    sentences_run: TrainSettings, encoder: str, tmp_path: Path
):
    bare = tmp_path / "bare"
    BertModel.from_pretrained(encoder, add_pooling_layer=False).save_pretrained(bare)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(bare)
    loop = replace(SHORT, train_seed=4)  # the pooler is drawn from it, and must not be drawn again on reading
    outcome = train(replace(sentences_run, model=str(bare), pooling="model", loop=loop))
    assert any("pooler" in name for name in weights(outcome.output))
    again = evaluate(UseSettings(adapter=outcome.output, data=sentences_run.data.eval, threads=1))
    assert again["metrics"]["loss"] == pytest.approx(outcome.summary["after"]["loss"], rel=1e-5)


def test_a_language_model_without_all_of_its_weights_is_refused(pairs_run: TrainSettings, encoder: str, tmp_path: Path):
    part = tmp_path / "part"
    shutil.copytree(pairs_run.model, part)
    kept = weights(part)
    safetensors.save_file({name: value for name, value in kept.items() if "lm_head" not in name},
                          part / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(DataMissingError, match=r"has no weights for lm_head.weight"):
        train(replace(pairs_run, model=str(part)))
    assert not Path(pairs_run.output).exists()


def test_a_checkpoint_is_small(sentences_run: TrainSettings):
    outcome = train(replace(sentences_run, keep_checkpoints=True))
    checkpoint = last_checkpoint(outcome.output / "checkpoints")
    assert checkpoint is not None
    assert {file.name for file in checkpoint.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
        "trainer_state.json",
    }  # fmt: skip


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(
    sentences_run: TrainSettings, monkeypatch: pytest.MonkeyPatch
):
    collate, batches = TextClassification.training_collate, iter(range(10**6))

    def poisoned(task: TextClassification, examples: Any) -> Any:
        batch = collate(task, examples)
        if next(batches) == 6:
            batch["attention_mask"] = batch["attention_mask"].float() * float("nan")
        return batch

    monkeypatch.setattr(TextClassification, "training_collate", poisoned)
    with pytest.raises(
        NonFiniteLossError, match=r"the loss at step 7 is nan; the last good checkpoint is .*checkpoint-4"
    ):
        train(sentences_run)
    checkpoints = Path(sentences_run.output) / "checkpoints"
    assert {folder.name for folder in checkpoints.iterdir()} == {"settings.json", "checkpoint-4"}
    assert all(bool(torch.isfinite(value).all()) for value in weights(checkpoints / "checkpoint-4").values())


def test_a_parameter_that_is_not_finite_is_never_saved(sentences_run: TrainSettings, monkeypatch: pytest.MonkeyPatch):
    step = torch.optim.AdamW.step

    def poisoned(optimizer: torch.optim.AdamW, closure: Any = None) -> Any:
        step(optimizer, closure)
        optimizer.param_groups[0]["params"][0].data[0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", poisoned)
    settings = replace(sentences_run, loop=replace(SHORT, max_steps=2, eval_every=1))
    with pytest.raises(
        NonFiniteLossError, match=r"after step 1 the parameter \S+ is not finite; there was no checkpoint"
    ):
        train(settings)
    assert not Path(settings.output).exists()


# safetensors and Python raise the first; the zip writer of torch.save raises the second, as seen on a full tmpfs
@pytest.mark.parametrize(
    ("refusal", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 8384 vs 8278"),
            r"is the disk full\?",
        ),
    ],
    ids=["system", "torch"],
)
def test_a_full_disk_leaves_the_earlier_checkpoint(
    sentences_run: TrainSettings, monkeypatch: pytest.MonkeyPatch, refusal: Exception, told: str
):
    save, calls = trainer_module.save_parameters, iter(range(100))

    def filling(model: Any, path: Path) -> None:
        save(model, path)
        if next(calls) == 1:
            raise refusal

    monkeypatch.setattr(trainer_module, "save_parameters", filling)
    with pytest.raises(SaveError, match=rf"checkpoint-8 could not be written: .*{told}"):
        train(sentences_run)
    checkpoints = Path(sentences_run.output) / "checkpoints"
    assert {folder.name for folder in checkpoints.iterdir()} == {"settings.json", "checkpoint-4"}
    monkeypatch.undo()
    assert train(replace(sentences_run, resume=True)).summary["steps"] == 8


def test_a_full_disk_at_the_end_leaves_the_old_adapter(sentences_run: TrainSettings, monkeypatch: pytest.MonkeyPatch):
    output = train(sentences_run).output
    before = {file.name: file.read_bytes() for file in output.iterdir()}

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("randbasis.train.run.plot_losses", full)
    with pytest.raises(SaveError, match="the disk is full"):
        train(replace(sentences_run, overwrite=True, loop=replace(SHORT, train_seed=3)))
    after = {file.name: file.read_bytes() for file in output.iterdir() if file.is_file()}
    assert after == before
    assert last_checkpoint(output / "checkpoints") is not None


def test_an_output_that_exists_needs_overwrite(sentences_run: TrainSettings):
    output = Path(sentences_run.output)
    output.mkdir()
    (output / "mine.txt").write_text("kept")
    with pytest.raises(OutputExistsError, match="give overwrite"):
        train(sentences_run)
    assert [file.name for file in output.iterdir()] == ["mine.txt"]
    train(replace(sentences_run, overwrite=True))
    assert (output / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"task": "causal-ml"}, SettingError, "did you mean causal-lm"),
        ({"model": "no/such/folder"}, DataMissingError, "model 'no/such/folder'"),
        ({"pooling": "max"}, SettingError, "pooling 'max'"),
        ({"max_length": 0}, SettingError, "max_length must be at least 1"),
        ({"resume": True, "overwrite": True}, SettingError, "exclude each other"),
        ({"data.train": "nowhere.csv"}, DataMissingError, "nowhere.csv"),
        ({"data.text_column": "text"}, ColumnError, "'text' is not in .*its columns are 'sentence', 'label'"),
        ({"data.text_column": None}, SettingError, "needs text_column and label_column"),
        ({"data.label_kind": "number"}, LabelError, "label 'neg' .*is not a finite number"),
        ({"data.eval_limit": 0}, SettingError, "at least 1, got 0"),
        ({"data.shots": 1000}, EmptyDataError, "1000 shots"),
        ({"adapter.method": "nolla"}, UnknownMethodError, "did you mean nola"),
        ({"adapter.rank": 0}, RankError, "rank must be at least 1, got 0"),
        ({"adapter.basis": -1}, RankError, "basis must be at least 1"),
        ({"adapter.basis": 4}, HyperparameterError, "'lora' has no basis"),
        ({"adapter.targets": ("nothing",)}, TargetError, "nothing"),
        ({"adapter.method": "nola", "adapter.targets": ("nothing",)}, RandbasisError, "nothing"),
        ({"adapter.method": "nola", "adapter.law": "signs"}, RandbasisError, "sign"),
        ({"loop.metric": "bleu"}, SettingError, "metric 'bleu' does not apply"),
        ({"loop.schedule": "linaer"}, SettingError, "did you mean linear"),
        ({"loop.learning_rate": math.nan}, SettingError, "learning_rate must be a finite number"),
        ({"loop.dtype": "float16"}, SettingError, "only be trained with on a GPU"),
        ({"loop.epochs": 0.0}, SettingError, "epochs must be"),
        ({"loop.warmup": 1.0}, SettingError, "warmup is a share"),
    ],
    ids=str,
)
def test_what_cannot_be_run_leaves_no_trace(
    sentences_run: TrainSettings, change: dict[str, Any], error: type[Exception], message: str
):
    if change.get("loop.dtype") == "float16" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU, where float16 can be trained with")
    settings = sentences_run
    for name, value in change.items():
        outer, _, inner = name.partition(".")
        new = replace(getattr(settings, outer), **{inner: value}) if inner else value
        settings = replace(settings, **{outer: new})
    with pytest.raises(error, match=message):
        train(settings)
    assert not Path(sentences_run.output).exists()


def test_numbers_are_not_smoothed(sentences_run: TrainSettings, sentences_csv: str, tmp_path: Path):
    rows = [{**row, "label": str(0.25 * i)} for i, row in enumerate(read_table(sentences_csv).rows)]
    numbers = tmp_path / "numbers.jsonl"
    write_lines(rows, numbers)
    data = replace(sentences_run.data, train=numbers, eval=None)
    settings = replace(sentences_run, data=data, loop=replace(sentences_run.loop, label_smoothing=0.1))
    with pytest.raises(SettingError, match=r"label_smoothing 0\.1 has no meaning here"):
        train(settings)
    assert not Path(settings.output).exists()


def test_an_unseen_label_is_named(sentences_run: TrainSettings, tmp_path: Path):
    held = tmp_path / "held.csv"
    held.write_text("sentence,label\na good day,pos\nso so,neutral\n")
    with pytest.raises(LabelError, match=r"label 'neutral' .row 2 of held.csv. was not seen in training; .*neg, pos"):
        train(replace(sentences_run, data=replace(sentences_run.data, eval=held)))


def test_early_stop_and_keep(sentences_run: TrainSettings, tmp_path: Path):
    loop = replace(SHORT, max_steps=40, eval_every=1, early_stop=2, learning_rate=0.0, head_learning_rate=0.0)
    assert train(replace(sentences_run, loop=loop)).summary["steps"] == 3
    last = train(replace(sentences_run, output=tmp_path / "last", loop=replace(SHORT, keep="last")))
    assert last.summary["best_step"] == last.summary["steps"] == 8


def test_the_head_has_its_own_learning_rate(sentences_run: TrainSettings, tmp_path: Path):
    frozen_head = replace(SHORT, max_steps=3, head_learning_rate=0.0)
    one = weights(train(replace(sentences_run, loop=frozen_head)).output)
    other = weights(train(replace(sentences_run, output=tmp_path / "b", loop=replace(frozen_head, max_steps=6))).output)
    heads = [name for name in one if "classifier" in name]
    assert len(heads) == 2
    assert all(torch.equal(one[name], other[name]) for name in heads)
    assert not any(torch.equal(one[name], other[name]) for name in one if "lora_B" in name)


def test_a_regression(sentences_run: TrainSettings, tmp_path: Path):
    rows = [(f"{'good ' * (i % 4)}day", i % 4 + 0.5) for i in range(32)]
    path = tmp_path / "scores.tsv"
    path.write_text("".join(f"x\t{score}\t{text}\n" for text, score in rows))
    data = DataSettings(path, eval=path, text_column="2", label_column="1")
    loop = replace(SHORT, max_steps=60, eval_every=10, head_learning_rate=1e-1, keep="last")
    outcome = train(replace(sentences_run, data=data, adapter=replace(NOLA, alpha=8.0), loop=loop))
    assert outcome.summary["metric"] == "pearson"
    assert outcome.summary["after"]["pearson"] > 0.9
    answers = predict(UseSettings(adapter=outcome.output, data=path))
    by_count = [answers[i]["prediction"] for i in range(4)]
    assert by_count == sorted(by_count)
    assert [answer["2"] for answer in answers] == [text for text, _ in rows]


def test_half_precision_base_keeps_float32_coefficients(sentences_run: TrainSettings):
    outcome = train(replace(sentences_run, loop=replace(SHORT, dtype="bfloat16"), adapter=NOLA))
    assert {value.dtype for value in weights(outcome.output).values()} == {torch.float32}
    embeddings = outcome.model.get_submodule("base_model.model.encoder.embeddings.word_embeddings")
    assert embeddings.weight.dtype == torch.bfloat16
    again = evaluate(UseSettings(adapter=outcome.output, data=sentences_run.data.eval, dtype="bfloat16"))
    assert again["metrics"]["loss"] == pytest.approx(outcome.summary["after"]["loss"], abs=2e-2)


def test_pairs_of_texts_and_a_models_own_head(sentences_run: TrainSettings, tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"a": "good day", "b": "bad day" if i % 2 else "good day", "same": bool(i % 2)} for i in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSettings(path, eval=path, text_column="a", text_pair_column="b", label_column="same")
    outcome = train(replace(sentences_run, data=data, pooling="model"))
    assert json.loads((outcome.output / "task.json").read_text())["task"]["labels"] == ["False", "True"]
    assert evaluate(UseSettings(adapter=outcome.output, data=path))["metrics"]["loss"] == pytest.approx(
        outcome.summary["after"]["loss"], abs=1e-6
    )


def test_foreign_and_broken_adapters(sentences_run: TrainSettings, held_csv: str, encoder: str):
    output = train(sentences_run).output
    use = UseSettings(adapter=output, data=held_csv)
    (output / "adapter_model.safetensors").rename(output / "adapter_model.bin")
    with pytest.raises(AdapterFilesError, match="a pickle, which is never read"):
        evaluate(use)
    (output / "adapter_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(AdapterFilesError, match="must be a whole safetensors file"):
        evaluate(use)
    (output / "adapter_model.bin").rename(output / "adapter_model.safetensors")
    (output / "task.json").unlink()
    with pytest.raises(AdapterFilesError, match=r"no task.json"):
        evaluate(use)
    (output / "task.json").write_text("{")
    with pytest.raises(AdapterFilesError, match=r"task.json is not JSON"):
        evaluate(use)
    with pytest.raises(AdapterMissingError, match="there is nothing at"):
        evaluate(replace(use, adapter=output / "nothing"))
    with pytest.raises(AdapterFilesError, match=r"has no adapter_config.json"):
        evaluate(replace(use, adapter=encoder))

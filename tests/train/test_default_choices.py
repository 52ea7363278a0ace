"""What is chosen where nothing is said: the numbers, that they are used, and that they are told."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from randbasis.cli import app
from randbasis.errors import UnknownMethodError
from randbasis.train import METHOD_NAMES, AdapterSettings, DataSettings, LoopSettings, TrainSettings, peft_config, train
from randbasis.train.default_choices import LIKE, METHODS, SIZED_BY, SWEPT, choose, filled
from randbasis.train.method_table import size_of
from randbasis.train.settings import TASKS

METHODS_OF_PEFT = [name for name in METHOD_NAMES if name != "none"]
OPEN = LoopSettings(max_steps=4, batch_size=8, eval_every=4, threads=1)


@pytest.fixture
def run(encoder: str, sentences_csv: str, held_csv: str, tmp_path: Path) -> TrainSettings:
    data = DataSettings(sentences_csv, eval=held_csv, text_column="sentence", label_column="label")
    return TrainSettings("sequence-classification", encoder, data, tmp_path / "run", loop=OPEN)


def settings(task: str = "sequence-classification", **words: Any) -> TrainSettings:
    """Settings of a run that is not made."""
    loop = {one.name for one in fields(LoopSettings)}
    parts = [{k: v for k, v in words.items() if (k in loop) == of_loop} for of_loop in (False, True)]
    return TrainSettings(task, "m", DataSettings("d"), "o", AdapterSettings(**parts[0]), LoopSettings(**parts[1]))


def same(one: Path, other: Path) -> bool:
    left, right = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_every_method_has_defaults_for_every_task():
    assert set(METHODS) == set(METHODS_OF_PEFT)
    assert set(SWEPT) | set(LIKE) == set(TASKS)
    for method in (*METHODS, "none"):
        for task in TASKS:
            assert float(choose(method, task, None)["learning_rate"].value) > 0
    like = choose("nola", "embedding", 384)
    assert like["learning_rate"].value == pytest.approx(0.03 * METHODS["nola"].rates["sequence-classification"])
    assert "head_learning_rate" not in like
    with pytest.raises(UnknownMethodError, match=r"'nolla' is unknown; did you mean nola"):
        choose("nolla", "causal-lm", None)


@pytest.mark.parametrize("method", METHODS)
def test_sizes_are_those_of_the_configuration_which_plan_counts(method: str):
    whole, _ = filled(settings(method=method), None)
    chosen, own = (peft_config(one, task_type=None, head=[]) for one in (whole.adapter, AdapterSettings(method)))
    assert chosen is not None
    assert own is not None
    assert chosen.to_dict() == own.to_dict()


def test_a_language_model_gets_more_basis_matrices_unless_a_number_is_given():
    whole, chosen = filled(settings("causal-lm", method="nola"), None)
    assert whole.adapter.basis == METHODS["nola"].basis_for["causal-lm"] == 512
    assert chosen["basis"] == "512 (nola, causal-lm, swept on E2E)"
    assert filled(settings("causal-lm", method="nola", basis=128), None)[0].adapter.basis == 128
    assert filled(settings("image-classification", method="nola"), None)[0].adapter.basis == 128


@pytest.mark.parametrize("method", METHODS)
def test_a_rate_falls_with_the_width_and_is_the_tables_where_it_was_swept(method: str):
    for task, (data, width) in SWEPT.items():
        at, wider = choose(method, task, width)["learning_rate"], choose(method, task, 16 * width)["learning_rate"]
        assert at.value == METHODS[method].rates[task] == choose(method, task, None)["learning_rate"].value
        expected = float(at.value) / 16 ** METHODS[method].falls
        assert float(wider.value) == pytest.approx(expected, rel=0.35)  # rounded to one digit
        assert data in at.reason
        assert f"for width {16 * width}" in wider.reason


def test_what_is_given_stays_and_only_the_rest_is_told():
    given, chosen = filled(settings(method="nola", basis=5, learning_rate=0.5, schedule="cosine"), 384)
    assert (given.adapter.basis, given.loop.learning_rate, given.loop.schedule) == (5, 0.5, "cosine")
    assert set(chosen) == {"rank", "alpha", "head_learning_rate", "warmup"}
    assert chosen["rank"] == "8 (nola's own)"


@pytest.mark.parametrize("method", ["nola", "lora", "loraxs"])
def test_alpha_follows_a_rank_that_is_given(method: str):
    whole, chosen = filled(settings(method=method, rank=3), 384)
    assert (whole.adapter.rank, whole.adapter.alpha) == (3, 3.0)
    assert chosen["alpha"] == "3 (1 times the rank)"
    assert filled(settings(method=method, rank=3, alpha=6.0), 384)[0].adapter.alpha == 6.0


def test_nothing_is_chosen_that_would_mean_nothing():
    language, _ = filled(settings("causal-lm"), 64)
    assert language.loop.head_learning_rate is None
    head, _ = filled(settings(method="none", head_learning_rate=0.1), 64)
    assert (head.loop.learning_rate, head.loop.head_learning_rate) == (None, 0.1)
    constant, _ = filled(settings(schedule="constant"), 64)
    assert constant.loop.warmup is None


def test_a_run_that_says_nothing_is_the_run_that_says_what_was_chosen(run: TrainSettings, tmp_path: Path):
    done = train(run)
    rate, head = (choose("nola", run.task, 16)[name] for name in ("learning_rate", "head_learning_rate"))
    told = done.summary["settings"]
    assert (told["loop"]["learning_rate"], told["loop"]["head_learning_rate"]) == (rate.value, head.value)
    assert (told["loop"]["schedule"], told["loop"]["warmup"]) == ("linear", 0.06)
    assert (told["adapter"]["rank"], told["adapter"]["basis"], told["adapter"]["alpha"]) == (8, 128, 8.0)
    assert done.summary["chosen"]["learning_rate"] == str(rate)
    assert f"learning_rate: {rate.value}" in (done.output / "run.yaml").read_text()
    said = LoopSettings(max_steps=4, batch_size=8, eval_every=4, threads=1, learning_rate=float(rate.value),
                        head_learning_rate=float(head.value), schedule="linear", warmup=0.06)  # fmt: skip
    spoken = train(
        replace(run, loop=said, adapter=AdapterSettings(rank=8, basis=128, alpha=8.0), output=tmp_path / "b")
    )
    assert spoken.summary["chosen"] == {}
    assert same(done.output, spoken.output)
    other = train(replace(run, loop=replace(said, learning_rate=float(rate.value) / 3), output=tmp_path / "c"))
    assert not same(done.output, other.output)


def test_the_command_takes_auto_and_tells_the_reason(run: TrainSettings, tmp_path: Path):
    words = ["train", "--task", run.task, "--model", run.model, "--data", str(run.data.train), "--eval-data",
             str(run.data.eval), "--text-column", "sentence", "--label-column", "label", "--max-steps", "4",
             "--eval-every", "4", "--batch-size", "8", "--threads", "1", "--method", "lora", "--json"]  # fmt: skip
    config = tmp_path / "run.yaml"
    config.write_text("learning-rate: auto\nhead-learning-rate: 0.5\n")
    given = ["--learning-rate", "auto"], ["--config", str(config)], ["--learning-rate", "1e-3"]
    runs = [
        CliRunner().invoke(app, [*words, "--output", str(tmp_path / str(i)), *more]) for i, more in enumerate(given)
    ]
    assert [one.exit_code for one in runs] == [0, 0, 0], runs[-1].output
    auto, from_file, spoken = (json.loads(one.stdout) for one in runs)
    rate = choose("lora", run.task, 16)["learning_rate"]
    assert auto["settings"]["loop"]["learning_rate"] == rate.value
    assert auto["chosen"]["learning_rate"] == str(rate)
    assert from_file["settings"]["loop"]["learning_rate"] == rate.value
    assert from_file["settings"]["loop"]["head_learning_rate"] == 0.5
    assert spoken["settings"]["loop"]["learning_rate"] == 1e-3
    wrong = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "no"), "--learning-rate", "high"])
    assert (wrong.exit_code, "'high' must be a number, or auto" in wrong.stderr) == (2, True), wrong.stderr


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_a_regression_starts_at_the_mean_of_the_labels(pooling: str, run: TrainSettings, tmp_path: Path):
    rows = [{"sentence": "a good day", "label": value} for value in (40.5, 41.0, 43.5)]
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    numbers = replace(run, data=replace(run.data, train=path, eval=path), pooling=pooling)
    done = train(replace(numbers, loop=replace(OPEN, learning_rate=0.0, head_learning_rate=0.0)))
    head = done.model.get_submodule("base_model.model.classifier.modules_to_save.default")
    assert isinstance(head, nn.Linear)
    assert float(head.bias.detach()) == pytest.approx(125 / 3)
    assert done.summary["before"]["loss"] < 10  # their variance is 1.7, their mean square 1738


@pytest.mark.parametrize("method", METHODS)
def test_a_rate_rises_where_terms_are_few_and_nowhere_else(method: str):
    own, word = METHODS[method], SIZED_BY[method]
    usual = float(choose(method, "causal-lm", None)["learning_rate"].value)
    for size in (1, 4, 1 << 12):
        whole, chosen = filled(settings("causal-lm", method=method, **{word: size}), None)
        few = own.few is not None and size < own.few
        expected = usual * min(10**0.5, (own.few or 0) ** 0.5 / size**0.5) if few else usual
        assert whole.loop.learning_rate == float(f"{expected:.1g}")
        assert (f"for {word} {size} below {own.few}" in chosen["learning_rate"]) == few


@pytest.mark.parametrize("method", METHODS)
def test_fit_takes_the_rate_of_the_size_that_a_configuration_has(method: str):
    for size in (2, 1 << 12):
        one = filled(settings(method=method, **{SIZED_BY[method]: size}), None)[0].adapter
        assert size_of(peft_config(one, task_type=None, head=[])) == size
    assert size_of(None) is None

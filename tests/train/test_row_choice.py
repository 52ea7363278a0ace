"""Which rows a run takes, what it says of them, and runs that hold nothing out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import sentences, write_csv
from typer.testing import CliRunner

from randbasis.cli import app
from randbasis.errors import SettingError
from randbasis.train import AdapterSettings, DataSettings, LoopSettings, TrainSettings, prepare, train
from randbasis.use import UseSettings, evaluate


@pytest.fixture
def run(encoder: str, sentences_csv: str, tmp_path: Path) -> TrainSettings:
    data = DataSettings(sentences_csv, text_column="sentence", label_column="label")
    loop = LoopSettings(max_steps=8, batch_size=8, threads=1, train_seed=7)
    return TrainSettings(
        "sequence-classification", encoder, data, tmp_path / "run", adapter=AdapterSettings("lora", rank=2), loop=loop
    )


@pytest.mark.parametrize(
    ("change", "learned", "judged"),
    [
        (
            {},
            "58 of 64 rows of train.csv, the others are held out",
            "6 of 64 rows of train.csv, held out by train_seed 7",
        ),
        (
            {"limit": 5},
            "5 of 58 of 64 rows of train.csv, the others are held out, drawn by train_seed 7",
            "5 of 6 of 64 rows of train.csv, held out by train_seed 7, drawn by train_seed 7",
        ),
        ({"eval_fraction": 0.0}, "all 64 rows of train.csv", "no rows; the last parameters are kept"),
        ({"eval": True}, "all 64 rows of train.csv", "all 24 rows of held.csv"),
        (
            {"eval": True, "limit": 20, "eval_limit": 10},
            "20 of 64 rows of train.csv, drawn by train_seed 7",
            "10 of 24 rows of held.csv, drawn by train_seed 7",
        ),
        ({"eval": True, "limit": 40}, "40 of 64 rows of train.csv, drawn by train_seed 7", "all 24 rows of held.csv"),
        (
            {"eval": True, "shots": 3},
            "6 of 64 rows of train.csv, 3 of each class drawn by train_seed 7",
            "all 24 rows of held.csv",
        ),
    ],
)
def test_what_is_taken_is_told(run: TrainSettings, held_csv: str, change: dict[str, object], learned: str, judged: str):
    named = {**change, **({"eval": held_csv} if change.get("eval") else {})}
    prepared = prepare(replace(run, data=replace(run.data, **named)))
    assert (prepared.trained_on, prepared.evaluated_on) == (learned, judged)
    assert len(prepared.train) == int(learned.removeprefix("all ").split()[0])
    assert len(prepared.eval) == int(judged.removeprefix("all ").replace("no rows", "0").split()[0].rstrip(";"))


def test_the_seed_decides_which(run: TrainSettings):
    data = replace(run.data, limit=8)
    taken = [
        [e["input_ids"] for e in prepare(replace(run, data=data, loop=replace(run.loop, train_seed=seed))).train]
        for seed in (1, 1, 2)
    ]
    assert taken[0] == taken[1] != taken[2]


@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_run_that_holds_nothing_out_learns_from_all_rows(run: TrainSettings, keep: str):
    outcome = train(replace(run, data=replace(run.data, eval_fraction=0.0), loop=replace(run.loop, keep=keep)))
    summary = outcome.summary
    assert (summary["train_rows"], summary["eval_rows"], summary["best_step"]) == (64, 0, 8)
    assert (summary["before"], summary["after"]) == ({}, {})
    assert summary["evaluated_on"] == "no rows; the last parameters are kept"
    history = [json.loads(line) for line in (outcome.output / "history.jsonl").read_text().splitlines()]
    assert not [key for entry in history for key in entry if key.startswith("eval_")]
    assert (outcome.output / "loss.png").is_file()
    use = UseSettings(adapter=outcome.output, data=run.data.train, threads=1)
    assert evaluate(use)["rows"] == 64  # the adapter is there and answers


def test_a_resumed_run_without_evaluation_ends_the_same(run: TrainSettings, tmp_path: Path):
    whole = replace(run, data=replace(run.data, eval_fraction=0.0), keep_checkpoints=True)
    train(whole)
    for folder in sorted((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))[-1:]:
        for file in folder.iterdir():
            file.unlink()
    before = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    train(replace(whole, resume=True))
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == before


def test_what_needs_rows_to_evaluate_on(run: TrainSettings):
    nothing = replace(run, data=replace(run.data, eval_fraction=0.0))
    with pytest.raises(SettingError, match="early_stop needs rows to evaluate on"):
        train(replace(nothing, loop=replace(run.loop, early_stop=1)))
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(SettingError, match=r"eval_fraction must be in \[0, 1\)"):
            train(replace(run, data=replace(run.data, eval_fraction=fraction)))


@pytest.mark.parametrize(
    "option", ["--metric=accuracy", "--eval-limit=3", "--early-stop=2", "--eval-every=5", "--keep=best"]
)
def test_options_of_an_evaluation_need_one(option: str, tmp_path: Path):
    words = ["train", "--task", "sequence-classification", "--model", "m", "--data", "d", "--output", "o"]
    result = CliRunner().invoke(app, [*words, "--eval-fraction", "0", option], catch_exceptions=False)
    assert result.exit_code == 2
    assert f"{option.partition('=')[0]} has no meaning here" in result.stderr
    assert "another --eval-fraction than 0" in result.stderr


def test_progress_and_the_plain_answer_without_evaluation(encoder: str, tmp_path: Path):
    file = write_csv(tmp_path / "rows.csv", sentences(16, 3))
    words = ["train", "--task", "sequence-classification", "--model", encoder, "--data", file, "--text-column",
             "sentence", "--label-column", "label", "--max-steps", "2", "--eval-fraction", "0", "--threads", "1",
             "--output", str(tmp_path / "run")]  # fmt: skip
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    assert "no rows; the last parameters are kept" in result.stdout
    assert "before:" not in result.stderr

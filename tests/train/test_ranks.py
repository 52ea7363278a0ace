"""Several processes of one run against one process with all of their rows."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from randbasis.train.ranks import Ranks
from randbasis.train.run import train
from randbasis.train.settings import settings_from_words
from randbasis.train.trainer import EpochOrder, RankOrder

COMMON = {
    "method": "nola",
    "rank": 2,
    "basis": 8,
    "epochs": 2,
    "eval_every": 3,
    "threads": 1,
    "device": "cpu",
    "learning_rate": 1e-2,
    "head_learning_rate": 1e-2,
}
#: What stands in one batch of one process stands in two of half its size.
TASKS: dict[str, dict[str, Any]] = {
    "classes": {"task": "sequence-classification", "text_column": "sentence", "label_column": "label"},
    "own head": {"task": "sequence-classification", "text_column": "sentence", "label_column": "label",
                 "pooling": "model", "accumulate": 2},
    "numbers": {"task": "sequence-classification", "text_column": "sentence", "label_column": "number",
                "label_kind": "number"},
    "texts": {"task": "causal-lm", "prompt_column": "mr", "target_column": "ref"},
    "texts in two parts": {"task": "causal-lm", "prompt_column": "mr", "target_column": "ref", "accumulate": 2,
                           "label_smoothing": 0.1},
    "images": {"task": "image-classification"},
}  # fmt: skip


@given(st.integers(1, 60), st.integers(1, 6), st.integers(1, 5), st.booleans())
def test_ranks_share_the_batches_of_one_process(count: int, size: int, ranks: int, by_length: bool):
    lengths = [7 * i % 11 for i in range(count)] if by_length else None
    order = EpochOrder(count, size * ranks, 3, lengths)
    own = [list(RankOrder(order, Ranks(rank, ranks))) for rank in range(ranks)]
    assert [len(rows) for rows in own] == [len(RankOrder(order, Ranks(rank, ranks))) for rank in range(ranks)]
    batches = [[rows[start : start + size] for start in range(0, len(rows), size)] for rows in own]
    assert len({len(of_rank) for of_rank in batches}) == 1, "a process would wait for a step that another does not make"
    whole = list(order)
    for step, pieces in enumerate(zip(*batches, strict=True)):
        together = [row for piece in pieces for row in piece if row is not None]
        assert together == whole[step * size * ranks : (step + 1) * size * ranks]


def test_an_epoch_reaches_the_order_behind():
    order = RankOrder(EpochOrder(20, 4, 0), Ranks(0, 2))
    first = list(order)
    order.set_epoch(1)
    assert list(order) != first


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory, language_model, encoder, vision_model, pairs_jsonl, image_folder, sentences_csv
) -> dict[str, Any]:
    """The words of each run. 29 rows: the last of four batches has one row less than there are processes."""
    folder = tmp_path_factory.mktemp("ranks")
    still = folder / "encoder"
    shutil.copytree(encoder, still)
    config = json.loads((still / "config.json").read_text())
    # Which inputs are dropped is drawn anew in every process.
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (still / "config.json").write_text(json.dumps(config))
    with open(sentences_csv, newline="", encoding="utf-8") as file:
        rows = [{**row, "number": str(0.25 * i)} for i, row in enumerate(csv.DictReader(file))][:29]
    data, held = str(folder / "train.csv"), str(folder / "held.csv")
    for path, some in ((data, rows), (held, rows[:8])):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(some)
    where = {
        "causal-lm": {"model": language_model, "data": pairs_jsonl, "eval_data": pairs_jsonl},
        "sequence-classification": {"model": str(still), "data": data, "eval_data": held},
        "image-classification": {"model": vision_model, "data": str(image_folder)},
    }
    return {name: {**COMMON, **where[words["task"]], **words} for name, words in TASKS.items()}


def on_ranks(runs: list[dict[str, Any]], folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Run on two processes; the JSON documents that came out, and what was said beside them."""
    (folder / "runs.json").write_text(json.dumps(runs))
    script = str(Path(__file__).with_name("several_ranks.py"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, script, str(folder / "runs.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture(scope="module")
def two_ranks(runs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder a run of two processes with half the rows each, and a last one that was refused."""
    folder = tmp_path_factory.mktemp("two")
    words = [{**run, "batch_size": 4, "output": str(folder / name)} for name, run in runs.items()]
    told, errors = on_ranks([*words, words[0]], folder)
    assert [answer.get("processes") for answer in told] == [2] * len(words) + [None], "one document a run"
    assert told[-1]["error"] == "OutputExistsError"
    assert "Traceback" not in errors
    return folder


@pytest.mark.parametrize("name", TASKS)
def test_against_one_process_with_all_rows(name: str, runs: dict[str, Any], two_ranks: Path, tmp_path: Path):
    one = train(settings_from_words({**runs[name], "batch_size": 8, "output": str(tmp_path / "one")}))
    assert one.first
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "one", two_ranks / name))
    assert ours.keys() == theirs.keys()
    assert any(float(ours[key].abs().max()) > 1e-3 for key in ours), "nothing was learned"
    for key, expected in ours.items():
        # Sums of all layers have another order where the rows are halved, and Adam divides what is nearly 0, as the
        # gradients of keys are, by itself: 1.6e-6 of .02 there, 5e-7 elsewhere.
        torch.testing.assert_close(theirs[key], expected, rtol=0, atol=4e-6, msg=key)
    summary = json.loads((two_ranks / name / "summary.json").read_text())
    assert summary["steps"] == one.summary["steps"]
    # A correlation of predictions that hardly differ magnifies what is left between coefficients within 1e-6.
    assert summary["after"] == pytest.approx(one.summary["after"], rel=1e-4, abs=1e-4)
    assert {file.name for file in (two_ranks / name).iterdir()} == {f.name for f in (tmp_path / "one").iterdir()}


def test_a_checkpoint_that_cannot_be_written_ends_all_processes(runs: dict[str, Any], tmp_path: Path):
    free = {**runs["classes"], "batch_size": 4, "output": str(tmp_path / "free")}
    told, errors = on_ranks([{**free, "output": str(tmp_path / "full"), "full": True}, free], tmp_path)
    assert [answer.get("error") for answer in told] == ["SaveError", None], "the next run of both is as ever"
    assert "the disk is full" in told[0]["message"]
    assert "Traceback" not in errors


def test_ranks_stop_together_and_go_on_together(runs: dict[str, Any], tmp_path: Path):
    """A value that is not finite on one process stops both; the run goes on as two processes, not as one."""
    whole = {**runs["classes"], "batch_size": 4, "output": str(tmp_path / "run"), "keep_checkpoints": True}
    broken = {**whole, "output": str(tmp_path / "broken"), "learning_rate": 1e30, "warmup": 0.0, "max_grad_norm": 1e30}
    told, _ = on_ranks([whole, broken, {**whole, "resume": True}], tmp_path)
    assert [answer.get("error") for answer in told] == [None, "NonFiniteLossError", None]
    assert told[2]["after"] == told[0]["after"]
    with pytest.raises(ValueError, match="processes was 2 and is None"):
        train(settings_from_words({**whole, "resume": True}))

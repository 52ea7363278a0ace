"""What rows decide before a run: trials of seeds against longer runs, numbers by layer, both after an interruption."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors import torch as safetensors
from tiny_runs import sentences, write_csv
from typer.testing import CliRunner

from randbasis.cli import app
from randbasis.errors import NonFiniteLossError, SettingError
from randbasis.train import AdapterSettings, DataSettings, LoopSettings, TrainSettings, fit, peft_config, prepare, train
from randbasis.train.decisions import check_seeded
from randbasis.train.seed_trials import SeedTrials, try_seeds

LOOP = LoopSettings(max_steps=9, batch_size=8, learning_rate=3e-2, eval_every=9, threads=1, device="cpu")
TRIED = replace(LOOP, try_seeds=3, try_steps=4)
NOLA = AdapterSettings("nola", rank=2, basis=8, seed=2**64 - 2)


@pytest.fixture
def run(encoder: str, sentences_csv: str, held_csv: str, tmp_path: Path) -> TrainSettings:
    data = DataSettings(sentences_csv, eval=held_csv, text_column="sentence", label_column="label")
    return TrainSettings("sequence-classification", encoder, data, tmp_path / "run", NOLA, TRIED, max_length=20)


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    return safetensors.load_file(Path(folder, "adapter_model.safetensors"))


def same(one: str | Path, other: str | Path) -> bool:
    first, second = tensors(one), tensors(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_best_seed_goes_on_as_a_run_of_that_seed(run: TrainSettings, tmp_path: Path):
    told = train(run).summary
    tried = told["tried_seeds"]
    losses = tried["losses"]
    assert list(losses) == [str(2**64 - 2), str(2**64 - 1), "0"]
    assert losses[str(tried["seed"])] == min(losses.values())
    assert len(set(losses.values())) == 3
    assert (tried["steps"], tried["rows"]) == (3 * 4, 7)
    plain = replace(run, adapter=replace(NOLA, seed=tried["seed"]), loop=LOOP, output=tmp_path / "plain")
    assert train(plain).summary["after"] == told["after"]
    assert same(run.output, plain.output)


def test_the_losses_are_those_of_the_first_steps_of_whole_runs(run: TrainSettings, tmp_path: Path):
    prepared = prepare(run)
    model = prepared.load_model(run)
    config: Any = peft_config(NOLA, task_type="SEQ_CLS", head=prepared.task.head_modules(model))
    loop = replace(TRIED, head_learning_rate=3e-3, warmup=0.1, schedule="linear")
    found = try_seeds(lambda: prepared.load_model(run), config, prepared.task, prepared.train, loop=loop)
    assert config.seed == 2**64 - 2
    generator = torch.Generator().manual_seed(loop.train_seed)
    deciding = set(torch.randperm(64, generator=generator)[:7].tolist())
    learned = [row for place, row in enumerate(prepared.train) if place not in deciding]
    decided = [prepared.train[place] for place in sorted(deciding)]
    for seed, loss in found.losses.items():
        one: Any = peft_config(replace(NOLA, seed=seed), task_type="SEQ_CLS", head=config.modules_to_save)
        whole = fit(prepared.load_model(run), one, prepared.task, train=learned, eval=decided, checkpoints=tmp_path,
                    loop=replace(loop, eval_every=4, keep="last", try_seeds=None))  # fmt: skip
        at = {entry["step"]: entry["eval_loss"] for entry in whole.history if "eval_loss" in entry}
        assert (whole.steps, loss) == (9, at[4])


def test_what_a_run_is_evaluated_on_has_no_say(run: TrainSettings, tmp_path: Path):
    other = write_csv(tmp_path / "other.csv", sentences(16, 9))
    first = train(run).summary["tried_seeds"]
    second = train(replace(run, data=replace(run.data, eval=other), output=tmp_path / "b")).summary["tried_seeds"]
    assert first["losses"] == second["losses"]


def test_numbers_by_layer(run: TrainSettings, tmp_path: Path):
    even = train(replace(run, loop=LOOP)).summary
    settings = replace(run, adapter=replace(NOLA, allot="gradient"), loop=LOOP, output=tmp_path / "allotted")
    told = train(settings).summary
    numbers = told["allotted"]
    assert sum(numbers.values()) == 8 * len(numbers)
    assert len(set(numbers.values())) > 2
    assert told["coefficients"] == even["coefficients"] == 2 * 8 * len(numbers)
    stored = tensors(settings.output)
    for key, number in numbers.items():
        assert stored[f"base_model.model.{key}.randbasis_nola_a.weight"].shape[-1] == number
    assert "allotted" not in even
    assert told["before"] == even["before"]


def test_a_resumed_run_has_the_adapter_that_it_began_with(run: TrainSettings, tmp_path: Path):
    adapter = replace(NOLA, allot="gradient")
    begun = replace(run, adapter=adapter, keep_checkpoints=True)
    first = train(begun).summary
    file = Path(run.output) / "checkpoints" / "decisions.json"
    assert json.loads(file.read_text()) == {name: first[name] for name in ("allotted", "tried_seeds")}
    longer = replace(begun, loop=replace(TRIED, max_steps=18), resume=True)
    told = train(longer).summary
    assert told["steps"] == 18
    assert (told["allotted"], told["tried_seeds"]) == (first["allotted"], first["tried_seeds"])
    config = json.loads((Path(run.output) / "adapter_config.json").read_text())
    assert config["seed"] == first["tried_seeds"]["seed"]


def test_a_seed_without_a_finite_loss_is_not_chosen(run: TrainSettings):
    assert SeedTrials({4: float("inf"), 5: 2.0}, 3, 1, 0.0).seed == 5
    wild = replace(run, loop=replace(TRIED, learning_rate=1e30, head_learning_rate=1e30, max_grad_norm=1e30))
    with pytest.raises(NonFiniteLossError, match="the loss of every seed must be finite after 4 steps"):
        train(wild)
    assert not Path(run.output).exists()


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("try_steps must be below the 9 steps of the run, got 9", {"loop": replace(TRIED, try_steps=9)}),
    ("try_seeds must be at least 2, got 1", {"loop": replace(TRIED, try_seeds=1)}),
    ("try_steps must be at least 1, got 0", {"loop": replace(TRIED, try_steps=0)}),
    ("needs a method whose basis has a seed, got 'lora'", {"adapter": AdapterSettings("lora", rank=2)}),
    ("needs a method whose basis has a seed, got 'none'", {"adapter": AdapterSettings("none")}),
    ("allot 'norm' is unknown", {"adapter": replace(NOLA, allot="norm"), "loop": LOOP}),
]


@pytest.mark.parametrize(("told", "changes"), REFUSED, ids=[told for told, _ in REFUSED])
def test_refusals(run: TrainSettings, told: str, changes: dict[str, Any]):
    with pytest.raises(SettingError, match=told):
        train(replace(run, **changes))
    assert not Path(run.output).exists()


def test_methods_without_a_seed():
    with pytest.raises(SettingError, match="got 'loraxs'"):
        check_seeded("loraxs")
    for method in ("nola", "vera", "randlora", "pranc"):
        check_seeded(method)


def test_a_packed_language_model(language_model: str, pairs_jsonl: str, tmp_path: Path):
    data = DataSettings(pairs_jsonl, eval=pairs_jsonl, prompt_column="mr", target_column="ref")
    adapter = AdapterSettings("pranc", basis=6, allot="gradient")
    loop = replace(TRIED, try_seeds=2, batch_size=2)
    told = train(
        TrainSettings("causal-lm", language_model, data, tmp_path / "run", adapter, loop, packing=True, max_length=30)
    ).summary
    assert told["tried_seeds"]["rows"] == 2
    assert sum(told["allotted"].values()) == 6 * 14 == told["coefficients"]


def command(*words: object) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, words)], catch_exceptions=False)


def test_the_command(run: TrainSettings, tmp_path: Path):
    words = ["--task", run.task, "--model", run.model, "--data", run.data.train, "--eval-data", run.data.eval,
             "--text-column", "sentence", "--label-column", "label", "--rank", 2, "--basis", 8, "--max-steps", 5,
             "--batch-size", 8, "--threads", 1, "--quiet", "--json"]  # fmt: skip
    done = command(*words, "--output", tmp_path / "a", "--allot", "gradient", "--try-seeds", 2, "--try-steps", 3)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["tried_seeds"]["steps"], sum(told["allotted"].values())) == (6, 8 * 13)
    again = command("--config", tmp_path / "a" / "run.yaml", "--output", tmp_path / "b", "--quiet", "--json")
    assert again.exit_code == 0, again.output
    assert same(tmp_path / "a", tmp_path / "b")
    for more in (
        ["--try-steps", 3],
        ["--method", "vera", "--allot", "gradient"],
        ["--method", "lora", "--try-seeds", 2],
    ):
        refused = command(*words, "--output", tmp_path / "c", *more)
        assert refused.exit_code == 2, more
        assert "has no meaning here" in json.loads(refused.stdout)["message"]

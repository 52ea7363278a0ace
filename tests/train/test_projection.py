"""Train large, project, refine: the start against the import, the run against its own file, the loss on real rows."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from safetensors import torch as safetensors
from typer.testing import CliRunner

from randbasis.cli import app
from randbasis.errors import AdapterFilesError, SettingError
from randbasis.importing import import_as_nearest
from randbasis.train import AdapterSettings, DataSettings, LoopSettings, TrainSettings, peft_config, train
from randbasis.train.projection import refinement

LOOP = LoopSettings(max_steps=8, batch_size=8, learning_rate=2e-2, eval_every=8, threads=1, device="cpu")
LORA = AdapterSettings("lora", rank=3, alpha=3.0, targets=("query", "value"))
ONTO = {
    "nola": AdapterSettings("nola", rank=3, basis=9, alpha=3.0, seed=4),
    "vera": AdapterSettings("vera", rank=6, seed=4, law="normal"),
    "pranc": AdapterSettings("pranc", basis=11, seed=4, unique_basis=True),
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.load_file(folder / "adapter_model.safetensors")


def of_head(name: str) -> bool:
    return "classifier" in name


@pytest.fixture(scope="module")
def source(encoder: str, sentences_csv: str, held_csv: str, tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    """The run of a LoRA."""
    rows = DataSettings(sentences_csv, eval=held_csv, text_column="sentence", label_column="label")
    output = tmp_path_factory.mktemp("source") / "lora"
    run = TrainSettings("sequence-classification", encoder, rows, output, adapter=LORA, loop=LOOP, max_length=20)
    train(run)
    return run


@pytest.mark.parametrize("method", ONTO)
def test_it_starts_from_the_import_and_trains_it_with_the_head(source: TrainSettings, tmp_path: Path, method: str):
    lora = Path(source.output)
    run = refinement(source, lora, ONTO[method], tmp_path / "still", steps=1)
    still = train(replace(run, loop=replace(run.loop, learning_rate=0.0, head_learning_rate=0.0))).summary
    config = peft_config(ONTO[method], task_type=None, head=[])
    found = import_as_nearest(lora, tmp_path / "import", config)  # type: ignore[arg-type]
    imported, started = tensors(tmp_path / "import"), tensors(tmp_path / "still")
    assert imported.keys() == started.keys()
    assert all(torch.equal(imported[name], started[name]) for name in imported)
    heads = {name: tensor for name, tensor in tensors(lora).items() if of_head(name)}
    assert heads
    assert all(torch.equal(started[name], tensor) for name, tensor in heads.items())
    of_source = json.loads((lora / "summary.json").read_text())
    assert still["projection"]["before"] == pytest.approx(of_source["after"], rel=1e-4)
    assert still["projection"]["residual"] == pytest.approx(found.residual)
    assert still["projection"]["source"] == "LoRA"
    assert still["coefficients"] == found.coefficients
    assert still["before"] == pytest.approx(still["after"], rel=1e-5)
    assert still["settings"]["adapter"]["targets"] == ["query", "value"]
    refined = train(refinement(source, lora, ONTO[method], tmp_path / "refined", steps=8)).summary
    assert refined["before"] == pytest.approx(still["before"], rel=1e-5)
    assert refined["steps"] == 8
    ended = tensors(tmp_path / "refined")
    trained = [
        name for name in ended if ended[name].is_floating_point() and not torch.equal(ended[name], started[name])
    ]
    assert any(map(of_head, trained))
    assert not all(map(of_head, trained))


def test_rates_and_length_are_not_those_of_a_lora(source: TrainSettings, tmp_path: Path):
    longer = replace(source, loop=replace(source.loop, save_steps=3, head_learning_rate=1e-3))
    run = refinement(longer, "lora", ONTO["nola"], tmp_path, steps=7)
    assert (run.loop.max_steps, run.loop.learning_rate, run.loop.head_learning_rate) == (7, None, 1e-3)
    assert (run.loop.eval_every, run.loop.save_steps, run.loop.batch_size) == (None, None, 8)
    assert (run.project, run.from_adapter, run.adapter) == (True, "lora", ONTO["nola"])
    of_basis = replace(source, adapter=replace(ONTO["nola"], basis=70))
    assert refinement(of_basis, "lora", ONTO["nola"], tmp_path).loop.learning_rate == source.loop.learning_rate


def test_refusals(source: TrainSettings, tmp_path: Path):
    run = refinement(source, Path(source.output), ONTO["nola"], tmp_path / "a")
    with pytest.raises(SettingError, match="onto a basis of nola, vera, pranc, got method 'randlora'"):
        train(replace(run, adapter=AdapterSettings("randlora", rank=2)))
    with pytest.raises(SettingError, match="targets key conflicts with the adapter"):
        train(replace(run, adapter=replace(run.adapter, targets=("key",))))
    with pytest.raises(SettingError, match="project needs an adapter to start from"):
        train(replace(run, from_adapter=None))
    with pytest.raises(SettingError, match="allot is for a run that starts anew, got 'gradient' beside from"):
        train(replace(run, adapter=replace(run.adapter, allot="gradient")))
    with pytest.raises(SettingError, match="try_seeds is for a run that starts anew, got 3 beside from"):
        train(replace(run, loop=replace(run.loop, try_seeds=3)))
    assert not (tmp_path / "a").exists()
    train(replace(source, adapter=ONTO["vera"], output=tmp_path / "ours"))
    with pytest.raises(AdapterFilesError, match="is one of randbasis already"):
        train(replace(run, from_adapter=tmp_path / "ours"))


# --- the command ---


def command(*words: object) -> Result:
    return CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)


def test_the_command_tells_three_scores_and_its_file_makes_the_run_again(source: TrainSettings, tmp_path: Path):
    lora = Path(source.output)
    words = ["--to", "nola", "--rank", 3, "--basis", 9, "--seed", 4, "--refine-steps", 6, "--quiet", "--json"]
    done = command("import", lora, tmp_path / "a", "--refine", lora, *words)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    of_source = json.loads((lora / "summary.json").read_text())
    assert told["source_scores"] == pytest.approx(of_source["after"], rel=1e-4)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert (told["projected_scores"], told["refined_scores"]) == (summary["before"], summary["after"])
    assert (told["steps"], told["coefficients"], told["source"]) == (6, 4 * 18, "LoRA")
    assert "swept on" in told["chosen"]["learning_rate"]
    kept = yaml.safe_load((tmp_path / "a" / "run.yaml").read_text())
    assert (kept["from"], kept["project"], kept["method"]) == (str(lora), True, "nola")
    again = command("train", "--config", tmp_path / "a" / "run.yaml", "--output", tmp_path / "b", "--quiet")
    assert again.exit_code == 0, again.output
    one, other = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_command_takes_a_file_and_names_what_is_wrong_in_it(source: TrainSettings, tmp_path: Path):
    lora = Path(source.output)
    words: dict[str, Any] = {"task": source.task, "data": str(source.data.train), "eval-data": str(source.data.eval)}
    file = tmp_path / "rows.yaml"

    def refined(*more: object, **changes: Any) -> tuple[int, dict[str, Any]]:
        file.write_text(yaml.safe_dump(words | changes))
        common = ("--to", "pranc", "--basis", 5, "--refine", file, "--quiet", "--json")
        done = command("import", lora, tmp_path / "a", *common, *more)
        return done.exit_code, json.loads(done.stdout)

    code, told = refined("--refine-steps", 2)
    assert (code, told["message"]) == (2, f"{file} must say model, as a file for train --config does; put it in")
    code, told = refined("--refine-steps", 2, model=source.model, ranc=3)
    assert code == 2
    assert "'ranc' is not an option of this command" in told["message"]
    code, told = refined("--limit", "0.5", model=source.model)
    assert code == 2
    assert told["message"].startswith("--limit has no meaning here, got 0.5: it needs no --refine beside it")
    code, told = refined("--refine-steps", 2, "--base", source.model, threads=1, batch_size=8)
    assert code == 0, told
    assert told["coefficients"] == 4 * 5
    refused = command("import", lora, tmp_path / "b", "--to", "peft-lora", "--rank", 2, "--refine", lora, "--json")
    assert "--refine has no meaning here" in json.loads(refused.stdout)["message"]
    refused = command("import", lora, tmp_path / "b", "--to", "nola", "--refine-steps", 9, "--json")
    assert "it needs --refine" in json.loads(refused.stdout)["message"]


# --- real data ---


def test_refinement_lowers_the_loss_on_real_rows(data_dir: Path, tmp_path: Path):
    rows = DataSettings(data_dir / "e2e/trainset.csv.gz", eval=data_dir / "e2e/devset.csv.gz", prompt_column="mr",
                        target_column="ref", limit=200, eval_limit=24)  # fmt: skip
    loop = LoopSettings(max_steps=30, batch_size=8, eval_every=30, threads=1, device="cpu")
    base = str(data_dir / "llama_stories260k")
    lora = TrainSettings("causal-lm", base, rows, tmp_path / "lora", AdapterSettings("lora", rank=8), loop)
    trained = train(lora).summary
    onto = AdapterSettings("nola", rank=8, basis=64)
    told = train(refinement(lora, tmp_path / "lora", onto, tmp_path / "refined", steps=20)).summary
    assert told["projection"]["before"]["loss"] == pytest.approx(trained["after"]["loss"], rel=1e-4)
    assert told["after"]["loss"] < told["before"]["loss"] - 0.1
    assert told["after"]["loss"] < trained["before"]["loss"] - 0.1

"""`from`: a run that starts from an adapter, wherever it lies."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from peft import LoraConfig
from safetensors import torch as safetensors
from tiny_runs import sentences, write_csv
from typer.testing import CliRunner

from randbasis.adapters import pack_adapter
from randbasis.cli import app
from randbasis.errors import AdapterFilesError, LabelError, OutputExistsError, SettingError, UnknownMethodError
from randbasis.store import AdapterStore
from randbasis.train import AdapterSettings, DataSettings, LoopSettings, TrainSettings, train

LOOP = LoopSettings(max_steps=6, batch_size=8, learning_rate=2e-2, eval_every=6, threads=1, device="cpu")
STILL = replace(LOOP, max_steps=1, eval_every=1, learning_rate=0.0, head_learning_rate=0.0)
NOLA = AdapterSettings(method="nola", rank=2, basis=8, seed=5, targets=("value", "query"))
METHODS = {
    "nola": NOLA,
    "own basis": replace(NOLA, unique_basis=True, law="normal", alpha=3.0),
    "vera": AdapterSettings(method="vera", rank=4, seed=2),
    "randlora": AdapterSettings(method="randlora", rank=4),
    "pranc": AdapterSettings(method="pranc", basis=4, targets=("re:.*layer.1.*dense",)),
    "loraxs": AdapterSettings(method="loraxs", rank=2),
    "lora": AdapterSettings(method="lora", rank=2, alpha=4, dropout=0.1),
    "none": AdapterSettings(method="none"),
}


def of(encoder: str, data: str, held: str, output: Path, adapter: AdapterSettings = NOLA) -> TrainSettings:
    rows = DataSettings(data, eval=held, text_column="sentence", label_column="label")
    return TrainSettings("sequence-classification", encoder, rows, output, adapter=adapter, loop=LOOP, max_length=20)


def again(run: TrainSettings, where: str | Path, output: Path, **changes: Any) -> TrainSettings:
    """The same rows and nothing of the adapter, which decides by itself."""
    data = DataSettings(run.data.train, eval=run.data.eval)
    bare = replace(run, data=data, adapter=AdapterSettings(), max_length=None, from_adapter=where, output=output)
    return replace(bare, **{"loop": STILL, **changes})


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    file = Path(folder) / "adapter_model.safetensors"
    return safetensors.load_file(file if file.exists() else file.with_name("head.safetensors"))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def first(encoder: str, sentences_csv: str, held_csv: str, tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    run = of(encoder, sentences_csv, held_csv, tmp_path_factory.mktemp("first") / "run")
    train(run)
    return run


@pytest.fixture(scope="module")
def packed(first: TrainSettings) -> Path:
    file = Path(first.output).with_name("run.safetensors")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*a path of this machine")
        pack_adapter(first.output, file, bits=32)
    return file


@pytest.mark.parametrize("method", METHODS)
def test_without_a_step_it_is_the_adapter_and_with_steps_another(
    encoder: str, sentences_csv: str, held_csv: str, tmp_path: Path, method: str
):
    run = of(encoder, sentences_csv, held_csv, tmp_path / "a", METHODS[method])
    before = train(run).summary
    still = train(again(run, tmp_path / "a", tmp_path / "b")).summary
    assert still["before"] == pytest.approx(before["after"], rel=1e-5)
    assert still["after"] == pytest.approx(before["after"], rel=1e-5)
    assert still["from"] == str(tmp_path / "a")
    assert still["settings"]["adapter"]["method"] == run.adapter.method
    assert (still["coefficients"], still["head_parameters"]) == (before["coefficients"], before["head_parameters"])
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    train(again(run, tmp_path / "a", tmp_path / "c", loop=LOOP))
    one, other = tensors(tmp_path / "a"), tensors(tmp_path / "c")
    changed = [name for name in one if not torch.equal(one[name], other[name])]
    assert any("classifier" in name for name in changed)
    assert method == "none" or any("classifier" not in name for name in changed)


def test_a_packed_file_and_a_store_work_as_the_folder_does(
    first: TrainSettings, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with AdapterStore(tmp_path / "some.db") as store:
        store.add("mine", packed)
    monkeypatch.setenv("RANDBASIS_STORE", str(tmp_path / "some.db"))
    places = {"a": first.output, "b": packed, "c": "store:mine"}
    summaries = {name: train(again(first, where, tmp_path / name, loop=LOOP)).summary for name, where in places.items()}
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "c"))
    assert not same(tensors(tmp_path / "a"), tensors(first.output))
    assert summaries["c"]["from"] == "store:mine@1"
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == first.model


def test_what_the_adapter_decides_is_in_the_settings(first: TrainSettings, packed: Path, tmp_path: Path):
    told = train(again(first, packed, tmp_path / "a")).summary["settings"]
    assert told["adapter"] | {"targets": None} == {
        **told["adapter"], "method": "nola", "rank": 2, "basis": 8, "seed": 5, "targets": None,
    }  # fmt: skip
    assert told["adapter"]["targets"] == ["query", "value"]
    assert (told["max_length"], told["pooling"], told["data"]["label_kind"]) == (20, "model", "class")
    assert (told["data"]["text_column"], told["data"]["label_column"]) == ("sentence", "label")


CONFLICTS: list[tuple[str, dict[str, Any]]] = [
    ("rank 3", {"adapter": AdapterSettings(rank=3)}),
    ("method 'vera'", {"adapter": AdapterSettings(method="vera")}),
    ("seed 6", {"adapter": AdapterSettings(seed=6)}),
    ("targets value", {"adapter": AdapterSettings(targets=("value",))}),
    ("max_length 9", {"max_length": 9}),
    ("pooling 'mean'", {"pooling": "mean"}),
]


@pytest.mark.parametrize(("told", "changes"), CONFLICTS, ids=[told for told, _ in CONFLICTS])
def test_what_says_otherwise_is_refused_by_name(
    first: TrainSettings, tmp_path: Path, told: str, changes: dict[str, Any]
):
    with pytest.raises(SettingError, match=f"^{told} conflicts with the adapter to start from"):
        train(again(first, first.output, tmp_path / "a", **changes))
    assert not (tmp_path / "a").exists()


def test_the_meaning_of_rows_is_the_adapters(first: TrainSettings, tmp_path: Path):
    run = again(first, first.output, tmp_path / "a")
    with pytest.raises(SettingError, match="label_kind 'number' conflicts"):
        train(replace(run, data=replace(run.data, label_kind="number")))
    with pytest.raises(SettingError, match="text_pair_column 'label' conflicts"):
        train(replace(run, data=replace(run.data, text_pair_column="label")))
    with pytest.raises(SettingError, match="task 'causal-lm' conflicts"):
        train(replace(run, task="causal-lm"))
    with pytest.raises(OutputExistsError, match="must not be the folder that is read from"):
        train(replace(run, output=first.output, overwrite=True))
    rows = [{"sentence": "a film", "label": "dull"}, {"sentence": "a book", "label": "neg"}] * 4
    with pytest.raises(LabelError, match=r"label 'dull'.*was not seen in training"):
        train(replace(run, data=DataSettings(write_csv(tmp_path / "dull.csv", rows), eval=first.data.eval)))


def test_other_rows_with_other_columns_and_one_of_the_classes(first: TrainSettings, packed: Path, tmp_path: Path):
    rows = [{"text": one["sentence"], "mood": one["label"]} for one in sentences(24, 7) if one["label"] == "pos"]
    data = DataSettings(write_csv(tmp_path / "rows.csv", rows), eval_fraction=0.0, text_column="text",
                        label_column="mood")  # fmt: skip
    train(replace(again(first, packed, tmp_path / "a", loop=LOOP), data=data))
    task = json.loads((tmp_path / "a" / "task.json").read_text())["task"]
    assert task["labels"] == ["neg", "pos"]
    assert task["columns"] == {"text": "text", "text_pair": None, "label": "mood"}


def test_an_adapter_without_a_head_or_of_another_kind_is_refused(first: TrainSettings, tmp_path: Path):
    from peft import IA3Config, get_peft_model
    from transformers import AutoModelForSequenceClassification

    for name, config in (
        ("bare", LoraConfig(r=2, target_modules=["query"])),
        ("other", IA3Config(target_modules=["query"], feedforward_modules=[])),
    ):
        base: Any = AutoModelForSequenceClassification.from_pretrained(first.model)
        get_peft_model(base, config).save_pretrained(str(tmp_path / name))
    with pytest.raises(AdapterFilesError, match="has no head 'classifier'"):
        train(replace(first, adapter=AdapterSettings(), from_adapter=tmp_path / "bare", output=tmp_path / "a"))
    with pytest.raises(UnknownMethodError, match="'ia3', which cannot be trained here"):
        train(replace(first, adapter=AdapterSettings(), from_adapter=tmp_path / "other", output=tmp_path / "a"))


def test_a_run_from_an_adapter_resumes(first: TrainSettings, packed: Path, tmp_path: Path):
    flat = replace(LOOP, max_steps=3, eval_every=3, schedule="constant", warmup=0.0, keep="last")
    half = again(first, packed, tmp_path / "a", loop=flat, keep_checkpoints=True)
    train(half)
    train(replace(half, loop=replace(flat, max_steps=6), resume=True))
    train(again(first, packed, tmp_path / "b", loop=replace(flat, max_steps=6)))
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    with pytest.raises(SettingError, match="from_adapter was"):
        train(replace(half, loop=replace(flat, max_steps=6), resume=True, from_adapter=first.output))


# --- language models, by the columns and the format of the adapter ---


def test_a_language_model_has_its_format(language_model: str, pairs_jsonl: str, tmp_path: Path):
    data = DataSettings(pairs_jsonl, eval=pairs_jsonl, prompt_column="mr", target_column="ref")
    run = TrainSettings("causal-lm", language_model, data, tmp_path / "a", adapter=NOLA, loop=LOOP, separator="=")
    run = replace(run, adapter=replace(NOLA, targets=("all-linear",)))
    before = train(run).summary
    bare = again(run, tmp_path / "a", tmp_path / "b", separator=TrainSettings.separator)
    still = train(bare).summary
    assert still["before"] == pytest.approx(before["after"], rel=1e-5)
    assert still["settings"]["separator"] == "="
    with pytest.raises(SettingError, match="separator '>' conflicts"):
        train(replace(bare, separator=">", output=tmp_path / "c"))
    with pytest.raises(SettingError, match=r"end_token 'a' conflicts.*'</s>'"):
        train(replace(bare, end_token="a", output=tmp_path / "c"))
    with pytest.raises(SettingError, match="messages_column 'mr' conflicts"):
        train(replace(bare, data=replace(bare.data, messages_column="mr"), output=tmp_path / "c"))


# --- the command ---


def command(*words: object) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, words)], catch_exceptions=False)


def test_the_command_names_its_option_and_keeps_from_in_its_file(first: TrainSettings, packed: Path, tmp_path: Path):
    words = ["--task", first.task, "--model", first.model, "--data", first.data.train, "--eval-data", first.data.eval,
             "--from", packed, "--max-steps", 2, "--batch-size", 8, "--threads", 1, "--quiet", "--json"]  # fmt: skip
    for option, value in (("--rank", 3), ("--seed", 0), ("--method", "lora"), ("--targets", "key")):
        refused = command(*words, "--output", tmp_path / "a", option, value)
        assert refused.exit_code == 2, option
        assert json.loads(refused.stdout)["message"].startswith(f"{option} "), option
    done = command(*words, "--output", tmp_path / "a", "--rank", 2, "--method", "nola")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["from"] == str(packed)
    kept = tmp_path / "a" / "run.yaml"
    assert yaml.safe_load(kept.read_text())["from"] == str(packed)
    assert command("--config", kept, "--output", tmp_path / "b", "--quiet").exit_code == 0
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))

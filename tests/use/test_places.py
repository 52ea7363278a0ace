"""What was trained is used alike wherever it lies: the task travels with the coefficients."""

import json
from pathlib import Path
from typing import Any

import pytest
from trained_runs import PLACES, TASKS, Trained
from typer.testing import CliRunner

from randbasis.adapter_file import read
from randbasis.adapters import open_adapter, unpack_adapter
from randbasis.cli import app
from randbasis.store import AdapterStore

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*are longer than"),
    pytest.mark.filterwarnings("ignore:the packed file names the base model"),
]


def run(*words: object) -> Any:
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def used(command: str, where: object, one: Trained, *words: object) -> Any:
    return run(command, "--adapter", where, "--model", one.base, "--data", one.data, "--threads", 1, *words)


@pytest.mark.parametrize("task", TASKS)
class TestEveryTask:
    def test_evaluate_and_predict_as_from_the_folder(self, task: str, trained: dict[str, Trained]):
        one = trained[task]
        for command in ("evaluate", "predict") if task != "plain" else ("evaluate",):
            expected = used(command, one.folder, one)
            for place in PLACES:
                assert used(command, one.where[place], one) == expected, place
            assert expected.get("rows") or expected["metrics"]

    def test_a_folder_again(self, task: str, trained: dict[str, Trained], tmp_path: Path):
        one = trained[task]
        unpack_adapter(one.where["file"], tmp_path / "again", base_name=one.base)
        written, again = (json.loads((Path(f) / "task.json").read_text()) for f in (one.folder, tmp_path / "again"))
        assert written == again
        assert used("evaluate", tmp_path / "again", one) == used("evaluate", one.folder, one)

    def test_the_task_is_told(self, task: str, trained: dict[str, Trained]):
        one = trained[task]
        described = open_adapter(one.folder).task
        assert described
        for place in PLACES:
            assert run("inspect", one.where[place])["task"] == described
        assert run("verify", one.where["file"])["task"] == described["task"]

    def test_at_few_bits_it_is_what_it_unpacks_to(self, task: str, trained: dict[str, Trained], tmp_path: Path):
        """Packed anew, or rounded, into a file or a folder: the task stays."""
        one = trained[task]
        run("quantize", one.where["file"], tmp_path / "four.safetensors", "--bits", 4)
        run("quantize", one.folder, tmp_path / "four", "--bits", 4)
        assert used("evaluate", tmp_path / "four.safetensors", one) == used("evaluate", tmp_path / "four", one)
        run("pack", one.where["store"], tmp_path / "eight.safetensors", "--bits", 8)
        assert read(tmp_path / "eight.safetensors").spec.task == open_adapter(one.folder).task


@pytest.mark.parametrize("task", ["prompt", "template", "chat", "plain"])
def test_generate_as_from_the_folder(task: str, trained: dict[str, Trained]):
    one = trained[task]
    words = ["generate", "--model", one.base, "--prompt", "ab", "--max-new-tokens", 5]
    expected = run(*words, "--adapter", one.folder)
    for place in PLACES:
        assert run(*words, "--adapter", one.where[place]) == expected


def test_an_average_has_the_task_that_all_have(trained: dict[str, Trained], tmp_path: Path):
    one = trained["text"]
    for name in ("mean", "mean.safetensors"):
        run("average", one.folder, one.where["file"], "--output", tmp_path / name, "--base-name", one.base)
        assert open_adapter(tmp_path / name).task == open_adapter(one.folder).task


def test_names_of_columns_are_of_one_use_alone(trained: dict[str, Trained], tmp_path: Path):
    """Specs are shared between the adapters of one kind, so that a column that is renamed must not stay so."""
    one = trained["text"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"words": "a good film"}\n')
    words = ["predict", "--adapter", one.where["file"], "--model", one.base]
    assert run(*words, "--data", rows, "--text-column", "words")["rows"][0]["words"] == "a good film"
    assert open_adapter(one.where["file"]).task == open_adapter(one.folder).task


def test_an_entry_of_a_store_is_read_once(trained: dict[str, Trained], monkeypatch: pytest.MonkeyPatch):
    """What the options need to know is asked of the adapter that then answers."""
    asked: list[str] = []
    own = AdapterStore.get

    def get(self: AdapterStore, name: str, **options: Any) -> Any:
        asked.append(name)
        return own(self, name, **options)

    monkeypatch.setattr(AdapterStore, "get", get)
    one = trained["prompt"]
    for command in ("evaluate", "predict"):
        used(command, one.where["store"], one, "--max-new-tokens", 1)
    run("generate", "--adapter", one.where["store"], "--model", one.base, "--prompt", "a", "--max-new-tokens", 1)
    run("inspect", one.where["store"])
    assert asked == ["of/prompt"] * 4


@pytest.mark.parametrize(
    "words",
    [
        ["predict", "--data", "{data}", "--model", "{base}", "--output", "{store}", "--adapter", "{adapter}"],
        ["generate", "--prompt", "a", "--model", "{base}", "--output", "{store}", "--adapter", "{adapter}"],
        ["inspect", "{adapter}", "--plot", "{store}"],
        ["pack", "{adapter}", "{store}"],
        ["quantize", "{adapter}", "{store}"],
        ["export", "{adapter}", "{store}", "--to", "gguf-lora", "--base", "{base}"],
    ],
)
@pytest.mark.parametrize("behind", ["", "-wal"])
def test_nothing_is_written_over_the_store_that_is_read(
    words: list[str], behind: str, trained: dict[str, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    one, store = trained["prompt"], tmp_path / "some.safetensors"
    monkeypatch.setenv("RANDBASIS_STORE", str(store))
    with AdapterStore(store) as opened:
        opened.add("mine", one.where["file"])
        output = f"{store}{behind}"
        assert Path(output).exists()
        before = Path(output).read_bytes()
        said = {"{data}": one.data, "{base}": one.base, "{store}": output, "{adapter}": "store:mine"}
        result = CliRunner().invoke(app, [*[said.get(word, word) for word in words], "--overwrite"])
        assert result.exit_code == 2, result.output
        assert "output must not be" in result.output.replace("\n", " ")
        assert Path(output).read_bytes() == before

"""The one reader: what a command says of an adapter does not depend on where it lies."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification
from tuner_cases import Case, fill, make_config, seeded
from typer.testing import CliRunner

from randbasis.adapter_file import read
from randbasis.adapters.packed import exact, pack_adapter
from randbasis.adapters.saved import open_adapter, open_folder
from randbasis.cli import app
from randbasis.errors import (
    AdapterFilesError,
    AdapterMissingError,
    NotStoredError,
    RemoteError,
    StoreMissingError,
)
from randbasis.store import AdapterStore
from randbasis.use import UseSettings, evaluate, generate

PLACES = ("folder", "file", "url", "store", "version")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, language_model: str) -> Iterator[dict[str, dict[str, str]]]:
    """Place → the adapters `a` and `b` of one basis there, of the language model; one step of the store is newer."""
    folder = tmp_path_factory.mktemp("places")
    url = f"memory://{os.urandom(8).hex()}"
    found: dict[str, dict[str, str]] = {place: {} for place in PLACES}
    with pytest.MonkeyPatch.context() as patch, AdapterStore(folder / "some.db") as store:
        patch.setenv("RANDBASIS_STORE", str(folder / "some.db"))
        for seed, name in enumerate("ab", 1):
            base = AutoModelForCausalLM.from_pretrained(language_model)
            config = make_config("nola", ["q_proj", "v_proj"], task_type="CAUSAL_LM", share_basis=False)
            model = get_peft_model(base, config)
            fill(model, seed=seed)
            model.save_pretrained(str(folder / name))
            found["folder"][name] = str(folder / name)
            found["file"][name] = str(folder / f"{name}.safetensors")
            pack_adapter(folder / name, folder / f"{name}.safetensors", bits=32, base_name="tiny")
            found["url"][name] = f"{url}/{name}.safetensors"
            read(folder / f"{name}.safetensors").write(found["url"][name])
            store.add(f"team/{name}", folder / f"{name}.safetensors")
            found["store"][name], found["version"][name] = f"store:team/{name}", f"store:team/{name}@1"
        yield found


def run(*words: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def told(document: Any) -> Any:
    """Without what has to differ: where the adapter lies, how it names its base, and the size of its file."""
    if isinstance(document, dict):
        apart = ("adapter", "bytes", "output", "base_model", "source", "exact_bytes")
        return {key: told(value) for key, value in document.items() if key not in apart}
    return [told(one) for one in document] if isinstance(document, list) else document


@pytest.mark.parametrize("place", PLACES[1:])
class TestEveryPlaceIsTheFolder:
    def test_inspect(self, place: str, adapters: Any):
        there, here = run("inspect", adapters[place]["a"]), run("inspect", adapters["folder"]["a"])
        assert told(there) == told(here)
        assert there["rows"]

    def test_diff(self, place: str, adapters: Any):
        words = adapters[place]
        expected = run("diff", adapters["folder"]["a"], adapters["folder"]["b"])
        assert run("diff", words["a"], words["b"]) == expected
        assert run("diff", words["a"], adapters["folder"]["a"])["coefficients"]["distance"] == 0

    def test_average(self, place: str, adapters: Any, tmp_path: Path):
        for name in ("folder", place):
            words = adapters[name]
            run("average", words["a"], words["b"], "--output", tmp_path / name, "--base-name", "tiny")
        assert_same_tensors(tmp_path / "folder", tmp_path / place)

    @pytest.mark.filterwarnings("ignore:the packed file names the base model")
    def test_quantize(self, place: str, adapters: Any, tmp_path: Path):
        one, two = (
            run("quantize", adapters[name]["a"], tmp_path / f"{name}.safetensors") for name in ("folder", place)
        )
        assert told(one["precisions"]) == told(two["precisions"])

    @pytest.mark.filterwarnings("ignore:the layers keep the paths")
    def test_export(self, place: str, adapters: Any, language_model: str, tmp_path: Path):
        for name in ("folder", place):
            run("export", adapters[name]["a"], tmp_path / name, "--to", "peft-lora", "--base", language_model)
        assert_same_tensors(tmp_path / "folder", tmp_path / place)

    def test_merge(self, place: str, adapters: Any, language_model: str, tmp_path: Path):
        for name in ("folder", place):
            run("merge", "--model", language_model, "--adapter", adapters[name]["a"], "--output", tmp_path / name)
        assert_same_tensors(tmp_path / "folder", tmp_path / place, "model.safetensors")

    def test_evaluate(self, place: str, adapters: Any, language_model: str, pairs_jsonl: str):
        words = ["evaluate", "--model", language_model, "--data", pairs_jsonl, "--prompt-column", "mr",
                 "--target-column", "ref", "--limit", "3", "--no-texts"]  # fmt: skip
        expected = run(*words, "--adapter", adapters["folder"]["a"])
        assert run(*words, "--adapter", adapters[place]["a"]) == expected
        assert expected["metrics"] != run(*words)["metrics"]

    def test_predict_and_generate(self, place: str, adapters: Any, language_model: str, pairs_jsonl: str):
        words = ["predict", "--model", language_model, "--data", pairs_jsonl, "--prompt-column", "mr", "--limit", "2",
                 "--max-new-tokens", "4"]  # fmt: skip
        expected = run(*words, "--adapter", adapters["folder"]["a"])
        assert run(*words, "--adapter", adapters[place]["a"]) == expected
        words = ["generate", "--model", language_model, "--prompt", "a", "--max-new-tokens", "4"]
        expected = run(*words, "--adapter", adapters["folder"]["a"])
        assert run(*words, "--adapter", adapters[place]["a"]) == expected


def assert_same_tensors(first: Path, second: Path, name: str = "adapter_model.safetensors") -> None:
    one, two = load_file(first / name), load_file(second / name)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_an_adapter_at_hand_or_its_bytes(adapters: Any, language_model: str):
    data = Path(adapters["file"]["a"]).read_bytes()
    packed = read(adapters["file"]["a"])
    expected = exact(open_adapter(adapters["folder"]["a"]), base_name="tiny")
    for location in (data, packed, open_adapter(packed)):
        found = open_adapter(location)
        assert (found.kind, found.method, found.base_model, found.folder) == ("RANDBASIS", "nola", "tiny", None)
        assert exact(found).to_bytes() == expected.to_bytes()
        assert found.shapes == open_adapter(adapters["folder"]["a"]).shapes
    settings = UseSettings(adapter=packed, model=language_model)
    assert generate(settings, ["a"]) == generate(
        UseSettings(adapter=adapters["folder"]["a"], model=language_model), ["a"]
    )


def test_a_packed_classifier_says_what_is_missing(tmp_path: Path, held_csv: str, encoder: str):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    base = seeded(BertForSequenceClassification, BertConfig(**sizes, vocab_size=20, num_labels=2))
    config = make_config("vera", ["query"], task_type="SEQ_CLS", modules_to_save=["classifier"])
    get_peft_model(base, config).save_pretrained(str(tmp_path / "adapter"))
    pack_adapter(tmp_path / "adapter", tmp_path / "file")
    settings = UseSettings(adapter=tmp_path / "file", model=encoder, data=held_csv)
    with pytest.raises(
        AdapterFilesError, match=r"nothing describes the task of .*none was packed with it.*folder of a training run"
    ):
        evaluate(settings)


def test_a_head_alone(tmp_path: Path):
    from safetensors.torch import save_file

    save_file({"classifier.weight": torch.zeros(2, 3)}, tmp_path / "head.safetensors")
    found = open_adapter(tmp_path)
    assert (found.is_head, found.method, found.shapes) == (True, "none", {"classifier.weight": (2, 3)})
    for words in (["inspect", tmp_path], ["diff", tmp_path, tmp_path]):
        result = CliRunner().invoke(app, [*map(str, words)])
        assert result.exit_code == 2
        assert "trained head" in result.output.replace("\n", " ")


def test_other_methods_of_peft_are_told_apart(tmp_path: Path):
    get_peft_model(Case("linear", "nola").base(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    found = open_adapter(tmp_path)
    assert (found.kind, found.method) == ("LORA", "LORA")
    with pytest.raises(AdapterFilesError, match="LORA adapter of PEFT"):
        found.ours()


# --- what is not there ---


def test_nothing_there(tmp_path: Path, memory_folder: str):
    with pytest.raises(AdapterMissingError, match="there is nothing at"):
        open_adapter(tmp_path / "nowhere")
    with pytest.raises((AdapterFilesError, FileNotFoundError, RemoteError), match=memory_folder):
        open_adapter(f"{memory_folder}/nowhere")
    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(ValueError, match=r"text\.json"):
        open_adapter(tmp_path / "text.json")
    with pytest.raises(AdapterFilesError, match="is a file"):
        open_folder(tmp_path / "text.json")


def test_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The message names both ways to say which store is meant."""
    monkeypatch.delenv("RANDBASIS_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    for path in (None, tmp_path / "none.db"):
        if path is not None:
            monkeypatch.setenv("RANDBASIS_STORE", str(path))
        with pytest.raises(
            StoreMissingError, match=r"variable RANDBASIS_STORE.*'adapters\.db' in the working directory"
        ):
            open_adapter("store:a")
    monkeypatch.delenv("RANDBASIS_STORE")
    Case("linear", "vera").adapted().save_pretrained(tmp_path / "adapter")
    pack_adapter(tmp_path / "adapter", tmp_path / "file")
    with AdapterStore("adapters.db") as store:
        store.add("a", tmp_path / "file")
        store.add("a@x", tmp_path / "file")
    assert open_adapter("store:a").where == "store:a@1"
    assert open_adapter("store:a@x@1").where == "store:a@x@1"
    for name, message in (("store:b", "no adapter 'b'; there are: a, a@x$"), ("store:a@7", "no such version"),
                          ("store:a@y", "no adapter 'a@y'")):  # fmt: skip
        with pytest.raises(NotStoredError, match=message):
            open_adapter(name)

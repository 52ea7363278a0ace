"""What goes to a hub: the files, the card and nothing of this machine; and a hub that takes it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from fake_hub import FakeHub, serving
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from randbasis import NolaConfig, RandbasisConfig, RandLoraConfig, VeraConfig, errors
from randbasis.adapter_file import PackedAdapter
from randbasis.adapters import pack_adapter
from randbasis.cli import app
from randbasis.hub import build_hub_folder, push_to_hub
from randbasis.store import AdapterStore

PROGRAM = Path(__file__).parent / "push_and_load.py"


def base(folder: Path) -> LlamaForCausalLM:
    if not folder.exists():
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
        LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model, and an adapter of it as `save_pretrained` leaves it."""
    place = tmp_path_factory.mktemp("hub")
    config = NolaConfig(r=2, num_basis=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", seed=7)
    config.init_weights = False
    get_peft_model(base(place / "base"), config).save_pretrained(place / "adapter")
    return place / "base", place / "adapter"


@pytest.fixture
def adapter(folders: tuple[Path, Path]) -> Path:
    return folders[1]


@pytest.fixture
def hub(folders: tuple[Path, Path]) -> Iterator[tuple[FakeHub, str]]:
    found = FakeHub()
    found.repositories["acme/tiny"] = {file.name: file.read_bytes() for file in folders[0].iterdir()}
    with serving(found) as url:
        yield found, url


def program(url: str, home: Path, *words: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_secret",
    }
    command = [sys.executable, str(PROGRAM), *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_an_adapter_is_sent_and_the_code_of_its_card_loads_it(
    folders: tuple[Path, Path], hub: tuple[FakeHub, str], tmp_path: Path
):
    found, url = hub
    run = program(url, tmp_path, folders[1], "--base-name", "acme/tiny", "--packed", "8", "--private")
    assert run.returncode == 0, run.stderr
    answer: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    files = found.repositories["me/nola"]
    again = files.pop("again.safetensors")  # what the program wrote to hf://
    assert again == files["packed.safetensors"]
    assert {name: len(data) for name, data in files.items()} == answer["files"]
    assert found.private["me/nola"]
    assert found.messages[0] == "nola adapter, by randbasis"
    assert "Bearer hf_secret" in found.tokens
    assert answer["blocks"] == 2
    with torch.no_grad():
        model = PeftModel.from_pretrained(base(folders[0]), folders[1])
        expected = model.eval()(torch.arange(6)[None]).logits.flatten()
        plain = base(folders[0])(torch.arange(6)[None]).logits.flatten()
    assert torch.equal(torch.tensor(answer["logits"]), expected)
    assert not torch.allclose(plain, expected)


def test_a_hub_that_refuses(adapter: Path, hub: tuple[FakeHub, str], monkeypatch: pytest.MonkeyPatch):
    found, url = hub
    found.refuses = True
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(errors.HubError, match=r"(?s)me/nola could not be sent to the hub .*403.*HF_TOKEN"):
        push_to_hub(adapter, "me/nola", base_name="acme/tiny", token="hf_secret", endpoint=url)


def test_offline_is_an_error_of_ours(adapter: Path):
    with pytest.raises(errors.HubError, match=r"me/nola could not be sent to the hub .*offline"):
        push_to_hub(adapter, "me/nola", base_name="acme/tiny")


def test_the_card_is_filled_in(adapter: Path, tmp_path: Path):
    built = build_hub_folder(
        adapter, tmp_path / "out", "me/nola-q", base_name="acme/tiny", license="apache-2.0", packed_bits=4
    )
    card = ModelCard.load(built.path / "README.md")
    assert card.data.base_model == "acme/tiny"
    assert card.data.library_name == "peft"
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "text-generation"
    assert {"peft", "randbasis", "nola", "base_model:adapter:acme/tiny"} <= set(card.data.tags)
    packed = PackedAdapter.from_bytes((built.path / "packed.safetensors").read_bytes())
    size = (adapter / "adapter_model.safetensors").stat().st_size
    assert packed.spec.count == 2 * 2 * (4 + 4)
    for line in (
        "| method | NOLA, Koohpayegani et al., ICLR 2024, arXiv 2310.02556 |",
        "| r | 2 |",
        "| num_basis | 4 |",
        "| seed | 7 |",
        "| law | sign |",
        "| adapted matrices | 4 layers: q_proj, v_proj |",
        f"| coefficients | {packed.spec.count} |",
        f"| `adapter_model.safetensors` | {size:,} bytes |",
        f"| `packed.safetensors` | {built.files['packed.safetensors']:,} bytes, 4 bits a coefficient |",
        'base = AutoModelForCausalLM.from_pretrained("acme/tiny")',
        'model = PeftModel.from_pretrained(base, "me/nola-q")',
    ):
        assert line in card.text.splitlines()
    assert "More Information Needed" not in card.text


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (VeraConfig(r=3, target_modules=["q_proj"]), ["A VeRA adapter", "| d_initial | 0.1 |", "arXiv 2310.11454"]),
        (
            RandLoraConfig(r=3, target_modules=["q_proj"]),
            ["A RandLoRA adapter", "| scaling | hf |", "import AutoModel\n"],
        ),
    ],
)
def test_the_card_of_another_method(
    config: RandbasisConfig, words: list[str], folders: tuple[Path, Path], tmp_path: Path
):
    get_peft_model(base(folders[0]), config).save_pretrained(tmp_path / "adapter")
    built = build_hub_folder(tmp_path / "adapter", tmp_path / "out", "me/other", base_name="acme/tiny")
    assert [word for word in words if word not in built.card] == []
    assert "license" not in built.card


def test_the_number_of_labels_comes_from_the_head(tmp_path: Path):
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=24, num_labels=5))
    config = NolaConfig(r=2, num_basis=4, target_modules=["query"], task_type="SEQ_CLS")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    built = build_hub_folder(tmp_path / "adapter", tmp_path / "out", "me/classes", base_name="acme/bert")
    assert 'AutoModelForSequenceClassification.from_pretrained("acme/bert", num_labels=5)' in built.card
    assert f"| trained beside them | {16 * 5 + 5} parameters of the head |" in built.card
    assert "pipeline_tag: text-classification" in built.card


def test_nothing_of_this_machine_is_sent(adapter: Path, tmp_path: Path):
    for name in ("checkpoint.bin", "history.jsonl", ".secret"):
        (adapter / name).write_text("private")
    task = {"base_model": str(adapter), "method": "nola", "task": {"task": "causal-lm"}}
    summary = {"after": {"loss": 1.25, "perplexity": None}, "eval_rows": 12, "settings": {"data": str(adapter)}}
    try:
        (adapter / "task.json").write_text(json.dumps(task))
        (adapter / "summary.json").write_text(json.dumps(summary))
        built = build_hub_folder(adapter, tmp_path / "out", "me/nola", base_name="acme/tiny")
        (adapter / "summary.json").write_text("[]")
        with pytest.raises(errors.AdapterFilesError, match=r"summary\.json must be what"):
            build_hub_folder(adapter, tmp_path / "none", "me/nola", base_name="acme/tiny")
    finally:
        for name in ("checkpoint.bin", "history.jsonl", ".secret", "task.json", "summary.json"):
            (adapter / name).unlink()
    assert not (tmp_path / "none").exists()
    assert built.files.keys() == {"adapter_config.json", "adapter_model.safetensors", "task.json", "README.md"}
    text = b"".join(file.read_bytes() for file in built.path.iterdir())
    assert str(adapter.parent).encode() not in text
    assert json.loads((built.path / "task.json").read_text())["base_model"] == "acme/tiny"
    assert json.loads((built.path / "adapter_config.json").read_text())["base_model_name_or_path"] == "acme/tiny"
    assert "on 12 held-out rows" in built.card
    assert "| loss | 1.2500 |" in built.card
    assert "snapshot_download" in built.card


def test_a_card_that_somebody_wrote_stays(folders: tuple[Path, Path], tmp_path: Path):
    get_peft_model(base(folders[0]), VeraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    assert not build_hub_folder(tmp_path / "adapter", tmp_path / "a", "me/a", base_name="acme/tiny").own_card
    (tmp_path / "adapter" / "README.md").write_text("# Mine\n")
    built = build_hub_folder(tmp_path / "adapter", tmp_path / "b", "me/a", base_name="acme/tiny")
    assert (built.own_card, built.card) == (True, "# Mine\n")


def test_names_that_no_hub_takes(adapter: Path, tmp_path: Path):
    with pytest.raises(errors.HubNameError, match=r"repo_id must be a name on the hub.*'not a name'"):
        build_hub_folder(adapter, tmp_path / "out", "not a name", base_name="acme/tiny")
    with pytest.raises(errors.HubNameError, match="base_name must be"):
        build_hub_folder(adapter, tmp_path / "out", "me/nola", base_name="../base")
    with pytest.raises(errors.HubNameError, match="give base_name"):  # the fixture's base is a folder
        build_hub_folder(adapter, tmp_path / "out", "me/nola")
    assert not (tmp_path / "out").exists()


def test_the_command_shows_what_it_would_send(adapter: Path, tmp_path: Path):
    words = ["push", str(adapter), "me/nola", "--base-name", "acme/tiny", "--dry-run", str(tmp_path / "out")]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0
    assert (tmp_path / "out" / "README.md").read_text() in shown.stdout
    assert CliRunner().invoke(app, words).exit_code == 2  # it is there
    again = CliRunner().invoke(app, [*words, "--overwrite", "--json"])
    answer = json.loads(again.stdout)
    assert answer["files"] == {file.name: file.stat().st_size for file in (tmp_path / "out").iterdir()}
    assert answer["card"].startswith("---\n")


@pytest.mark.filterwarnings("ignore:the packed file names the base model")
def test_a_packed_or_stored_adapter_is_sent_as_the_folder_is(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same files at 32 bits, with the task of the packed file; the card is made."""
    source = tmp_path / "source"
    shutil.copytree(adapter, source)
    task = {"task": "causal-lm", "columns": {"text": "a"}, "max_length": 8, "separator": "", "end_id": 2}
    about = {"base_model": "x", "method": "nola", "task": task | {"answer_length": 3}}
    (source / "task.json").write_text(json.dumps(about))
    pack_adapter(source, tmp_path / "a.safetensors", bits=32)
    monkeypatch.setenv("RANDBASIS_STORE", str(tmp_path / "some.db"))
    with AdapterStore(tmp_path / "some.db") as store:
        store.add("mine", tmp_path / "a.safetensors")
    build_hub_folder(source, tmp_path / "folder", "me/a", base_name="acme/tiny")
    for number, where in enumerate((str(tmp_path / "a.safetensors"), "store:mine")):
        words = ["push", where, "me/a", "--base-name", "acme/tiny", "--dry-run", str(tmp_path / str(number)), "--json"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        assert "randbasis.load" in json.loads(result.stdout)["card"]
        for name in ("adapter_config.json", "task.json"):
            there, here = (json.loads((tmp_path / one / name).read_text()) for one in (str(number), "folder"))
            assert {**there, "inference_mode": True} == {**here, "inference_mode": True}
        there, here = (load_file(tmp_path / one / "adapter_model.safetensors") for one in (str(number), "folder"))
        assert there.keys() == here.keys()
        assert all(torch.equal(there[key], here[key]) for key in there)

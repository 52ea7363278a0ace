"""Commands that write over what others of them wrote: no file of an earlier set is left to be read as the new one's."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertModel, LlamaForCausalLM, pipeline
from typer.testing import CliRunner

import randbasis.train.run as run_module
from randbasis import NolaConfig
from randbasis.adapters.packed import pack_adapter
from randbasis.adapters.putting import load_packed
from randbasis.cli import app
from randbasis.errors import OutputExistsError, PartialModelError, RandbasisError
from randbasis.export import export_peft_lora
from randbasis.train import AdapterSettings, DataSettings, LoopSettings, TrainSettings, train
from randbasis.use import UseSettings, evaluate

SHORT = LoopSettings(max_steps=4, batch_size=8, learning_rate=1e-2, eval_every=2, threads=1)
METHODS = {
    "nola": AdapterSettings(method="nola", rank=2, basis=8),
    "vera": AdapterSettings(method="vera", rank=4),
    "randlora": AdapterSettings(method="randlora", rank=4),
    "pranc": AdapterSettings(method="pranc", basis=8),
    "lora": AdapterSettings(method="lora", rank=2),
}
NOLA = METHODS["nola"]


@pytest.fixture
def run(encoder: str, sentences_csv: str, held_csv: str, tmp_path: Path) -> TrainSettings:
    data = DataSettings(sentences_csv, eval=held_csv, text_column="sentence", label_column="label")
    return TrainSettings("sequence-classification", encoder, data, tmp_path / "run", adapter=NOLA, loop=SHORT)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def command(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output


def test_a_run_without_a_method_in_the_place_of_one_with_a_method_answers_with_its_own_head(run: TrainSettings):
    train(run)
    (Path(run.output) / "notes.txt").write_text("mine")
    done = train(replace(run, adapter=AdapterSettings(method="none"), overwrite=True))
    names = {path.name for path in Path(run.output).iterdir()}
    assert names == {"head.safetensors", "task.json", "summary.json", "history.jsonl", "loss.png", "run.yaml",
             "notes.txt"}  # fmt: skip
    scores = evaluate(UseSettings(run.output, data=run.data.eval, threads=1))["metrics"]
    assert scores["loss"] == pytest.approx(done.summary["after"]["loss"], abs=1e-6)


def test_what_an_earlier_run_told_does_not_stand_beside_an_unpacked_adapter(run: TrainSettings, tmp_path: Path):
    train(replace(run, keep_checkpoints=True))
    pack_adapter(run.output, tmp_path / "file.safetensors", base_name="base")
    assert command("unpack", tmp_path / "file.safetensors", run.output, "--overwrite")[0] == 0
    left = {path.name for path in Path(run.output).iterdir()}
    assert left == {"adapter_config.json", "adapter_model.safetensors", "task.json"}
    assert json.loads((Path(run.output) / "task.json").read_text())["base_model"] == "base"  # the file's, not the run's


def failing(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("there", ["nothing", "notes", "an adapter", "checkpoints"])
def test_a_run_that_fails_leaves_the_output_as_it_was(there: str, run: TrainSettings, monkeypatch: pytest.MonkeyPatch):
    output = Path(run.output)
    if there == "notes":
        output.mkdir()
        (output / "notes.txt").write_text("mine")
    elif there != "nothing":
        train(replace(run, keep_checkpoints=there == "checkpoints"))
    before = contents(output) if output.exists() else None
    monkeypatch.setattr(run_module, "fit", failing)
    with pytest.raises(KeyboardInterrupt):
        train(replace(run, overwrite=True))
    assert (contents(output) if output.exists() else None) == before


def test_a_run_that_fails_leaves_what_somebody_put_there_meanwhile(run: TrainSettings, monkeypatch: pytest.MonkeyPatch):
    def noted(*_: object, **__: object) -> None:
        (Path(run.output) / "notes.txt").write_text("mine")
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "fit", noted)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    assert contents(Path(run.output)) == {"notes.txt": b"mine"}


EXISTS = "exists; give --overwrite to replace it, or another name"
WRITERS: dict[str, Callable[[Path, Path], list[object]]] = {
    "export": lambda a, out: ["export", a, out, "--to", "peft-lora"],
    "export merged": lambda a, out: ["export", a, out, "--to", "merged"],
    "merge": lambda a, out: ["merge", "--model", a.parent.parent / "base", "--adapter", a, "--output", out],
    "import nola": lambda a, out: ["import", a.with_name("lora"), out, "--to", "nola", "--rank", 2, "--basis", 4],
    "import lora": lambda a, out: ["import", a.with_name("lora"), out, "--to", "peft-lora", "--rank", 1],
    "import merged": lambda a, out: ["import", a.with_name("lora"), out, "--to", "merged"],
    "unpack": lambda a, out: ["unpack", a.with_name("packed"), out],
    "quantize": lambda a, out: ["quantize", a, out, "--base-name", "me/base"],
    "average": lambda a, out: ["average", a, a, "--output", out],
    "push": lambda a, out: ["push", a, "me/a", "--base-name", "me/base", "--dry-run", out],
}


@pytest.fixture(scope="module")
def adapters(language_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and in `runs` an adapter of ours, a LoRA and a packed file."""
    folder = tmp_path_factory.mktemp("writers")
    shutil.copytree(language_model, folder / "base")
    with torch.random.fork_rng(devices=()):
        for name, config in (
            ("a", NolaConfig(r=2, num_basis=4, target_modules=["q_proj"], init_weights=False)),
            ("lora", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)),
        ):
            model = LlamaForCausalLM.from_pretrained(folder / "base")
            get_peft_model(model, config).save_pretrained(str(folder / "runs" / name))
    pack_adapter(folder / "runs" / "a", folder / "runs" / "packed", base_name="me/base")
    return folder


@pytest.mark.parametrize("name", WRITERS)
def test_every_command_that_writes_a_folder_keeps_the_rule(name: str, adapters: Path, tmp_path: Path):
    root = tmp_path / "root"
    shutil.copytree(adapters, root)
    for file in root.glob("runs/*/adapter_config.json"):
        file.write_text(file.read_text().replace(str(adapters), str(root)))
    source, before = root / "runs" / "a", contents(root)
    for output in (root / "runs", *([source] if name not in ("unpack",) and "import" not in name else [])):
        code, said = command(*WRITERS[name](source, output), "--overwrite")
        assert (code, "output must not" in said) == (2, True), said
    code, said = command(*WRITERS[name](source, Path("s3://bucket/out")), "--overwrite")
    assert (code, "path of this machine" in said) == (2, True), said
    assert contents(root) == before
    out = root / "out"
    old = {"task.json", "summary.json", "head.safetensors", "packed.safetensors"}
    (out / "mine").mkdir(parents=True)
    for file in [*old, "notes.txt", "mine/rows.csv"]:
        (out / file).write_text("there")
    code, said = command(*WRITERS[name](source, out))
    assert (code, EXISTS in said) == (2, True), said
    code, said = command(*WRITERS[name](source, out), "--overwrite")
    assert code == 0, said
    now = contents(out)
    assert {now.pop("notes.txt"), now.pop("mine/rows.csv")} == {b"there"}
    assert not now.keys() & old
    assert not [file for file in now if file.startswith(".")]
    assert "config.json" in now or "adapter_config.json" in now


FILE_WRITERS: dict[str, Callable[[Path, Path], list[object]]] = {
    "pack": lambda a, out: ["pack", a, out, "--base-name", "me/base"],
    "quantize": lambda a, out: ["quantize", a, out, "--base-name", "me/base"],
    "average": lambda a, out: ["average", a, a, "--output", out],
    "export": lambda a, out: ["export", a, out, "--to", "gguf-lora"],
    "inspect": lambda a, out: ["inspect", a, "--plot", out],
    "predict": lambda a, out: [
        *("predict", "--adapter", a, "--data", a.with_name("rows.csv"), "--prompt-column", "prompt"),
        *("--max-new-tokens", 1, "--output", out),
    ],
    "generate": lambda a, out: ["generate", "--adapter", a, "--prompt", "a", "--max-new-tokens", 1, "--output", out],
    "store get": lambda a, out: ["store", "get", a.with_name("store.db"), "packed", "--output", out],
}
SUFFIXES = {"inspect": ".png", "predict": ".jsonl", "generate": ".jsonl", "export": ".gguf"}


@pytest.mark.parametrize("name", FILE_WRITERS)
def test_every_command_that_writes_a_file_keeps_the_rule(
    name: str, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = tmp_path / "root"
    shutil.copytree(adapters, root)
    source = root / "runs" / "a"
    (root / "runs" / "rows.csv").write_text("prompt\na b\n")
    assert command("store", "add", root / "runs" / "store.db", root / "runs" / "packed")[0] == 0
    out = (root / "out").with_suffix(SUFFIXES.get(name, ".safetensors"))
    out.write_text("there")
    before = contents(root)
    words = FILE_WRITERS[name](source, out)

    def refused(told: str, place: Path, *more: str, code: int = 2) -> None:
        done, said = command(*FILE_WRITERS[name](source, place), *more)
        assert (done, told in said) == (code, True), said
        assert contents(root) == before

    refused(EXISTS, out)
    refused(f"{out.name}' is a file; give another name", out / out.name, "--overwrite", code=1)
    refused("there is no folder", root / "new" / out.name, code=1)
    part = root / "runs" / "store.db" if name == "store get" else source / "adapter_model.safetensors"
    refused("output must not", part, "--overwrite")
    (root / f"folder{out.suffix}").mkdir()
    refused("exists and is a folder", root / f"folder{out.suffix}", "--overwrite")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused("the disk is full", out, "--overwrite", code=1)
        refused("what was there before is kept", out.with_stem("new"), code=1)
    assert command(*words, "--overwrite")[0] == 0
    after = contents(root)
    assert after.keys() == before.keys()
    assert {file for file in after if after[file] != before[file]} == {out.name}


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_data_and_base_are_sources_of_a_run(run: TrainSettings, tmp_path: Path):
    for output in (run.model, Path(run.model) / "run", Path(str(run.data.train)).parent):
        with pytest.raises(OutputExistsError, match="output must not"):
            train(replace(run, output=output, overwrite=True))


# --- a head that nobody loads ---


@pytest.mark.parametrize("method", METHODS)
def test_a_class_without_the_head_that_was_trained_is_told_and_not_answered_with(method: str, run: TrainSettings):
    train(replace(run, adapter=METHODS[method], pooling="mean"))
    with pytest.raises(ValueError, match=r"[Tt]arget modules .*not found|No modules were targeted"):
        pipeline("text-classification", model=str(run.output))
    with pytest.raises(ValueError, match=r"[Tt]arget modules .*not found|No modules were targeted"):
        PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(run.model), run.output)


def test_the_lora_of_it_is_told_by_plain_classes_too(run: TrainSettings, tmp_path: Path):
    train(replace(run, pooling="mean"))
    done = export_peft_lora(run.output, tmp_path / "lora")
    assert done.head == "apart"
    with pytest.raises(ValueError, match=r"not found in the base model|No modules were targeted"):
        PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(run.model), tmp_path / "lora")
    PeftModel.from_pretrained(BertModel.from_pretrained(run.model), tmp_path / "lora")


def test_an_export_of_a_packed_classifier_needs_its_base(run: TrainSettings, tmp_path: Path):
    run = replace(run, pooling="mean")
    train(run)
    pack_adapter(run.output, tmp_path / "file", base_name="not-here/base")
    code, said = command("export", tmp_path / "file", tmp_path / "lora", "--to", "peft-lora")
    assert (code, "base must be given" in said, "--base" in said) == (2, True, True), said
    assert not (tmp_path / "lora").exists()
    code, said = command("export", tmp_path / "file", tmp_path / "lora", "--to", "peft-lora", "--base", run.model)
    assert code == 0, said
    ups = [t for name, t in load_file(tmp_path / "lora" / "adapter_model.safetensors").items() if "lora_B" in name]
    assert ups
    assert all(up.abs().sum() > 0 for up in ups)
    lora = PeftModel.from_pretrained(BertModel.from_pretrained(run.model), tmp_path / "lora").eval()
    pooled = run_module.prepare(run).load_model(run)
    ours = load_packed(pooled, tmp_path / "file").eval().base_model.model.encoder
    tokens = torch.arange(4, 16).view(2, 6)
    with torch.no_grad():
        got, want = lora(tokens).last_hidden_state, ours(tokens).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_base_that_lacks_a_weight_of_its_backbone_is_not_trained_on(run: TrainSettings, tmp_path: Path):
    for pooling in ("mean", "model"):
        shutil.copytree(run.model, tmp_path / pooling)
        tensors = load_file(tmp_path / pooling / "model.safetensors")
        tensors = {
            name: tensor for name, tensor in tensors.items() if "layer.1.attention.self.query.weight" not in name
        }

        save_file(tensors, tmp_path / pooling / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(PartialModelError, match=r"layer\.1\.attention\.self\.query\.weight"):
            train(replace(run, model=str(tmp_path / pooling), pooling=pooling))
    assert issubclass(PartialModelError, RandbasisError)


def test_a_merged_model_says_who_merged_it(adapters: Path, tmp_path: Path):
    assert command("export", adapters / "runs" / "a", tmp_path / "out", "--to", "merged")[0] == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["merged_by"] == "randbasis"
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert command("export", adapters / "runs" / "a", tmp_path / "out", "--to", "peft-lora", "--overwrite")[0] == 0
    assert contents(tmp_path / "out").keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert command("export", adapters / "runs" / "a", adapters / "base", "--to", "peft-lora", "--overwrite")[0] == 2

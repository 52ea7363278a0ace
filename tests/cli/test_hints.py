"""What goes wrong in a first hour, and what the command says: the place, and the way out."""

import errno
import os
from pathlib import Path

import pytest
from tiny_runs import letters_tokenizer, sentences, write_csv
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from randbasis.cli import app


def train(model: str, data: object, output: Path, *words: str) -> list[str]:
    return [
        "train", "--task", "sequence-classification", "--model", model, "--data", str(data), "--text-column",
        "sentence", "--label-column", "label", "--max-steps", "1", "--output", str(output), *words,
    ]  # fmt: skip


def refused(words: list[str]) -> str:
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code in (1, 2)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_latin_1(encoder: str, tmp_path: Path):
    (tmp_path / "rows.csv").write_bytes("sentence,label\nun café,good\n".encode("latin-1"))
    told = refused(train(encoder, tmp_path / "rows.csv", tmp_path / "run"))
    assert "line 2 of rows.csv is not text in UTF-8" in told
    assert "iconv -f windows-1252 -t utf-8 rows.csv > rows-utf8.csv" in told


def test_semicolons(encoder: str, tmp_path: Path):
    (tmp_path / "rows.csv").write_text("sentence;label\na film;good\n")
    told = refused(train(encoder, tmp_path / "rows.csv", tmp_path / "run"))
    assert "its cells seem to be separated by semicolons: save it with commas" in told


def deny(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the rights to a file or folder away; from root, who has all of them, as the system would answer others."""
    path.chmod(0o500 if path.is_dir() else 0)
    if os.geteuid() != 0:
        return
    opened, allowed = Path.open, os.access

    def no_open(self: Path, *words: object, **options: object) -> object:
        if self == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return opened(self, *words, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Path, "open", no_open)
    monkeypatch.setattr(
        os,
        "access",
        lambda one, mode, **more: not (Path(one) == path and mode & os.W_OK) and allowed(one, mode, **more),
    )


def test_a_file_that_may_not_be_read(encoder: str, sentences_csv: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = Path(write_csv(tmp_path / "rows.csv", sentences(8, 1)))
    deny(rows, monkeypatch)
    told = refused(train(encoder, rows, tmp_path / "run"))
    assert f"'{rows}' could not be opened: permission denied; give another one, or get the right to it" in told
    assert "Errno" not in told


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_that_may_not_be_written(
    made: bool, encoder: str, sentences_csv: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Told before anything is read."""
    folder = tmp_path / "mine"
    folder.mkdir()
    deny(folder, monkeypatch)
    told = refused(train(encoder, "no such rows", folder if made else folder / "new" / "run", "--overwrite"))
    assert f"there is no right to write into the folder '{folder}'" in told
    told = refused(["predict", "--model", encoder, "--data", sentences_csv, "--output", str(folder / "answers.csv")])
    assert f"there is no right to write into the folder '{folder}'" in told


def test_pairs_for_an_adapter_of_single_texts(encoder: str, sentences_csv: str, tmp_path: Path):
    words = train(encoder, sentences_csv, tmp_path / "run", "--method", "nola", "--rank", "2", "--basis", "4")
    assert CliRunner().invoke(app, [*words, "--eval-fraction", "0"]).exit_code == 0
    for command in ("evaluate", "predict"):
        told = refused(
            [command, "--adapter", str(tmp_path / "run"), "--data", sentences_csv, "--text-pair-column", "x"]
        )
        assert "--text-pair-column has no meaning here, got 'x': the adapter was trained on single texts" in told


def test_columns_for_an_adapter_with_a_template(language_model: str, pairs_jsonl: str, tmp_path: Path):
    words = ["train", "--task", "causal-lm", "--model", language_model, "--data", pairs_jsonl, "--prompt-template",
             "{mr} =", "--target-column", "ref", "--method", "nola", "--rank", "2", "--basis", "4", "--max-steps", "1",
             "--eval-fraction", "0", "--output", str(tmp_path / "run")]  # fmt: skip
    assert CliRunner().invoke(app, words).exit_code == 0
    told = refused(["evaluate", "--adapter", str(tmp_path / "run"), "--data", pairs_jsonl, "--prompt-column", "mr"])
    assert "--prompt-column has no meaning here, got 'mr': the adapter has a template for it, of 'mr'" in told


@pytest.fixture(scope="module")
def adapters(encoder: str, language_model: str, sentences_csv: str, pairs_jsonl: str,
             tmp_path_factory: pytest.TempPathFactory) -> Path:  # fmt: skip
    """A classifier and a language model's adapter, the latter as a LoRA of plain PEFT too."""
    folder = tmp_path_factory.mktemp("adapters")
    small = ["--method", "nola", "--rank", "2", "--basis", "4", "--eval-fraction", "0"]
    writer = ["train", "--task", "causal-lm", "--model", language_model, "--data", pairs_jsonl, "--prompt-column", "mr",
              "--target-column", "ref", "--max-steps", "1", "--output", str(folder / "writer")]  # fmt: skip
    for words in (
        [*train(encoder, sentences_csv, folder / "reviews"), *small],
        [*writer, *small],
        ["export", str(folder / "writer"), str(folder / "lora"), "--to", "peft-lora"],
        ["pack", str(folder / "reviews"), str(folder / "reviews.safetensors"), "--base-name", "acme/encoder"],
    ):
        assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("wide"))
    LlamaForCausalLM(LlamaConfig(vocab_size=33, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                                 num_key_value_heads=2, intermediate_size=64, bos_token_id=1, eos_token_id=2,
                                 pad_token_id=3, tie_word_embeddings=False)).save_pretrained(folder)  # fmt: skip
    letters_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("adapter", ["reviews", "reviews.safetensors", "writer", "lora"])
@pytest.mark.parametrize("command", ["use", "merge", "export", "train", "inspect"])
def test_a_wrong_base(
    command: str, adapter: str, adapters: Path, encoder: str, language_model: str, wide: str, sentences_csv: str,
    pairs_jsonl: str, tmp_path: Path,
):  # fmt: skip
    """Both are named, the base that the adapter was made for and the one that was given, in one line."""
    source, output = str(adapters / adapter), str(tmp_path / "out")
    classifier = adapter.startswith("reviews")
    base = language_model if classifier else wide
    task = "sequence-classification" if classifier else "causal-lm"
    data = sentences_csv if classifier else pairs_jsonl
    words = {
        "use": ["evaluate", "--adapter", source, "--model", base, "--data", data],
        "merge": ["merge", "--adapter", source, "--model", base, "--output", output],
        "export": ["export", source, output, "--to", "peft-lora", "--base", base],
        "train": ["train", "--task", task, "--from", source, "--model", base, "--data", data, "--output", output,
                  "--max-steps", "1", "--quiet"],
        "inspect": ["inspect", source, "--model", base],
    }[command]  # fmt: skip
    if adapter == "lora" and command in ("merge", "export", "inspect"):
        pytest.skip("a LoRA of PEFT is merged and exported by PEFT")
    if adapter == "reviews.safetensors" and command == "inspect":
        pytest.skip("a packed file tells its shapes")
    told = refused(words)
    own = {"reviews": encoder, "reviews.safetensors": "acme/encoder"}.get(adapter, language_model)
    assert f"{source} was made for '{own}', and does not fit '{base}': " in told
    assert len(told) < 1200

"""The task embedding: losses against their formulas, scores against the bare encoder, what can be done with it."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from scipy.stats import pearsonr, spearmanr
from tiny_runs import sentences, write_csv
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer
from typer.testing import CliRunner

from randbasis.adapters import pack_adapter
from randbasis.cli import app
from randbasis.errors import LabelError, SettingError
from randbasis.train import AdapterSettings, DataSettings, LoopSettings, TrainSettings, train
from randbasis.train.embedding import contrastive, cosent
from randbasis.use import load

NOLA = AdapterSettings(method="nola", rank=2, basis=16, seed=5)
LOOP = LoopSettings(max_steps=40, batch_size=8, learning_rate=5e-2, eval_every=20, threads=1, device="cpu")


def pairs(count: int, seed: int) -> list[dict[str, str]]:
    """Two sentences each; they are alike when both are good or both are bad."""
    ones, others = sentences(count, seed), sentences(count + 1, seed + 100)
    rows = [(one, others[i + i // 2 % 2]) for i, one in enumerate(ones)]  # the kinds of both alternate
    return [
        {"one": a["sentence"], "other": b["sentence"], "alike": "4.5" if a["label"] == b["label"] else "0.5"}
        for a, b in rows
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pairs")
    return write_csv(folder / "train.csv", pairs(64, 1)), write_csv(folder / "held.csv", pairs(24, 2))


def settings(encoder: str, files: tuple[str, str], output: Path, *, scored: bool) -> TrainSettings:
    data = DataSettings(files[0], eval=files[1], text_column="one", text_pair_column="other",
                        label_column="alike" if scored else None)  # fmt: skip
    return TrainSettings("embedding", encoder, data, output, adapter=NOLA, loop=LOOP)


@pytest.fixture(scope="module")
def trained(encoder: str, files: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("embedding") / "run"
    train(settings(encoder, files, output, scored=True))
    return output


def rows_of(file: str) -> list[dict[str, str]]:
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def mean_vectors(model: torch.nn.Module, name: str, texts: list[str]) -> Tensor:
    """One text at a time, so that there is no padding: the plain mean over the tokens."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model.eval()
    with torch.no_grad():
        found = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
    return torch.stack(found).double()


def cosines(model: torch.nn.Module, name: str, rows: list[dict[str, str]]) -> Tensor:
    one, other = (mean_vectors(model, name, [row[key] for row in rows]) for key in ("one", "other"))
    return cosine_similarity(one, other)


def test_the_losses_are_their_formulas():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.nn.functional.normalize(torch.randn(5, 4, generator=generator), dim=-1) for _ in range(2))
    expected = 0.0
    for i in range(5):
        logits = [20 * float(first[i] @ second[j]) for j in range(5)]
        expected += (math.log(sum(map(math.exp, logits))) - logits[i]) / 5
    assert float(contrastive(first, second)) == pytest.approx(expected, rel=1e-5)
    values, scores = [0.1, 0.3, -0.2, 0.3], [1.0, 5.0, 2.0, 1.0]
    terms = [math.exp(20 * (values[i] - values[j])) for i in range(4) for j in range(4) if scores[i] < scores[j]]
    assert len(terms) == 5
    assert float(cosent(torch.tensor(values), torch.tensor(scores))) == pytest.approx(
        math.log(1 + sum(terms)), rel=1e-5
    )
    assert float(cosent(torch.tensor(values), torch.ones(4))) == 0.0


def test_before_is_the_untouched_encoder(encoder: str, files: tuple[str, str], trained: Path):
    summary = json.loads((trained / "summary.json").read_text())
    rows = rows_of(files[1])
    own, expected = cosines(AutoModel.from_pretrained(encoder), encoder, rows), [float(row["alike"]) for row in rows]
    assert summary["before"]["spearman"] == pytest.approx(spearmanr(own, expected).statistic, abs=1e-5)
    assert summary["before"]["pearson"] == pytest.approx(pearsonr(own, expected).statistic, abs=2e-4)
    assert summary["metric"] == "spearman"
    assert summary["head_parameters"] == 0


def test_it_learns_the_scores_that_it_is_shown(encoder: str, tmp_path: Path):
    """Eight pairs by heart; the bare encoder's norms are reset, which else make every cosine nearly 1."""
    model = AutoModel.from_pretrained(encoder)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.reset_parameters()
    model.save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "encoder")
    file = write_csv(tmp_path / "few.csv", pairs(8, 1))
    run = settings(str(tmp_path / "encoder"), (file, file), tmp_path / "run", scored=True)
    loop = replace(LOOP, learning_rate=1e-2, max_steps=100, eval_every=50)
    summary = train(replace(run, adapter=replace(NOLA, rank=4, basis=64), loop=loop)).summary
    assert summary["before"]["spearman"] < 0.1
    assert summary["after"]["spearman"] > 0.7


def test_peft_loads_it_on_automodel_and_the_pooler_is_left_alone(encoder: str, files: tuple[str, str], trained: Path):
    rows = rows_of(files[1])
    plain = PeftModel.from_pretrained(AutoModel.from_pretrained(encoder), str(trained))
    assert not [name for name, value in plain.named_parameters() if "pooler" in name and "randbasis" in name]
    answers = load(trained, device="cpu").predict([[row["one"], row["other"]] for row in rows], batch_size=5)
    expected = cosines(plain, encoder, rows)
    assert [answer["prediction"] for answer in answers] == pytest.approx(expected.tolist(), abs=1e-5)


def test_single_texts_have_embeddings_wherever_the_adapter_lies(encoder: str, trained: Path, tmp_path: Path):
    pack_adapter(trained, tmp_path / "e.safetensors", bits=32, base_name="encoder")
    texts = ["a good film", "the book", "so very sad a day"]
    expected = mean_vectors(PeftModel.from_pretrained(AutoModel.from_pretrained(encoder), str(trained)), encoder, texts)
    for where in (trained, tmp_path / "e.safetensors"):
        found = load(where, encoder, device="cpu").predict(texts)
        assert torch.allclose(torch.tensor([one["embedding"] for one in found]).double(), expected, atol=1e-5)
    file = write_csv(tmp_path / "texts.csv", [{"one": text} for text in texts])
    result = CliRunner().invoke(
        app, ["predict", "--adapter", str(trained), "--data", file, "--device", "cpu", "--json"]
    )
    found = json.loads(result.stdout)["rows"]
    assert torch.allclose(torch.tensor([one["embedding"] for one in found]).double(), expected, atol=1e-5)


def test_without_scores_partners_are_found(encoder: str, tmp_path: Path):
    """A sentence and itself in another order, whose mean of the hidden states differs by the positions."""
    rows = [{"one": one["sentence"], "other": " ".join(one["sentence"].split()[::-1])} for one in sentences(48, 3)]
    files = write_csv(tmp_path / "train.csv", rows[:32]), write_csv(tmp_path / "held.csv", rows[32:])
    run = settings(encoder, files, tmp_path / "run", scored=False)
    summary = train(run).summary
    assert summary["metric"] == "loss"
    assert summary["after"]["loss"] < summary["before"]["loss"]
    base = AutoModel.from_pretrained(encoder)
    one, other = (mean_vectors(base, encoder, [row[key] for row in rows[32:]]) for key in ("one", "other"))
    table = cosine_similarity(one[:, None], other[None], dim=-1)
    own = torch.arange(16)
    assert summary["before"]["accuracy"] == float((table.argmax(-1) == own).float().mean())
    assert summary["before"]["loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(20 * table, own)), abs=1e-4
    )
    words = ["evaluate", "--adapter", str(tmp_path / "run"), "--device", "cpu", "--json", "--data"]
    plain = json.loads(CliRunner().invoke(app, [*words, files[1]]).stdout)["metrics"]
    assert plain == pytest.approx(summary["after"], abs=1e-5)
    scored = write_csv(tmp_path / "scored.csv", pairs(24, 2))
    told = json.loads(CliRunner().invoke(app, [*words, scored, "--label-column", "alike"]).stdout)
    assert {*told["metrics"]} == {"spearman", "pearson"}


def test_from_an_adapter(encoder: str, files: tuple[str, str], trained: Path, tmp_path: Path):
    still = replace(LOOP, max_steps=1, eval_every=1, learning_rate=0.0)
    bare = TrainSettings("embedding", encoder, DataSettings(files[0], eval=files[1]), tmp_path / "a", loop=still)
    summary = train(replace(bare, from_adapter=trained)).summary
    assert summary["before"] == pytest.approx(json.loads((trained / "summary.json").read_text())["after"], abs=1e-6)


def test_what_it_refuses(encoder: str, files: tuple[str, str], tmp_path: Path):
    run = settings(encoder, files, tmp_path / "run", scored=True)
    with pytest.raises(SettingError, match="needs text_column and text_pair_column"):
        train(replace(run, data=replace(run.data, text_pair_column=None)))
    with pytest.raises(LabelError, match="is not a finite number"):
        train(replace(run, data=replace(run.data, text_pair_column="alike", label_column="other")))
    with pytest.raises(SettingError, match="label_smoothing needs classes"):
        train(replace(run, loop=replace(LOOP, label_smoothing=0.1)))
    with pytest.raises(SettingError, match="trains only a head, and this task has none"):
        train(replace(run, adapter=AdapterSettings(method="none")))
    words = ["train", "--task", "embedding", "--model", encoder, "--data", files[0], "--output", str(tmp_path / "run")]
    for option in (["--pooling", "cls"], ["--shots", "2"], ["--head-learning-rate", "1"]):
        assert f"{option[0]} has no meaning here" in CliRunner().invoke(app, [*words, *option]).stderr

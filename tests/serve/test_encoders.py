"""Embeddings and classes of an encoder: one copy of it under the names that adapters of several tasks know it by."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from served import serving, store_of
from tiny_runs import sentences, write_csv

import randbasis
from randbasis.adapter_file import PackedAdapter
from randbasis.adapters import pack_adapter
from randbasis.train import AdapterSettings, DataSettings, LoopSettings, TrainSettings, train

TEXTS = ["a good film", "the very bad book", "so", "a lovely day a song the film"]
LOOP = LoopSettings(max_steps=4, batch_size=8, learning_rate=5e-2, eval_every=4, threads=1)
NOLA = AdapterSettings(method="nola", rank=2, basis=8, seed=5)


@pytest.fixture(scope="module")
def adapters(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of classes on the model's own head, one of three on a mean, and one of vectors."""
    folder = tmp_path_factory.mktemp("encoders")
    rows = sentences(48, 1)
    three = [{**row, "label": ("pos", "neg", "odd")[i % 3]} for i, row in enumerate(rows)]
    pairs = [{"sentence": row["sentence"], "other": rows[i - 2]["sentence"]} for i, row in enumerate(rows)]
    data = {
        "own": (rows, "auto", 1), "own2": (rows, "auto", 2), "mean": (three, "mean", 1), "vectors": (pairs, None, 1),
    }  # fmt: skip
    found: dict[str, Path] = {}
    for name, (table, pooling, seed) in data.items():
        file = write_csv(folder / f"{name}.csv", table)
        columns = {"text_column": "sentence"}
        columns |= {"text_pair_column": "other"} if pooling is None else {"label_column": "label"}
        task = "embedding" if pooling is None else "sequence-classification"
        options: dict[str, Any] = {} if pooling is None else {"pooling": pooling}
        method = replace(NOLA, seed=seed)
        settings = TrainSettings(
            task,
            encoder,
            DataSettings(file, eval=file, **columns),
            folder / name,
            method,
            LOOP,
            max_length=9,
            **options,
        )
        train(settings)
        pack_adapter(folder / name, found.setdefault(name, folder / f"{name}.safetensors"), bits=32, base_name="bert")
    return found


def test_vectors_and_classes_are_those_of_each_adapter_alone(adapters: dict[str, Path], encoder: str, tmp_path: Path):
    store = store_of(
        tmp_path / "s.db", {name: PackedAdapter.from_bytes(file.read_bytes()) for name, file in adapters.items()}
    )
    with serving(encoder, store, name="bert") as served:
        client = served.openai()
        loaded = {name: randbasis.load(file, encoder, device="cpu") for name, file in adapters.items()}

        def classes(name: str) -> Any:
            return httpx.post(f"{served.url}/v1/classify", json={"model": name, "input": TEXTS}).json()["data"]

        with ThreadPoolExecutor(8) as pool:
            told = dict(zip(("own", "own2", "mean"), pool.map(classes, ("own", "own2", "mean")), strict=True))
            again = list(pool.map(classes, ["own", "mean", "own2"] * 6))
        assert again == [told["own"], told["mean"], told["own2"]] * 6 or all(
            row["probs"] == pytest.approx(other["probs"], abs=1e-5)
            for one, name in zip(again, ["own", "mean", "own2"] * 6, strict=True)
            for row, other in zip(one, told[name], strict=True)
        )
        for name, rows in told.items():
            expected = loaded[name].predict(TEXTS, probabilities=True)
            assert [one["label"] for one in rows] == [one["prediction"] for one in expected]
            for row, one in zip(rows, expected, strict=True):
                own = [one["probabilities"][label] for label in row["labels"]]
                assert row["probs"] == pytest.approx(own, abs=1e-5)
                assert row["num_classes"] == len(own) == (3 if name == "mean" else 2)
        expected = torch.tensor([one["embedding"] for one in loaded["vectors"].predict(TEXTS)])
        expected = torch.nn.functional.normalize(expected, dim=-1)
        for encoding in ("float", "base64", None):
            options: dict[str, Any] = {} if encoding is None else {"encoding_format": encoding}
            found = client.embeddings.create(model="vectors", input=TEXTS, **options)
            assert [one.index for one in found.data] == [0, 1, 2, 3]
            if encoding != "base64":
                vectors = torch.tensor([one.embedding for one in found.data])
                torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-5)
        base = client.embeddings.create(model="bert", input="a good film").data[0].embedding
        assert sum(one * one for one in base) == pytest.approx(1, abs=1e-5)
        assert base != pytest.approx(expected[0].tolist(), abs=1e-3)
        for name in ("bert", "vectors"):
            refused = httpx.post(f"{served.url}/v1/classify", json={"model": name, "input": TEXTS})
            assert refused.status_code == 400
            assert "name an adapter with a head" in refused.json()["error"]["message"]
        with pytest.raises(openai.BadRequestError, match="writes no texts"):
            client.completions.create(model="bert", prompt="a")
        with pytest.raises(openai.BadRequestError, match="from 1 to 32 tokens"):
            client.embeddings.create(model="bert", input="good " * 40)
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(model="bert", input=[[1, 99]])
        leases = [one.leases for bank in served.running.bank._banks.values() for one in bank.residents()]
        assert leases == [0, 0, 0, 0]

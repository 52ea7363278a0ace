"""Real files and real pretrained models: that they are read as they are meant, and that a short run learns."""

from pathlib import Path

import pytest

from randbasis.train import (
    AdapterSettings,
    DataSettings,
    LoopSettings,
    TextClassification,
    TrainSettings,
    prepare,
    read_table,
    train,
)
from randbasis.use import UseSettings, evaluate


def text_run(data_dir: Path, output: Path, data: DataSettings, **rest: object) -> TrainSettings:
    return TrainSettings("sequence-classification", str(data_dir / "minilm_l6_h384"), data, output, **rest)


def test_glue_files_have_their_published_rows(data_dir: Path):
    sst2 = read_table(data_dir / "glue/sst2/dev.tsv.gz")
    assert (len(sst2.rows), sst2.columns) == (872, ("sentence", "label"))
    cola = read_table(data_dir / "glue/cola/in_domain_dev.tsv.gz", wanted=("1", "3"))
    assert (len(cola.rows), set(cola.column("1"))) == (527, {"0", "1"})
    stsb = read_table(data_dir / "glue/stsb/sts-dev.csv.gz", kind="tsv", wanted=("4",))
    assert len(stsb.rows) == 1500
    assert {0.0, 5.0} <= set(map(float, stsb.column("4")))
    e2e = read_table(data_dir / "e2e/testset_w_refs.csv.gz")
    assert (len(e2e.rows), len(set(e2e.column("mr")))) == (4693, 630)
    assert len(read_table(data_dir / "webnlg2017/dev.jsonl.gz").rows) == 872
    assert len(read_table(data_dir / "alpaca5k/alpaca_5000.json.gz").rows) == 5000


def test_sts_is_a_regression_of_pairs(data_dir: Path, tmp_path: Path):
    file = data_dir / "glue/stsb/sts-dev.csv.gz"
    data = DataSettings(
        file, kind="tsv", text_column="5", text_pair_column="6", label_column="4", limit=8, eval_limit=4
    )
    task = prepare(text_run(data_dir, tmp_path, data)).task
    assert isinstance(task, TextClassification)
    assert (task.labels, task.metric, task.pooling) == (None, "pearson", "model")


def test_a_head_on_a_real_encoder_learns_sentiment(data_dir: Path, tmp_path: Path):
    folder = data_dir / "glue/sst2"
    data = DataSettings(folder / "train.tsv.gz", eval=folder / "dev.tsv.gz", text_column="sentence",
                        label_column="label", limit=240, eval_limit=64)  # fmt: skip
    loop = LoopSettings(max_steps=20, batch_size=16, learning_rate=2e-2, eval_every=20)
    head = AdapterSettings(method="none")  # on the mean that this encoder was pretrained with
    settings = text_run(data_dir, tmp_path / "run", data, adapter=head, loop=loop, pooling="mean")
    assert train(settings).summary["after"]["accuracy"] > 0.6


def test_five_shots_of_flowers(data_dir: Path, tmp_path: Path):
    loop = LoopSettings(max_steps=20, batch_size=16, learning_rate=5e-3, head_learning_rate=2e-2, eval_every=20)
    settings = TrainSettings(
        "image-classification", str(data_dir / "vit_tiny_patch16_224"),
        DataSettings(data_dir / "flowers12/flowers12_224.zip", shots=5, eval_limit=48), tmp_path / "run",
        adapter=AdapterSettings("nola", rank=1, basis=16, targets=("q_proj", "v_proj", "query", "value")), loop=loop,
        image_size=64,
    )  # fmt: skip
    outcome = train(settings)
    assert outcome.summary["before"]["accuracy"] < 0.35
    assert outcome.summary["after"]["accuracy"] > 0.4
    data = data_dir / "flowers12/flowers12_224.zip"
    again = evaluate(UseSettings(adapter=outcome.output, data=data, split="test", limit=48))
    assert again["rows"] == 48
    assert again["metrics"]["accuracy"] > 0.4


@pytest.mark.parametrize("method", ["nola", "lora"])
def test_a_real_language_model_learns_the_form_of_an_answer(data_dir: Path, tmp_path: Path, method: str):
    data = DataSettings(data_dir / "e2e/trainset.csv.gz", eval=data_dir / "e2e/devset.csv.gz", prompt_column="mr",
                        target_column="ref", limit=200, eval_limit=16)  # fmt: skip
    adapter = AdapterSettings(method, rank=4, targets=("q_proj", "v_proj", "o_proj", "down_proj"))
    loop = LoopSettings(max_steps=25, batch_size=8, learning_rate=1e-2, eval_every=25)
    model = str(data_dir / "llama_stories260k")
    summary = train(TrainSettings("causal-lm", model, data, tmp_path / "run", adapter=adapter, loop=loop)).summary
    assert summary["after"]["loss"] < summary["before"]["loss"] - 0.5

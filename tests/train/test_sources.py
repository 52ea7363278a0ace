"""Rows of several files, of parquet and of data sets in the form of the library datasets."""

import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from silent_hub import SilentHub
from tiny_runs import sentences, write_csv
from typer.testing import CliRunner

from randbasis.cli import app
from randbasis.errors import DataFormatError, DataMissingError, RemoteError, SettingError
from randbasis.train import DataSettings, LoopSettings, TrainSettings, prepare, read_table, train
from randbasis.train.sources import read_sources
from randbasis.use import UseSettings, evaluate

datasets = pytest.importorskip("datasets", reason="the extra 'data' is not installed")
pyarrow = pytest.importorskip("pyarrow", reason="the extra 'data' is not installed")

ROWS = [{"text": f"text {i}", "tags": ["a", "b"], "label": i % 2} for i in range(5)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    from pyarrow import parquet as writer

    writer.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_parquet_rows_come_back(tmp_path: Path):
    table = read_table(parquet(tmp_path / "rows.parquet", ROWS))
    assert table.columns == ("text", "tags", "label")
    assert table.rows == ROWS
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataFormatError, match=r"bad\.parquet cannot be read as parquet"):
        read_table(tmp_path / "bad.parquet")


def test_parquet_needs_no_name(tmp_path: Path):
    assert len(read_table(parquet(tmp_path / "rows", ROWS), kind="parquet").rows) == 5


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, console_environment: dict[str, str]):
    parquet(tmp_path / "rows.parquet", ROWS)
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from randbasis.errors import RandbasisError\n"
        "from randbasis.train.tabular import read_table\n"
        "try: read_table('rows.parquet')\n"
        "except RandbasisError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=console_environment, check=True
    )
    assert "a parquet file needs pyarrow" in done.stdout
    assert "randbasis[data]" in done.stdout


def test_several_files_are_one_behind_the_other(tmp_path: Path):
    files = [write_csv(tmp_path / f"part-{i}.csv", [{"a": str(i), "b": "x"}]) for i in (2, 1)]
    (tmp_path / "part-3.json.gz").write_bytes(gzip.compress(json.dumps([{"b": "y", "a": "3"}]).encode()))
    table = read_sources([*files, tmp_path / "part-3.json.gz"])
    assert [row["a"] for row in table.rows] == ["2", "1", "3"]
    assert table.source == "part-2.csv and 2 more"
    assert [row["a"] for row in read_sources([str(tmp_path / "part-*")]).rows] == ["1", "2", "3"]
    assert [row["a"] for row in read_sources([str(tmp_path / "**/*2.csv")]).rows] == ["2"]


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path: Path):
    assert read_sources([write_csv(tmp_path / "rows[1].csv", [{"a": "1"}])]).rows == [{"a": "1"}]


def test_files_that_do_not_go_together(tmp_path: Path):
    one, other = (write_csv(tmp_path / f"{name}.csv", [{"a": "1", name: "2"}]) for name in "xy")
    with pytest.raises(DataFormatError, match=r"y.csv has other columns than x.csv: a, y instead of a, x"):
        read_sources([one, other])
    with pytest.raises(DataMissingError, match="matches no file"):
        read_sources([str(tmp_path / "*.tsv")])


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "reviews"
    folder.mkdir()
    write_csv(folder / "train.csv", sentences(64, 1))
    write_csv(folder / "test.csv", sentences(24, 2))
    return folder


def test_a_data_set_is_trained_on_and_evaluated(encoder: str, hub_folder: Path, tmp_path: Path):
    data = DataSettings(
        f"hub:{hub_folder}:train", eval=f"hub:{hub_folder}:test", text_column="sentence", label_column="label"
    )
    loop = LoopSettings(max_steps=2, batch_size=8, threads=1)
    settings = TrainSettings("sequence-classification", encoder, data, tmp_path / "run", loop=loop)
    outcome = train(settings)
    assert (outcome.summary["train_rows"], outcome.summary["eval_rows"]) == (64, 24)
    use = UseSettings(adapter=outcome.output, data=f"hub:{hub_folder}:test", threads=1)
    assert evaluate(use)["metrics"]["loss"] == pytest.approx(outcome.summary["after"]["loss"], rel=1e-5)


def test_a_split_has_to_be_named_where_there_are_several(hub_folder: Path):
    with pytest.raises(
        DataMissingError, match=r"names no split; give one as hub:.*reviews:SPLIT; there are: test, train"
    ):
        read_sources([f"hub:{hub_folder}"])
    with pytest.raises(DataMissingError, match=r"has no split 'tests'; give one as hub:.*:SPLIT; did you mean test"):
        read_sources([f"hub:{hub_folder}:tests"])
    (hub_folder / "test.csv").unlink()
    assert len(read_sources([f"hub:{hub_folder}"]).rows) == 64


def test_classes_have_their_names(tmp_path: Path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    data = datasets.Dataset.from_list([{"text": "a", "label": 1}, {"text": "b", "label": -1}], features=features)
    (tmp_path / "named").mkdir()
    data.to_parquet(tmp_path / "named" / "train.parquet")
    assert read_sources([f"hub:{tmp_path / 'named'}"]).rows == [
        {"text": "a", "label": "pos"},
        {"text": "b", "label": None},
    ]


def test_a_hub_that_does_not_answer(silent_hub: SilentHub, language_model: str, tmp_path: Path):
    with pytest.raises(RemoteError, match=r"^hub:owner/name/plain:train: the hub \(.*could not be reached \("):
        read_sources(["hub:owner/name/plain:train"])
    assert silent_hub.asked == 2
    words = ["train", "--task", "causal-lm", "--model", language_model, "--text-column", "a"]
    words += ["--output", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*words, "--data", "hub:owner/name"], catch_exceptions=False)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1


def test_a_hub_that_fails_to_tell(monkeypatch: pytest.MonkeyPatch):
    def fails(self: HfApi, name: str, *, timeout: float) -> None:
        raise HfHubHTTPError.__bases__[0]("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("randbasis.train.hub_rows.why_unreachable", lambda: None)
    monkeypatch.setattr(HfApi, "dataset_info", fails)
    with pytest.raises(RemoteError, match=r"^hub:owner/name:train: the hub could not be reached \(Name or service"):
        read_sources(["hub:owner/name:train"])


def test_offline_and_a_wrong_name():
    with pytest.raises(DataMissingError, match="hub:owner/nothing:train cannot be read"):
        read_sources(["hub:owner/nothing:train"])
    with pytest.raises(DataMissingError, match="neither a folder here nor OWNER/NAME"):
        read_sources(["hub:a/b/c/d"])


def test_the_command_takes_files_again_and_again(encoder: str, tmp_path: Path, held_csv: str):
    files = [write_csv(tmp_path / f"{i}.csv", sentences(16, i)) for i in range(3)]
    words = ["train", "--task", "sequence-classification", "--model", encoder, "--eval-data", held_csv, "--text-column",
             "sentence", "--label-column", "label", "--max-steps", "1", "--threads", "1", "--quiet",
             "--json"]  # fmt: skip
    given = [word for file in files for word in ("--data", file)]
    one = CliRunner().invoke(app, [*words, *given, "--output", str(tmp_path / "a")], catch_exceptions=False)
    summary = json.loads(one.stdout)
    assert summary["train_rows"] == 48
    assert summary["settings"]["data"]["train"] == files
    again = CliRunner().invoke(
        app, ["train", "--config", str(tmp_path / "a" / "run.yaml"), "--output", str(tmp_path / "b"), "--json"]
    )
    assert json.loads(again.stdout)["settings"]["data"]["train"] == files


def test_images_are_one_source(vision_model: str, image_folder: Path):
    settings = TrainSettings("image-classification", vision_model, DataSettings((image_folder, image_folder)), "never")
    with pytest.raises(SettingError, match="one folder or zip, got 2"):
        prepare(settings)
    assert len(prepare(replace(settings, data=DataSettings(image_folder))).train) == 16

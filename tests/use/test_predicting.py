"""What `predict` and `generate` take and write: images that nobody sorted, prompts alone, forms of files."""

import csv
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from trained_runs import Trained
from typer.testing import CliRunner

import randbasis.use.evaluation
from randbasis import errors
from randbasis.cli import app
from randbasis.train.images import read_images
from randbasis.train.tabular import read_table
from randbasis.use import UseSettings, evaluate, predict, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*are longer than")


def command(one: Trained, *words: object, verb: str = "predict") -> Result:
    return CliRunner().invoke(app, [verb, "--adapter", one.folder, "--device", "cpu", *map(str, words)])


def said(result: Result) -> str:
    return result.output.replace("\n", " ")


# --- images ---


@pytest.fixture
def pictures(trained: dict[str, Trained], tmp_path: Path) -> tuple[list[Path], list[dict[str, Any]]]:
    """Images in one folder, one of them deeper, and their answers as images in folders of classes."""
    one = trained["image"]
    sorted_ = [Path(str(reference)) for reference in read_images(one.data)["test"].column("image")]
    answers = predict(UseSettings(one.folder, data=one.data, device="cpu"))
    found: list[Path] = []
    for number, file in enumerate(sorted_):
        found.append(tmp_path / "pictures" / ("deep/er" if number == 7 else "") / f"{'z' * (number == 7)}{number}.png")
        found[-1].parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, found[-1])
    order = sorted(range(8), key=lambda number: found[number].relative_to(tmp_path).parts)
    return [found[i] for i in order], [answers[i] for i in order]


def test_images_in_a_folder_a_zip_and_one_file(
    pictures: tuple[list[Path], list[dict[str, Any]]], trained: dict[str, Trained], tmp_path: Path
):
    files, expected = pictures
    folder = tmp_path / "pictures"
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for file in files:
            archive.write(file, file.relative_to(folder))
    for data in (folder, tmp_path / "pictures.zip"):
        rows = predict(UseSettings(trained["image"].folder, data=data, device="cpu"))
        assert [{**row, "image": ""} for row in rows] == [{**row, "image": ""} for row in unlabelled(expected)]
    (row,) = json.loads(command(trained["image"], "--data", files[2], "--json").stdout)["rows"]
    one = answer(expected[2])
    one["probability"] = pytest.approx(one["probability"], abs=1e-6)  # alone in its batch
    assert row == {"image": str(files[2]), **one}


def unlabelled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"image": row["image"], **answer(row)} for row in rows]


def answer(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("prediction", "probability")}


def test_what_is_no_image(pictures: Any, trained: dict[str, Trained], tmp_path: Path):
    settings = UseSettings(trained["image"].folder, data=tmp_path / "pictures", device="cpu")
    with pytest.raises(errors.DataFormatError, match="folder of its class"):
        evaluate(settings)
    for data, error in (("nothing", errors.DataMissingError), (trained["text"].data, errors.DataFormatError)):
        with pytest.raises(error):
            predict(UseSettings(trained["image"].folder, data=data, device="cpu"))
    with pytest.raises(errors.EmptyDataError, match="no split 'test'"):
        predict(UseSettings(trained["image"].folder, data=tmp_path / "pictures", split="test", device="cpu"))


# --- prompts ---


def test_prompts_need_no_targets(trained: dict[str, Trained], tmp_path: Path):
    one = trained["prompt"]
    expected = [row["prediction"] for row in predict(UseSettings(one.folder, data=one.data, device="cpu"))]
    prompts = [row["mr"] for row in read_table(one.data).rows]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    rows = predict(UseSettings(one.folder, data=tmp_path / "prompts.txt", columns={"prompt": "text"}, device="cpu"))
    assert [row["prediction"] for row in rows] == expected


def test_a_model_of_plain_text_answers_prompts_without_a_separator(trained: dict[str, Trained], tmp_path: Path):
    one = trained["plain"]
    (tmp_path / "prompts.jsonl").write_text('{"q": "ab"}\n')
    data = tmp_path / "prompts.jsonl"
    (row,) = predict(UseSettings(one.folder, data=data, columns={"prompt": "q"}, device="cpu"))
    generated = randbasis.use.evaluation.generate(UseSettings(one.folder, device="cpu"), ["ab"])
    assert row == {"q": "ab", "prediction": generated[0]["text"]}


# --- files ---


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a", "a.json", "A.CSV"])
def test_the_name_of_the_output_says_its_form(name: str, trained: dict[str, Trained], tmp_path: Path):
    one = trained["text"]
    words = ["--data", one.data, "--probabilities"]
    assert command(one, *words, "--output", tmp_path / name).exit_code == 0
    expected = json.loads(command(one, *words, "--json").stdout)["rows"]
    if "csv" in name.lower() or "tsv" in name:
        rows = read_table(tmp_path / name).rows
        for row, other in zip(rows, expected, strict=True):
            each = other.pop("probabilities")
            assert row == {k: str(v) for k, v in other.items()} | {f"probability_{k}": str(each[k]) for k in each}
    elif name == "a.json":
        assert json.loads((tmp_path / name).read_text()) == expected
    else:
        assert [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] == expected


def test_cells_of_a_csv(tmp_path: Path):
    rows = [{"a": 'one, "two"\nthree', "b": [1, "ä"]}, {"a": None, "c": {"k": 1}}]
    write_rows(rows, tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        assert [*csv.reader(file)] == [["a", "b", "c"], ['one, "two"\nthree', '[1, "ä"]', ""], ["", "", '{"k": 1}']]


@pytest.mark.parametrize("verb", ["predict", "generate"])
@pytest.mark.parametrize(
    ("output", "code", "message"),
    [
        ("answers.xlsx", 2, "output must end in .jsonl"),
        ("answers.csv.gz", 2, "output must end in .jsonl"),
        ("no/where.csv", 1, "there is no folder"),
        ("there.csv", 2, "exists"),
    ],
)
def test_an_output_that_cannot_be_is_found_before_the_work(
    verb: str, output: str, code: int, message: str, trained: dict[str, Trained], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """No adapter is opened for it, and a folder that is missing is not made: its name may be a slip."""
    (tmp_path / "there.csv").write_text("mine")
    one = trained["prompt"]
    monkeypatch.setattr("randbasis.adapters.saved.open_adapter", lambda *_: pytest.fail("too late"))
    words = ["--data", one.data] if verb == "predict" else ["--prompt", "a"]
    result = command(one, *words, "--output", tmp_path / output, verb=verb)
    assert result.exit_code == code, result.output
    assert message in said(result)
    assert [file.name for file in tmp_path.iterdir()] == ["there.csv"]


def test_probabilities_are_of_classes(trained: dict[str, Trained]):
    for task in ("number", "prompt"):
        result = command(trained[task], "--data", trained[task].data, "--probabilities")
        assert result.exit_code == 2
        assert "--probabilities has no meaning here" in said(result)


def test_answers_that_take_the_place_of_columns_are_told(trained: dict[str, Trained], tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"sentence": "good", "prediction": "mine"}\n')
    settings = UseSettings(trained["text"].folder, data=tmp_path / "rows.jsonl", device="cpu")
    with pytest.raises(UserWarning, match="has the columns prediction already"):  # warnings are errors in tests
        predict(settings)

"""Cells that would be taken for something else: labels, messages, missing values, quotes."""

import csv
import json
from pathlib import Path

import pytest

from randbasis.errors import ColumnError, DataFormatError, LabelError
from randbasis.train.classification import classes_of
from randbasis.train.settings import DataSettings
from randbasis.train.tabular import Table, read_table, text_of
from randbasis.train.task import LOWER_IS_BETTER


def classes(labels: list[object], kind: str = "auto"):
    return classes_of(labels, DataSettings("rows.csv", label_kind=kind), "rows.csv")


@pytest.mark.parametrize("kind", ["auto", "class"])
@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_label_is_no_class(kind: str, empty: str):
    with pytest.raises(LabelError, match=r"row 2 of rows\.csv has an empty label"):
        classes(["a", empty, "b"], kind)


@pytest.mark.parametrize("labels", [["a", "nan"], ["1", "0", "NaN"], ["x", "<NA>"], ["x", "None"]])
def test_a_missing_label_is_no_class_unless_said(labels: list[object]):
    with pytest.raises(LabelError, match="missing value"):
        classes(labels)
    assert classes(labels, "class") == tuple(sorted(map(str, labels)))


@pytest.mark.parametrize("labels", [["Pos", "pos"], ["very good", "very  good"], ["1", "1.0"], ["\u00e9", "e\u0301"]])
def test_labels_that_differ_by_spelling_are_no_two_classes_unless_said(labels: list[object]):
    with pytest.raises(LabelError, match="spelling alone"):
        classes(labels)
    assert len(classes(labels, "class") or ()) == 2


MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "cell", [MESSAGES, MESSAGES[0], str(MESSAGES), json.dumps(MESSAGES), [{"from": "human", "value": "hi"}],
             {"messages": MESSAGES}, [{"a": 1}]], ids=repr
)  # fmt: skip
def test_messages_are_no_text(cell: object):
    with pytest.raises(DataFormatError, match="chat messages"):
        text_of(cell)
    table = Table(("text",), [{"text": "fine"}, {"text": cell}], "rows.jsonl")
    with pytest.raises(ColumnError, match=r"row 2 of rows\.jsonl, column 'text'"):
        table.texts("text")


def test_a_missing_number_is_no_value():
    with pytest.raises(ColumnError, match="row 1 of rows has no value"):
        Table(("text",), [{"text": float("nan")}], "rows").column("text")


def test_missing_texts_are_counted():
    table = Table(("text",), [{"text": "a"}, {"text": ""}, {"text": "nan"}], "rows")
    with pytest.warns(UserWarning, match="2 of 3 texts in column 'text' of rows are empty"):
        assert table.texts("text") == ["a", "", "nan"]


CELLS = [["text", "label"], ['he said "no"', "1"], ['"tis', "0"], ["two\tcells", "1"], ["two\nlines", "2.5"]]


@pytest.mark.parametrize("style", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_tsv_of_a_csv_writer_comes_back(tmp_path: Path, style: int, end: str):
    path = tmp_path / "rows.tsv"
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t", quoting=style, lineterminator=end).writerows(CELLS)
    assert [list(row.values()) for row in read_table(path).rows] == CELLS[1:]


def test_a_tsv_with_quotes_of_its_own_keeps_them(tmp_path: Path):
    path = tmp_path / "rows.tsv"
    path.write_text('text\tlabel\n"a whole quote"\t1\nhe said "no"\t0\n')
    assert read_table(path).column("text") == ['"a whole quote"', 'he said "no"']


def test_numbered_columns_of_pandas_are_a_header(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text("0,1\nfine,good\n")
    assert read_table(path, wanted=("0", "1")).rows == [{"0": "fine", "1": "good"}]


def test_a_key_twice_is_refused(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1, "a": 2}\n')
    with pytest.raises(DataFormatError, match="names a key twice"):
        read_table(path)


def test_a_smaller_loss_is_a_better_one():
    assert {"loss", "perplexity"} <= LOWER_IS_BETTER
    assert not {"accuracy", "matthews", "pearson", "spearman", "bleu", "chrf"} & LOWER_IS_BETTER

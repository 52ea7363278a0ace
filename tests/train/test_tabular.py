"""Rows from files, against what was written into them."""

import csv
import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from randbasis.errors import ColumnError, DataFormatError, DataMissingError, EmptyDataError
from randbasis.train.tabular import Table, read_table, text_of

ROWS = [{"a": "1", "b": 'he said "no", twice'}, {"a": "2", "b": "ünï\tcode"}]


def write(path: Path, content: str) -> Path:
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_rows_come_back(tmp_path: Path, kind: str, packed: str):
    path = tmp_path / f"rows.{kind}{packed}"
    if kind == "csv":
        plain = tmp_path / "plain"
        with plain.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["a", "b"])
            writer.writeheader()
            writer.writerows(ROWS)
        write(path, plain.read_text())
    else:
        write(path, json.dumps(ROWS) if kind == "json" else "\n\n".join(map(json.dumps, ROWS)))
    table = read_table(path)
    assert table.columns == ("a", "b")
    assert table.rows == ROWS


def test_a_tsv_has_no_quoting(tmp_path: Path):
    path = write(tmp_path / "rows.tsv.gz", 'sentence\tlabel\n"tis a quote\t1\nno "end\t0\n')
    assert read_table(path).column("sentence") == ['"tis a quote', 'no "end']


def test_columns_by_index_mean_no_header(tmp_path: Path):
    path = write(tmp_path / "rows.tsv", "x\t0\tfirst\ny\t1\tsecond\textra\n")
    table = read_table(path, wanted=("1", "2"))
    assert table.columns == ("0", "1", "2", "3")
    assert table.column("2") == ["first", "second"]
    with pytest.raises(ColumnError, match=r"row 1 .* column '3'"):
        table.column("3")


def test_a_byte_order_mark_is_not_part_of_a_name(tmp_path: Path):
    assert read_table(write(tmp_path / "rows.csv", "\ufeffa,b\n1,2\n")).columns == ("a", "b")


def test_kind_overrides_the_name(tmp_path: Path):
    path = write(tmp_path / "rows.csv", "genre\t0.5\tone, two\n")
    assert read_table(path, kind="tsv", wanted=("1",)).rows == [{"0": "genre", "1": "0.5", "2": "one, two"}]


def test_a_text_file_is_lines_or_stories(tmp_path: Path):
    assert read_table(write(tmp_path / "a.txt", "one\n\n two \n")).rows == [{"text": "one"}, {"text": "two"}]
    stories = read_table(write(tmp_path / "b.txt.gz", "one\nline<|endoftext|>two<|endoftext|>"))
    assert stories.rows == [{"text": "one\nline"}, {"text": "two"}]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("rows.csv", "", EmptyDataError, "has no rows"),
        ("rows.csv", "a,b\n", EmptyDataError, "has no rows"),
        ("rows.csv", "a,b\n1\n", DataFormatError, "line 2 .* 1 cells, its header has 2"),
        ("rows.csv", "a,a\n1,2\n", DataFormatError, "names a column twice"),
        ("rows.csv", 'a,b\n"x,2\n', DataFormatError, "cannot be read as csv"),
        ("rows.jsonl", '{"a": 1}\n{"a":\n', DataFormatError, "line 2 .* is not JSON"),
        ("rows.jsonl", "[1]\n", DataFormatError, "record 1 .* is a list"),
        ("rows.json", '{"a": 1}', DataFormatError, "holds a dict"),
        ("rows.xlsx", "PK", DataFormatError, "does not tell what kind"),
        ("rows", "a", DataFormatError, "does not tell what kind"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        read_table(write(tmp_path / name, content))


def test_files_that_are_not_text(tmp_path: Path):
    (tmp_path / "rows.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    with pytest.raises(DataFormatError, match=r"line 2 of rows\.csv is not text in UTF-8: byte 0xff"):
        read_table(tmp_path / "rows.csv")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"a,b\n" + b"1,2\n" * 1000)[:40])
    with pytest.raises(DataFormatError, match="cannot be read as csv"):
        read_table(tmp_path / "cut.csv.gz")


def test_missing_files_and_unknown_kinds(tmp_path: Path):
    with pytest.raises(DataMissingError, match="is not a file"):
        read_table(tmp_path / "nothing.csv")
    with pytest.raises(DataFormatError, match=r"kind of data 'cvs'.*did you mean csv"):
        read_table(write(tmp_path / "rows.csv", "a\n1\n"), kind="cvs")


def test_an_unknown_column_lists_the_columns():
    with pytest.raises(
        ColumnError, match=r"'sentense' is not in data; its columns are 'sentence', 'label'.*did you mean sentence"
    ):
        Table(("sentence", "label"), [], "data").column("sentense")


def test_columns_are_listed_once():
    with pytest.raises(ColumnError) as refusal:
        Table(("sentence", "label"), [], "data").column("zzz")
    assert str(refusal.value) == "column 'zzz' is not in data; its columns are 'sentence', 'label'"


@pytest.mark.parametrize(
    ("content", "name", "told"),
    [
        ("text;label\ngood;1\n", "text", "column 'text' is not in .*separated by semicolons: save it with commas"),
        ("text;price\ngood;1,5\n", "text", "line 2 .* 2 cells, its header has 1; .* by semicolons"),
        ("text\tlabel\ngood\t1\n", "text", "by tabs: name its kind with --format tsv"),
        ("good;1\nbad;0\n", "1", "column '1' is not in .*by semicolons"),
        ("text|label\ngood|1\n", "text", "by bars"),
        ("text\ngood; fine\n", "label", "its columns are 'text'$"),
    ],
)
def test_cells_that_are_separated_otherwise(tmp_path: Path, content: str, name: str, told: str):
    with pytest.raises((ColumnError, DataFormatError), match=told):
        read_table(write(tmp_path / "rows.csv", content), wanted=(name,)).column(name)
    if "tsv" in told:
        read_table(tmp_path / "rows.csv", kind="tsv").column(name)


def test_lists_of_lists_as_text():
    assert text_of([["Aarhus", "leader", "Bundsgaard"], ["a", "b", 3]]) == "Aarhus leader Bundsgaard | a b 3"
    assert text_of(["x", "y"]) == "x | y"
    assert text_of(7) == "7"


@given(st.lists(st.lists(st.text(st.characters(exclude_characters="\r\n\t\x00", exclude_categories=["Cs"]), min_size=1),
                         min_size=2, max_size=2), min_size=1))  # fmt: skip
def test_any_cells_survive_a_tsv(tmp_path_factory: pytest.TempPathFactory, cells: list[list[str]]):
    path = tmp_path_factory.mktemp("cells") / "rows.tsv"
    path.write_text("one\ttwo\n" + "".join("\t".join(row) + "\n" for row in cells), encoding="utf-8", newline="")
    assert [list(row.values()) for row in read_table(path).rows] == cells

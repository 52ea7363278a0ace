"""Text in other encodings: read where a mark says which, else refused with the place and the way out."""

import gzip
import shutil
import subprocess
from pathlib import Path

import pytest

from randbasis.errors import DataFormatError
from randbasis.files.text_files import open_text, read_text

TEXT = "text,label\nfine,pos\nun café serré,neg\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_mark_says_the_encoding(tmp_path: Path, encoding: str, packed: bool):
    data = TEXT.encode(encoding)
    (tmp_path / "rows.csv").write_bytes(gzip.compress(data) if packed else data)
    with open_text(tmp_path / "rows.csv") as stream:
        assert stream.read() == TEXT


def test_line_ends_stay_where_rows_are_read_and_not_in_a_template(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"one\r\ntwo\r\n")
    with open_text(tmp_path / "a") as stream:
        assert stream.read() == "one\r\ntwo\r\n"
    assert read_text(tmp_path / "a") == "one\ntwo\n"


@pytest.mark.parametrize("packed", [False, True])
def test_what_an_error_says_to_do_makes_it_readable(tmp_path: Path, packed: bool):
    name = "rows.csv.gz" if packed else "rows.csv"
    data = TEXT.encode("latin-1")
    (tmp_path / name).write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(DataFormatError) as refusal:
        read_text(tmp_path / name)
    told = str(refusal.value)
    assert told.startswith(f"line 3 of {name} is not text in UTF-8: byte 0xe9, which in windows-1252")
    assert "'un café serré,neg'" in told
    if not shutil.which("iconv"):
        pytest.skip("iconv is not installed")
    subprocess.run(told.partition("for example: ")[2], shell=True, cwd=tmp_path, check=True)
    assert read_text(tmp_path / "rows-utf8.csv") == TEXT


def test_what_is_no_text_is_called_so(tmp_path: Path):
    (tmp_path / "rows.csv").write_bytes(b"PK\x03\x04\x00\x00\xff\xff")
    with pytest.raises(DataFormatError, match=r"line 1 of rows\.csv is not text in UTF-8: byte 0xff; is it a text"):
        read_text(tmp_path / "rows.csv")

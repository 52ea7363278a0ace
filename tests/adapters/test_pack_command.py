"""`randbasis pack`, `unpack`, `verify`: output, JSON and exit codes."""

import json
from pathlib import Path

import pytest
from tuner_cases import Case
from typer.testing import CliRunner

from randbasis.cli import app
from randbasis.files.locations import Remote

RUNNER = CliRunner()


def run(*words: object) -> tuple[int, str, str]:
    done = RUNNER.invoke(app, [str(word) for word in words])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "source"
    Case("linear", "nola").adapted().save_pretrained(path)
    return path


@pytest.mark.parametrize("bits", [32, 16, 8, 4, 3, 2])
def test_there_and_back(adapter: Path, tmp_path: Path, bits: int):
    file = tmp_path / "file"
    code, out, _ = run("pack", adapter, file, "--bits", bits, "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["bits"], found["bytes"], found["canonical"]) == (bits, file.stat().st_size, True)
    assert json.loads(run("verify", file, "--json")[1]) == found
    assert run("unpack", file, tmp_path / "again")[0] == 0
    assert run("pack", tmp_path / "again", tmp_path / "second", "--bits", bits)[0] == 0
    assert (tmp_path / "second").read_bytes() == file.read_bytes()


def test_exit_codes(adapter: Path, tmp_path: Path):
    file = tmp_path / "file"
    assert run("pack", adapter, file, "--group", 3, "--bits", 3)[0] == 0
    assert run("pack", adapter, file)[0] == 2
    assert run("pack", adapter, file, "--overwrite")[0] == 0
    assert run("pack", adapter, tmp_path / "no" / "where")[0] == 1
    assert run("pack", adapter, file, "--bits", 5)[0] == 2
    assert run("unpack", file, adapter)[0] == 2
    assert run("unpack", file, tmp_path / "again")[0] == 0
    assert run("unpack", file, tmp_path / "again", "--overwrite")[0] == 0
    assert run("verify", tmp_path)[0] == 2


def test_a_damaged_file_is_one_message(adapter: Path, tmp_path: Path):
    file = tmp_path / "file"
    run("pack", adapter, file)
    file.write_bytes(file.read_bytes()[:-3])
    code, out, err = run("verify", file, "--json")
    assert code == 2
    assert json.loads(out)["error"] == "TruncatedFileError"
    assert str(file) in err
    assert "Traceback" not in err
    assert run("unpack", file, tmp_path / "again")[0] == 2
    assert not (tmp_path / "again").exists()


def test_urls(adapter: Path, tmp_path: Path, s3_folder: str):
    url = f"{s3_folder}/runs/one.safetensors"
    code, out, _ = run("pack", adapter, url, "--json")
    assert (code, json.loads(out)["file"]) == (0, url)
    assert run("pack", adapter, url)[0] == 2
    assert json.loads(run("verify", url, "--json")[1]) == json.loads(out)
    assert run("unpack", url, tmp_path / "again")[0] == 0
    assert run("pack", tmp_path / "again", tmp_path / "file")[0] == 0
    with Remote(url).reading() as (stream, _):
        assert stream.read() == (tmp_path / "file").read_bytes()
    code, out, err = run("verify", f"{s3_folder}/none", "--json")
    assert (code, json.loads(out)["error"]) == (2, "PackedFileMissingError")
    assert f"{s3_folder}/none" in err

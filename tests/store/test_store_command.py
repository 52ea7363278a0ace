"""`randbasis store`: what it prints is what the store holds; exit codes 0, 1 and 2."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from small_adapters import digest, packed
from typer.testing import CliRunner

from randbasis.cli import app
from randbasis.store import AdapterStore

COMMANDS = ["add", "get", "list", "history", "rollback", "tag", "remove", "gc", "verify", "export", "import"]


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["store", *map(str, words)], catch_exceptions=False)


def answer_of(*words: object) -> dict[str, Any]:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    found = [tmp_path / f"user-{number}.safetensors" for number in range(3)]
    for number, file in enumerate(found):
        file.write_bytes(packed(number))
    return found


@pytest.fixture
def path(tmp_path: Path, files: list[Path]) -> Path:
    assert run("add", tmp_path / "adapters.db", *files, "--tag", "a", "--tag", "b").exit_code == 0
    return tmp_path / "adapters.db"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: randbasis store {command}" in re.sub(r"\s+", " ", result.stdout)
    assert "--json" in result.stdout


def test_add_get_and_history(path: Path, files: list[Path], tmp_path: Path):
    added = answer_of("add", path, files[2], "--name", "user-0")["adapters"]
    assert [(one["name"], one["version"], one["digest"]) for one in added] == [("user-0", 2, digest(packed(2)))]
    out = tmp_path / "out.safetensors"
    assert answer_of("get", path, "user-0", "--version", 1, "--output", out)["tags"] == ["a", "b"]
    assert out.read_bytes() == packed(0)
    assert run("get", path, "user-0", "--output", out).exit_code == 2
    assert answer_of("get", path, "user-0", "--output", out, "--overwrite")["version"] == 2
    assert out.read_bytes() == packed(2)
    assert answer_of("get", path, "--digest", digest(packed(1)))["name"] == "user-1"
    assert [one["version"] for one in answer_of("history", path, "user-0")["adapters"]] == [2, 1]
    assert [one["version"] for one in answer_of("history", path, "user-0", "--before", 2)["adapters"]] == [1]


def test_list_pages_and_filters(path: Path):
    page = answer_of("list", path, "--limit", 2)
    assert ([one["name"] for one in page["adapters"]], page["next"]) == (["user-0", "user-1"], "user-1")
    rest = answer_of("list", path, "--after", page["next"])
    assert ([one["name"] for one in rest["adapters"]], rest["next"]) == (["user-2"], None)
    base = page["adapters"][0]["base"]
    assert len(answer_of("list", path, "--tag", "a", "--base", base, "--method", "nola")["adapters"]) == 3
    assert answer_of("list", path, "--tag", "c")["adapters"] == []
    assert answer_of("list", path, "--method", "vera")["adapters"] == []


def test_tables_keep_what_stands_in_brackets(path: Path, files: list[Path]):
    run("add", path, files[0], "--name", "c_attn[q]")
    shown = run("list", path, "--limit", "1").stdout
    assert "c_attn[q]" in shown
    assert "there are more: --after c_attn[q]" in shown


def test_rollback_remove_and_gc(path: Path, files: list[Path]):
    run("add", path, files[2], "--name", "user-0")
    back = answer_of("rollback", path, "user-0")
    assert (back["version"], back["digest"]) == (3, digest(packed(0)))
    assert answer_of("rollback", path, "user-0", "--to", 2)["digest"] == digest(packed(2))
    assert answer_of("remove", path, "user-0", "--version", 4) == {"versions": 1, "blobs": 0, "bytes": 0}
    freed = answer_of("gc", path, "--keep", 1)
    assert (freed["versions"], freed["blobs"], freed["file_bytes"] > 0) == (2, 0, True)
    assert answer_of("remove", path, "user-1")["bytes"] == len(packed(1))


@pytest.mark.parametrize("words", [[], ["--one-file"]], ids=["folder", "file"])
def test_export_and_import(path: Path, tmp_path: Path, words: list[str]):
    done = answer_of("export", path, tmp_path / "out", "--tag", "a", "--newest", *words)
    assert (done["versions"], done["written"], done["output"]) == (3, 3, str(tmp_path / "out"))
    taken = answer_of("import", tmp_path / "new.db", tmp_path / "out", "--prefix", "old/")
    assert taken["written"] == 3
    names = [one["name"] for one in answer_of("list", tmp_path / "new.db")["adapters"]]
    assert names == ["old/user-0", "old/user-1", "old/user-2"]


def test_verify_exits_with_1_where_something_is_damaged(path: Path):
    checked = answer_of("verify", path)
    assert checked["sound"]
    assert (checked["versions"], checked["problems"], checked["examples"]) == (3, {}, [])
    with AdapterStore(path) as store, store._database.writing() as connection:
        connection.execute("UPDATE blobs SET content = zeroblob(length(content)) WHERE id = 2")
    result = run("verify", path, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["sound"] is False
    result = run("get", path, "user-1", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"] == "StoreDamagedError"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["get", "user-9"], "NotStoredError"),
        (["get"], "StoreOptionError"),
        (["history", "user-9"], "NotStoredError"),
        (["rollback", "user-0"], "NotStoredError"),
        (["remove", "user-0", "--version", 7], "NotStoredError"),
        (["gc", "--keep", 0], "StoreOptionError"),
        (["list", "--limit", 0], "StoreOptionError"),
        (["list", "--method", "nolla"], "UnknownMethodError"),
        (["export", "out", "--method", "nolla"], "UnknownMethodError"),
        (["add", "absent.safetensors"], "PackedFileMissingError"),
        (["add", __file__], "HeaderSizeError"),
        (["add", "a.safetensors", "b.safetensors", "--name", "x"], "OptionError"),
        (["import", "absent"], "StoreMissingError"),
    ],
)
def test_bad_usage_exits_with_2(path: Path, words: list[object], error: str):
    result = run(words[0], path, *words[1:], "--json")
    assert result.exit_code == 2
    said = json.loads(result.stdout)
    assert said["error"] == error
    assert said["message"] in result.stderr
    assert [one["name"] for one in answer_of("list", path)["adapters"]] == ["user-0", "user-1", "user-2"]


@pytest.mark.parametrize("command", ["get", "list", "history", "rollback", "tag", "remove", "gc", "verify", "export"])
def test_only_add_and_import_make_a_store(command: str, tmp_path: Path):
    words = {
        "gc": ["--keep", 1],
        "tag": ["user-0", "--add", "a"],
        "list": [],
        "verify": [],
        "export": [tmp_path / "out"],
    }.get(command, ["user-0"])
    result = run(command, tmp_path / "absent.db", *words, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"] == "StoreMissingError"
    assert not any(tmp_path.iterdir())


def test_tag(path: Path):
    record = answer_of("tag", path, "user-1", "--add", "c", "--add", "a", "--remove", "b")
    assert record["tags"] == ["a", "c"]
    before = answer_of("list", path)["adapters"][1]
    assert before == record
    assert [one["name"] for one in answer_of("list", path, "--tag", "c")["adapters"]] == ["user-1"]
    assert [one["name"] for one in answer_of("list", path, "--tag", "b")["adapters"]] == ["user-0", "user-2"]
    assert answer_of("verify", path)["sound"]
    for words, message in (
        ([], "needs --add or --remove"),
        (["--remove", "b"], "'b'; it has a, c"),
        (["--add", "d", "--remove", "d"], "'d'"),
        (["--add", "a/../b"], "must be"),
        (["--add", "d", "--version", "2"], "no such version"),
    ):
        result = run("tag", path, "user-1", *words)
        assert (result.exit_code, message in result.stderr.replace("\n", " ")) == (2, True), result.stderr
    assert answer_of("list", path)["adapters"][1] == record


def test_tag_of_an_older_version(path: Path, files: list[Path]):
    run("add", path, files[2], "--name", "user-1", "--tag", "new")
    assert answer_of("tag", path, "user-1", "--add", "old", "--version", "1")["tags"] == ["a", "b", "old"]
    tags = [one["tags"] for one in answer_of("history", path, "user-1")["adapters"]]
    assert tags == [["new"], ["a", "b", "old"]]

"""Stores and URLs: adapters from there and to there, exports that go on, imports that trust nothing."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_adapters import digest, packed
from typer.testing import CliRunner

from randbasis import errors
from randbasis.adapter_file import read
from randbasis.cli import app
from randbasis.files.locations import Remote
from randbasis.store import AdapterStore, NewAdapter, transfer
from randbasis.store.manifest import MANIFEST, content_name


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    with AdapterStore(tmp_path / "adapters.db") as opened:
        opened.add_many([NewAdapter(f"team/{n:02}", packed(n % 9), (f"t{n % 2}",)) for n in range(12)])
        opened.add("team/03", packed(50))
        yield opened


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BATCH", 4)


def everything(store: AdapterStore) -> list[tuple[object, bytes]]:
    names = [one.name for one in store.list(limit=1000).records]
    records = [record for name in names for record in store.history(name)]
    return [(record, store.get(record.name, version=record.version).data) for record in records]


class CutOffError(Exception):
    pass


def test_an_adapter_comes_from_a_url(store: AdapterStore, remote_folder: str):
    Remote(f"{remote_folder}/a").write(packed(70))
    assert store.add("far", f"{remote_folder}/a").digest == digest(packed(70))
    with pytest.raises(errors.PackedFileMissingError, match=f"{remote_folder}/none"):
        store.add("far", f"{remote_folder}/none")
    Remote(f"{remote_folder}/a").write(packed(70)[:-1])
    with pytest.raises(errors.TruncatedFileError, match=f"{remote_folder}/a: "):
        store.add("far", f"{remote_folder}/a")
    assert len(store.history("far")) == 1


@pytest.mark.parametrize("one_file", [False, True])
def test_an_export_comes_back_as_it_was(store: AdapterStore, remote_folder: str, tmp_path: Path, one_file: bool):
    url = f"{remote_folder}/backup"
    assert store.export(url, one_file=one_file).versions == 13
    assert Remote(url).kind() == ("file" if one_file else "directory")
    with AdapterStore(tmp_path / "again.db") as again:
        assert again.import_from(url).written == 13
        assert everything(again) == everything(store)
        assert again.verify().sound
        assert again.import_from(url).written == 0


def test_an_exported_folder_is_that_of_this_machine(store: AdapterStore, memory_folder: str, tmp_path: Path):
    store.export(tmp_path / "here")
    store.export(memory_folder)
    assert Remote(memory_folder).names() == {"adapters", MANIFEST}
    there = dict.fromkeys(f.relative_to(tmp_path / "here").as_posix() for f in (tmp_path / "here").rglob("*.*"))
    with Remote(f"{memory_folder}/{MANIFEST}").reading() as (stream, _):
        assert stream.read() == (tmp_path / "here" / MANIFEST).read_bytes()
    assert None not in Remote(memory_folder).sizes([*there])
    assert read(f"{memory_folder}/{content_name(digest(packed(3)))}").to_bytes() == packed(3)


def test_an_export_that_was_cut_off_goes_on(store: AdapterStore, remote_folder: str, tmp_path: Path):
    def progress(done: int, _: int) -> None:
        if done == 6:
            raise CutOffError

    with pytest.raises(CutOffError):
        store.export(remote_folder, progress=progress)
    with (
        AdapterStore(tmp_path / "again.db") as again,
        pytest.raises(errors.ManifestError, match=f"{remote_folder} must"),
    ):
        again.import_from(remote_folder)
    assert store.export(remote_folder).written == 10 - 8  # of ten contents two batches of four were there
    assert Remote(remote_folder).names() == {"adapters", MANIFEST}


def test_an_export_does_not_go_over_something_else(store: AdapterStore, remote_folder: str):
    Remote(f"{remote_folder}/other").write(b"1")
    with pytest.raises(errors.OutputExistsError, match="no earlier export"):
        store.export(remote_folder)
    for one_file in (False, True):
        with pytest.raises(errors.OutputExistsError):
            store.export(f"{remote_folder}/other", one_file=one_file)
    assert Remote(remote_folder).names() == {"other"}


@pytest.mark.parametrize("change", [b"", b"longer by far than it was" * 100, packed(60)])
def test_a_content_that_was_changed_is_refused(store: AdapterStore, memory_folder: str, tmp_path: Path, change: bytes):
    store.export(memory_folder)
    Remote(f"{memory_folder}/{content_name(digest(packed(1)))}").write(change)
    with AdapterStore(tmp_path / "again.db") as again, pytest.raises(errors.RandbasisError):
        again.import_from(memory_folder)


def test_a_content_that_goes_on_after_its_end_is_refused(store: AdapterStore, memory_folder: str, tmp_path: Path):
    """Its first bytes are those that the manifest tells of, so that only its length gives it away."""
    store.export(f"{memory_folder}/backup")
    file = Remote(f"{memory_folder}/backup/{content_name(digest(packed(50)))}")
    file.write(packed(50) + b"\0")
    with AdapterStore(tmp_path / "again.db") as again, pytest.raises(errors.ManifestError, match="bytes by the"):
        again.import_from(f"{memory_folder}/backup")


def test_a_manifest_or_a_content_that_is_missing(store: AdapterStore, remote_folder: str, tmp_path: Path):
    with AdapterStore(tmp_path / "again.db") as again:
        with pytest.raises(errors.StoreMissingError, match=remote_folder):
            again.import_from(remote_folder)
        store.export(remote_folder)
        Remote(remote_folder).remove(content_name(digest(packed(2))))
        with pytest.raises(errors.ManifestError, match=f"{remote_folder}/adapters/.* must be a file of"):
            again.import_from(remote_folder)
        Remote(remote_folder).write_files({MANIFEST: b"{}\n"})
        with pytest.raises(errors.ManifestError, match=f"{remote_folder}/{MANIFEST}: line 1"):
            again.import_from(remote_folder)
        Remote(f"{remote_folder}/file").write(b"no store at all" * 100)
        with pytest.raises(errors.StoreFormatError, match=f"{remote_folder}/file"):
            again.import_from(f"{remote_folder}/file")


def test_a_store_itself_is_a_file_of_this_machine(tmp_path: Path):
    with pytest.raises(errors.LocationError, match=r"a store must be a file of this machine, got 's3://a/b.db'"):
        AdapterStore("s3://a/b.db")
    with AdapterStore((tmp_path / "a.db").as_uri()) as opened:
        assert opened.path == tmp_path / "a.db"


def test_the_command(store: AdapterStore, s3_folder: str, tmp_path: Path):
    def answer(*words: object) -> dict[str, object]:
        run = CliRunner().invoke(app, ["store", *map(str, words), "--json"], catch_exceptions=False)
        assert run.exit_code == 0, run.stderr
        return json.loads(run.stdout)

    out = f"{s3_folder}/user-7.safetensors"
    assert answer("get", store.path, "team/07", "--output", out)["output"] == out
    assert CliRunner().invoke(app, ["store", "get", str(store.path), "team/08", "--output", out]).exit_code == 2
    answer("get", store.path, "team/08", "--output", out, "--overwrite")
    [added] = answer("add", tmp_path / "new.db", out)["adapters"]
    assert (added["name"], added["digest"]) == ("user-7", digest(packed(8)))
    assert answer("export", store.path, f"{s3_folder}/backup")["output"] == f"{s3_folder}/backup"
    assert answer("import", tmp_path / "new.db", f"{s3_folder}/backup")["written"] == 13
    refused = CliRunner().invoke(app, ["store", "list", "s3://bucket/a.db", "--json"])
    assert (refused.exit_code, json.loads(refused.stdout)["error"]) == (2, "LocationError")

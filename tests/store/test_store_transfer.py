"""Export and import: what comes back is what was there; cut off anywhere, they go on; what is changed is refused."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from small_adapters import digest, packed

from randbasis import errors
from randbasis.adapter_file import read
from randbasis.store import AdapterStore, NewAdapter, transfer
from randbasis.store.manifest import MANIFEST, content_name
from randbasis.store.records import Record


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    with AdapterStore(tmp_path / "adapters.db") as opened:
        opened.add_many(
            [NewAdapter(f"team/{number:02}", packed(number % 9), (f"t{number % 2}",)) for number in range(12)]
        )
        opened.add("team/03", packed(50))
        opened.add("team/03", packed(51), ["t0"])
        opened.remove("team/03", 2)
        yield opened


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BATCH", 4)


def everything(store: AdapterStore) -> list[tuple[object, bytes]]:
    names = [one.name for one in store.list(limit=1000).records]
    records = [record for name in names for record in store.history(name)]
    return [(record, store.get(record.name, version=record.version).data) for record in records]


class CutOffError(Exception):
    pass


def cut_after(versions: int) -> Callable[[int, int], None]:
    def progress(done: int, _: int) -> None:
        if done >= versions:
            raise CutOffError

    return progress


@pytest.mark.parametrize("one_file", [False, True])
def test_an_export_comes_back_as_it_was(store: AdapterStore, tmp_path: Path, one_file: bool, small_batches: None):
    seen: list[tuple[int, int]] = []
    done = store.export(tmp_path / "out", one_file=one_file, progress=lambda *now: seen.append(now))
    assert done.versions == seen[-1][0] == seen[-1][1] == 13
    with AdapterStore(tmp_path / "again.db") as again:
        assert again.import_from(tmp_path / "out").written == 13
        assert everything(again) == everything(store)
        assert again.verify().sound
        assert again.import_from(tmp_path / "out").written == 0
        assert again.add("team/03", packed(60)).version == 4


def test_a_folder_holds_packed_files_named_by_their_hash(store: AdapterStore, tmp_path: Path):
    assert store.export(tmp_path / "out").written == 10
    file = tmp_path / "out" / content_name(digest(packed(1)))
    assert file.read_bytes() == packed(1)
    assert read(file).spec.method.name == "nola"
    assert not [*(tmp_path / "out").rglob("*.part")]
    lines = [json.loads(line) for line in (tmp_path / "out" / MANIFEST).read_text().splitlines()]
    assert lines[0] == {"format": "randbasis-store", "version": 1}
    assert lines[1]["name"] == "team/00"
    assert lines[-1] == {"adapters": 13}


def test_the_manifest_counts_what_was_written(store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A version that is removed while the export runs is in none of it, and the export can be read."""
    whole, gone = transfer.StoreOrigin.contents, digest(packed(51))

    def without_one(self: transfer.StoreOrigin, records: Sequence[Record]) -> Iterator[bytes | None]:
        for record, data in zip(records, whole(self, records), strict=True):
            yield None if record.digest == gone else data

    with monkeypatch.context() as patch:
        patch.setattr(transfer.StoreOrigin, "contents", without_one)
        done = store.export(tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / MANIFEST).read_text().splitlines()]
    told = [line["digest"] for line in lines if "digest" in line]
    assert (done.versions, lines[-1]) == (len(told), {"adapters": len(told)})
    assert len(told) == 12
    assert gone not in told
    with AdapterStore(tmp_path / "again.db") as again:
        assert again.import_from(tmp_path / "out").written == len(told)


@pytest.mark.parametrize("one_file", [False, True])
def test_an_export_chooses(store: AdapterStore, tmp_path: Path, one_file: bool):
    assert store.export(tmp_path / "newest", one_file=one_file, newest=True).versions == 12
    store.export(tmp_path / "tagged", one_file=one_file, tag="t1")
    with AdapterStore(tmp_path / "again.db") as again:
        again.import_from(tmp_path / "tagged")
        assert [one.name for one in again.list().records] == [f"team/{number:02}" for number in range(1, 12, 2)]


@pytest.mark.parametrize("one_file", [False, True])
def test_a_cut_off_export_goes_on(store: AdapterStore, tmp_path: Path, one_file: bool, small_batches: None):
    with pytest.raises(CutOffError):
        store.export(tmp_path / "out", one_file=one_file, progress=cut_after(5))
    if not one_file:
        with AdapterStore(tmp_path / "early.db") as early, pytest.raises(errors.ManifestError, match="to its end"):
            early.import_from(tmp_path / "out")
        half = tmp_path / "out" / content_name(digest(packed(0)))
        half.write_bytes(half.read_bytes()[:10])  # as a power cut may leave it
    done = store.export(tmp_path / "out", one_file=one_file)
    assert 0 < done.written < done.versions == 13
    with AdapterStore(tmp_path / "again.db") as again:
        again.import_from(tmp_path / "out")
        assert everything(again) == everything(store)


@pytest.mark.parametrize("one_file", [False, True])
def test_a_cut_off_import_goes_on(store: AdapterStore, tmp_path: Path, one_file: bool, small_batches: None):
    store.export(tmp_path / "out", one_file=one_file)
    with AdapterStore(tmp_path / "again.db") as again:
        with pytest.raises(CutOffError):
            again.import_from(tmp_path / "out", progress=cut_after(8))
        assert again.verify().versions == 8
        assert again.import_from(tmp_path / "out").written == 5
        assert everything(again) == everything(store)


def test_a_prefix_keeps_what_is_there(store: AdapterStore, tmp_path: Path):
    store.export(tmp_path / "out")
    before = everything(store)
    assert store.import_from(tmp_path / "out", prefix="old/").written == 13
    assert [one.name for one in store.list(after="old/", limit=1).records] == ["old/team/00"]
    assert store.get("old/team/03", version=1).data == packed(3)
    assert [one for one in everything(store) if not one[0].name.startswith("old/")] == before


@pytest.mark.parametrize("one_file", [False, True])
def test_a_conflict_changes_nothing(store: AdapterStore, tmp_path: Path, one_file: bool, small_batches: None):
    store.export(tmp_path / "out", one_file=one_file)
    with AdapterStore(tmp_path / "again.db") as again:
        again.add("team/11", packed(70))
        with pytest.raises(errors.ImportConflictError, match=r"version 1 of 'team/11'.*another digest"):
            again.import_from(tmp_path / "out")
        with pytest.raises(errors.StoreNameError):
            again.import_from(tmp_path / "out", prefix="../")
        assert again.verify().versions == 1


def test_an_export_replaces_nothing_foreign(store: AdapterStore, tmp_path: Path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for path, one_file, error in [
        (folder, False, errors.OutputExistsError),
        (folder / "notes.txt", False, errors.OutputExistsError),
        (folder / "notes.txt", True, errors.StoreFormatError),
    ]:
        with pytest.raises(error):
            store.export(path, one_file=one_file)
    assert (folder / "notes.txt").read_text() == "mine"
    assert len([*folder.iterdir()]) == 1
    with pytest.raises(errors.StoreMissingError):
        store.import_from(tmp_path / "absent")
    with pytest.raises(errors.ManifestError):
        store.import_from(folder)


def edit(old: str, new: str, count: int = 1) -> Callable[[str], str]:
    return lambda text: text.replace(old, new, count)


def swapped(text: str) -> str:
    lines = text.splitlines(keepends=True)
    return "".join([lines[0], lines[2], lines[1], *lines[3:]])


def twice(text: str) -> str:
    lines = text.splitlines(keepends=True)
    return "".join([lines[0], lines[1], *lines[1:]])


BROKEN: dict[str, Callable[[str], str]] = {
    "cut off": lambda text: text[:-20],
    "without its last line": lambda text: text[: text.rindex('{"adapters"')],
    "with a line after the last": lambda text: text + "{}\n",
    "of another format": edit("randbasis-store", "other"),
    "of another version": edit('"version":1', '"version":2'),
    "empty": lambda text: "",
    "no JSON": lambda text: text + "x",
    "a list": edit("{", "[{"),
    "with a wrong count": edit('{"adapters":13}', '{"adapters":12}'),
    "with a line twice": twice,
    "out of order": swapped,
    "with a name that climbs": edit("team/00", "../00"),
    "with an absolute name": edit("team/00", "/team"),
    "with a bad digest": edit('"digest":"', '"digest":"x'),
    "with another digest": lambda text: text.replace(digest(packed(0)), "0" * 64, 1),
    "with another method": edit('"method":"nola"', '"method":"vera"'),
    "with another base": edit('"base":"', '"base":"0'),
    "with a wrong size": edit('"bytes":', '"bytes":1'),
    "with a bad time": edit('"created":"2', '"created":"x'),
    "with a time without zone": edit("+00:00", ""),
    "with a key less": edit('"tags":["t0"]', '"tag":["t0"]'),
    "with a key more": edit('"tags"', '"more":1,"tags"'),
    "with a text for tags": edit('"tags":["t0"]', '"tags":"t0"'),
    "with a true for a number": edit('"version":1,"digest"', '"version":true,"digest"'),
    "with a surrogate": edit("team/00", "\\ud800"),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_a_manifest_is_refused(store: AdapterStore, tmp_path: Path, how: str):
    store.export(tmp_path / "out")
    manifest = tmp_path / "out" / MANIFEST
    text = manifest.read_text(encoding="utf-8")
    changed = BROKEN[how](text)
    assert changed != text
    manifest.write_text(changed, encoding="utf-8")
    with AdapterStore(tmp_path / "again.db") as again:
        with pytest.raises(errors.ManifestError):
            again.import_from(tmp_path / "out")
        assert again.verify().versions == 0


def test_a_changed_content_is_refused(store: AdapterStore, tmp_path: Path):
    store.export(tmp_path / "out")
    file = tmp_path / "out" / content_name(digest(packed(2)))
    with AdapterStore(tmp_path / "again.db") as again:
        for data in (packed(60), packed(2)[:-1], packed(2)[:-1] + b"\x00"):
            file.write_bytes(data)
            with pytest.raises((errors.ManifestError, errors.PackedFileError)):
                again.import_from(tmp_path / "out")
        file.unlink()
        with pytest.raises(errors.ManifestError, match="export again"):
            again.import_from(tmp_path / "out")
        assert again.verify().versions == 0

"""Every refusal has a class of its own, names the rule, the value and the way out, and leaves the store as it was."""

import os
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from small_adapters import digest, packed

from randbasis import errors
from randbasis.store import AdapterStore, NewAdapter, database


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    with AdapterStore(tmp_path / "adapters.db", timeout=0.05) as opened:
        opened.add("one", packed(1), ["t"])
        yield opened


def change(path: Path, statement: str, *values: object) -> None:
    connection = sqlite3.connect(path)
    connection.execute(statement, values)
    connection.commit()
    connection.close()


BAD_NAMES = ["", "/etc/passwd", "..", "a/../b", "..\\a", "C:\\a", "~root", "file:a", "a\nb", "a\x00b", "a\x7f",
             "\ud800", " a", "a ", "a//b", "a/", "./a", "a" * 256, "ü" * 128, "e\u0301", "a\u2028b",
             "a\u202eb"]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_bad_name_is_refused_as_name_and_as_tag(store: AdapterStore, name: str):
    for refused in (lambda: store.add(name, packed(2)), lambda: store.add("two", packed(2), [name])):
        with pytest.raises(errors.StoreNameError, match="must be"):
            refused()
    assert [one.name for one in store.list().records] == ["one"]


@pytest.mark.parametrize("name", ["one@2", "one@007", "team/one@1@2"])
def test_a_name_that_is_read_as_another_ones_version_is_refused(store: AdapterStore, name: str):
    """`store:one@2` is version 2 of `one`; an adapter of that name could not be told from it."""
    with pytest.raises(errors.StoreNameError, match=r"which store:NAME@VERSION takes for a version"):
        store.add(name, packed(2))
    store.add("mail@example", packed(2), ["one@2"])  # a tag is nothing's version


def test_tags_are_few_words(store: AdapterStore):
    with pytest.raises(errors.StoreNameError, match="at most 64, got 65"):
        store.add("two", packed(2), [str(number) for number in range(65)])
    with pytest.raises(errors.StoreNameError, match=r"write \['word'\]"):
        store.add("two", packed(2), "word")


@pytest.mark.parametrize("bad", [b"", b"x" * 100, packed(2)[:-1], packed(2)[:-1] + b"\x00"], ids=len)
def test_a_bad_content_refuses_the_whole_batch(store: AdapterStore, bad: bytes):
    with pytest.raises(errors.PackedFileError, match="adapter 'three'"):
        store.add_many([NewAdapter("two", packed(2)), NewAdapter("three", bad)])
    assert [one.name for one in store.list().records] == ["one"]
    assert store.verify().blobs == 1


def test_a_missing_file_is_refused(store: AdapterStore, tmp_path: Path):
    with pytest.raises(errors.PackedFileMissingError, match="not there"):
        store.add("two", tmp_path / "absent.safetensors")
    with pytest.raises(errors.PackedFileMissingError, match="randbasis pack"):
        store.add("two", tmp_path)


def test_what_is_not_stored_is_said(store: AdapterStore):
    calls = [
        lambda: store.get("two"), lambda: store.get("one", version=2), lambda: store.get(digest="0" * 64),
        lambda: store.record("two"), lambda: store.history("two"), lambda: store.history("one", before=1),
        lambda: store.remove("two"), lambda: store.remove("one", 2), lambda: store.rollback("two"),
        lambda: store.rollback("one"), lambda: store.rollback("one", 2),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(errors.NotStoredError):
            call()
    assert len(store.history("one")) == 1


def test_options_out_of_range(store: AdapterStore):
    calls = [
        lambda: store.get(), lambda: store.get("one", digest=digest(packed(1))), lambda: store.get("one", version=0),
        lambda: store.get(version=1, digest="0" * 64), lambda: store.get(digest="zz"), lambda: store.list(limit=0),
        lambda: store.list(limit=10**6), lambda: store.list(base="llama"), lambda: store.gc(0), lambda: store.gc(True),
        lambda: store.rollback("one", 1), lambda: store.rollback("one", 0), lambda: store.history("one", limit=-1),
        lambda: store.record("one", 2**63), lambda: AdapterStore(store.path, timeout=-1),
        lambda: AdapterStore(store.path, timeout=float("nan")),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(errors.StoreOptionError, match=r"got|is the newest"):
            call()


def test_a_missing_store_is_not_made_by_reading(tmp_path: Path):
    with pytest.raises(errors.StoreMissingError, match="randbasis store add"):
        AdapterStore(tmp_path / "absent.db", create=False)
    with pytest.raises(errors.StoreMissingError, match="make it first"):
        AdapterStore(tmp_path / "absent" / "adapters.db")
    assert not any(tmp_path.iterdir())


def test_another_file_is_refused_and_left_alone(tmp_path: Path):
    text = tmp_path / "notes.txt"
    text.write_bytes(b"no database at all, but long enough to be taken for one" * 20)
    other = tmp_path / "other.db"
    change(other, "CREATE TABLE t (x)")
    before = text.read_bytes(), other.read_bytes()
    for path in (text, other, tmp_path):
        with pytest.raises(errors.StoreFormatError, match="must be"):
            AdapterStore(path)
    assert (text.read_bytes(), other.read_bytes()) == before


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not list open files")
def test_a_refused_store_is_not_left_open(tmp_path: Path):
    other = tmp_path / "other.db"
    change(other, "CREATE TABLE t (x)")
    with pytest.raises(errors.StoreFormatError):
        AdapterStore(other)
    handles = [*Path("/proc/self/fd").iterdir()]
    assert str(other) not in {os.readlink(handle) for handle in handles if handle.is_symlink()}


def test_an_empty_file_is_a_new_store_only_where_one_may_be_made(tmp_path: Path):
    path = tmp_path / "adapters.db"
    path.touch()
    with pytest.raises(errors.StoreMissingError, match="it is empty"):
        AdapterStore(path, create=False)
    with AdapterStore(path) as store:
        assert store.list().records == ()


def test_a_newer_schema_is_refused(store: AdapterStore):
    change(store.path, f"PRAGMA user_version = {database.SCHEMA_VERSION + 1}")
    with pytest.raises(errors.StoreVersionError, match=r"must have schema 1 .* it has 2"):
        AdapterStore(store.path)


def test_a_store_kept_locked_is_said_and_reading_goes_on(store: AdapterStore):
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for call in (lambda: store.add("two", packed(2)), lambda: store.remove("one"), lambda: store.rollback("one")):
        with pytest.raises(errors.StoreLockedError, match=r"within timeout=0.05 s"):
            call()
    assert store.get("one").data == packed(1)
    other.execute("ROLLBACK")
    other.close()
    assert store.add("two", packed(2)).version == 1


def test_a_closed_store_is_said(store: AdapterStore):
    store.close()
    store.close()
    with pytest.raises(errors.StoreClosedError, match="open it again"):
        store.get("one")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="rights are not checked for this user")
def test_a_store_without_rights_is_said(store: AdapterStore):
    store.close()
    store.path.chmod(0o400)
    with AdapterStore(store.path) as opened, pytest.raises(errors.StoreAccessError, match="change the rights"):
        opened.add("two", packed(2))


def test_a_full_disk_leaves_the_store_as_it_was(store: AdapterStore):
    with store._database.reading() as connection:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(errors.SaveError, match="make room"):
        store.add_many([NewAdapter(f"n{number}", packed(number, layers=400)) for number in range(20)])
    assert [one.name for one in store.list().records] == ["one"]
    assert store.verify().sound


# --- damage ---


def test_a_changed_content_is_found_by_get_and_verify_and_mended_by_add(store: AdapterStore):
    changed = bytearray(packed(1))
    changed[-1] ^= 1
    change(store.path, "UPDATE blobs SET content = ?", bytes(changed))
    with pytest.raises(errors.StoreDamagedError, match="roll back"):
        store.get("one")
    checked = store.verify()
    assert checked.problems == {"content that is not what its hash was taken of": 1}
    store.add("one", packed(1))
    assert store.get("one", version=1).data == packed(1)
    assert store.verify().sound


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("DELETE FROM blobs", "version without the content that it names"),
        ("UPDATE adapters SET bytes = bytes + 1", "version without the content that it names"),
        ("UPDATE adapters SET digest = zeroblob(32)", "version without the content that it names"),
        ("DELETE FROM tagged", "version that its tags do not find"),
        ("INSERT INTO tagged VALUES ('t', 'one', 7)", "tag of a version that is not there"),
        ("INSERT INTO blobs VALUES (9, zeroblob(32), x'00')", "content that no version has"),
    ],
)
def test_verify_finds(store: AdapterStore, statement: str, kind: str):
    change(store.path, statement)
    checked = store.verify()
    assert not checked.sound
    assert kind in checked.problems
    assert checked.examples


@pytest.mark.parametrize("table", ["blobs", "adapters", "tagged", "retired"])
def test_a_store_without_a_table_is_damaged(store: AdapterStore, table: str):
    change(store.path, f"DROP TABLE {table}")
    with pytest.raises(errors.StoreDamagedError):
        store.remove("one")


def test_a_file_cut_in_the_middle_is_damaged_and_not_torn(store: AdapterStore):
    store.add_many([NewAdapter(f"n{number}", packed(number, layers=50)) for number in range(200)])
    store.close()
    data = store.path.read_bytes()
    store.path.write_bytes(data[: len(data) // 2 // database.PAGE_BYTES * database.PAGE_BYTES])
    with pytest.raises(errors.StoreDamagedError, match="take a copy"), AdapterStore(store.path) as opened:
        opened.verify()


def test_threads_share_one_object(store: AdapterStore):
    def work(thread: int) -> None:
        with AdapterStore(store.path, timeout=120) as own:
            for number in range(5):
                own.add(f"{thread}", packed(number))
                assert store.get(f"{thread}").data == packed(number)

    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(work, range(4))] == [None] * 4
    assert [len(store.history(f"{thread}")) for thread in range(4)] == [5] * 4

"""The store against what was put in: names, versions, digests, pages, rollback, removal, and what stays in the file."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_adapters import adapter, digest, packed

from randbasis.errors import NotStoredError
from randbasis.store import AdapterStore, Freed, NewAdapter
from randbasis.store.database import PAGE_BYTES
from randbasis.store.records import Selection
from randbasis.store.tables import page_statement


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    with AdapterStore(tmp_path / "adapters.db") as opened:
        yield opened


def blobs(store: AdapterStore) -> int:
    with sqlite3.connect(store.path) as connection:
        found = connection.execute("SELECT count(*) FROM blobs").fetchone()[0]
    connection.close()
    return found


def test_get_gives_back_the_bytes_by_name_version_and_digest(store: AdapterStore):
    first, second = packed(1), packed(2)
    one = store.add("team/user-1", first, ["b", "a", "b"])
    two = store.add("team/user-1", second)
    assert (one.version, two.version) == (1, 2)
    assert (one.digest, one.bytes, one.tags, one.method) == (digest(first), len(first), ("a", "b"), "nola")
    assert one.base == adapter(1).spec.fingerprint
    assert store.get("team/user-1").data == second
    assert store.get("team/user-1", version=1).data == first
    assert store.get("team/user-1", version=1).record == one == store.record("team/user-1", 1)
    assert store.get(digest=digest(first)).record == one
    assert store.get("team/user-1").packed().to_bytes() == second


def test_every_kind_of_source_is_the_same_content(store: AdapterStore, tmp_path: Path):
    file = tmp_path / "one.safetensors"
    file.write_bytes(packed(1))
    sources = [packed(1), file, str(file), adapter(1)]
    assert len({store.add(f"as {type(source).__name__}", source).digest for source in sources}) == 1
    assert blobs(store) == 1


def test_a_store_outlives_the_object(tmp_path: Path):
    path = tmp_path / "adapters.db"
    with AdapterStore(path) as store:
        record = store.add("one", packed(1))
    assert not path.with_name("adapters.db-wal").exists()
    with AdapterStore(path, create=False) as store:
        assert store.get("one").record == record


def test_a_batch_numbers_its_versions(store: AdapterStore):
    records = store.add_many(
        [NewAdapter("a", packed(1)), NewAdapter("b", packed(1)), NewAdapter("a", packed(2), ("t",))]
    )
    assert [(one.name, one.version, one.tags) for one in records] == [("a", 1, ()), ("b", 1, ()), ("a", 2, ("t",))]
    assert len({one.created for one in records}) == 1
    assert store.add_many([]) == ()


def test_pages_list_the_newest_version_of_each_name_in_order(store: AdapterStore):
    names = [f"user-{number:02}" for number in range(25)]
    store.add_many([NewAdapter(name, packed(number)) for number, name in enumerate(reversed(names))])
    store.add("user-07", packed(100))
    found, after = [], ""
    while True:
        page = store.list(after=after, limit=10)
        assert len(page.records) <= 10
        found += page.records
        if page.next is None:
            break
        after = page.next
    assert [one.name for one in found] == names
    assert found[7].version == 2
    assert store.list(limit=25).next is None
    assert store.list(after="user-24").records == ()


def test_filters_find_what_a_full_scan_finds(store: AdapterStore):
    kinds = [(vera, architecture) for vera in (False, True) for architecture in ("llama", "gpt2")]
    for number in range(16):
        vera, architecture = kinds[number % 4]
        tags = [f"t{number % 3}"]
        store.add(f"n{number:02}", packed(number, vera=vera, architecture=architecture), tags)
    store.add("n00", packed(99, vera=True), ["t2"])  # the newest version decides
    everything = store.list().records
    base = everything[1].base
    for tag, of_base, method in [(t, b, m) for t in (None, "t0") for b in (None, base) for m in (None, "vera")]:
        expected = [
            one
            for one in everything
            if (tag is None or tag in one.tags) and of_base in (None, one.base) and method in (None, one.method)
        ]
        assert list(store.list(tag=tag, base=of_base, method=method).records) == expected
        assert expected
    assert store.list(tag="absent").records == ()


@pytest.mark.parametrize("newest", [True, False])
@pytest.mark.parametrize("key", [None, "tag", "base", "method"])
def test_a_page_sorts_nothing_and_scans_nothing(store: AdapterStore, key: str | None, newest: bool):
    selection = Selection(**({} if key is None else {key: "00" * 32}))
    values = {"tag": "", "base": b"", "method": "", "name": "", "version": 0, "limit": 1}
    connection = sqlite3.connect(store.path)
    plan = connection.execute(f"EXPLAIN QUERY PLAN {page_statement(selection, newest=newest)}", values).fetchall()
    connection.close()
    steps = [step for *_, step in plan]
    assert not [step for step in steps if "SCAN" in step or "TEMP B-TREE" in step], steps


def test_history_is_newest_first_and_paged(store: AdapterStore):
    for number in range(5):
        store.add("one", packed(number))
    assert [one.version for one in store.history("one")] == [5, 4, 3, 2, 1]
    assert [one.version for one in store.history("one", limit=2)] == [5, 4]
    assert [one.version for one in store.history("one", before=4, limit=2)] == [3, 2]


def test_rollback_is_a_new_version_equal_to_the_old_one(store: AdapterStore):
    store.add("one", packed(1), ["good"])
    store.add("one", packed(2))
    store.add("one", packed(3))
    back = store.rollback("one", 1)
    assert (back.version, back.digest, back.tags) == (4, digest(packed(1)), ("good",))
    assert store.get("one").data == packed(1)
    assert store.list(tag="good").records == (back,)
    assert store.rollback("one").digest == digest(packed(3))
    assert blobs(store) == 3


def test_equal_content_is_stored_once_and_goes_with_its_last_version(store: AdapterStore):
    store.add("a", packed(1))
    store.add("b", packed(1))
    assert blobs(store) == 1
    assert store.remove("a") == Freed(1, 0, 0)
    assert store.get("b").data == packed(1)
    assert store.remove("b") == Freed(1, 1, len(packed(1)))
    assert blobs(store) == 0
    assert store.list().records == ()


def test_a_version_number_is_never_given_twice(store: AdapterStore):
    for number in range(3):
        store.add("one", packed(number))
    store.remove("one", 3)
    assert store.get("one").data == packed(1)
    assert store.add("one", packed(4)).version == 4
    store.remove("one")
    assert store.add("one", packed(5)).version == 5


def test_gc_keeps_the_newest_and_makes_the_file_smaller(store: AdapterStore):
    for number in range(4):
        store.add_many([NewAdapter(f"n{i}", packed(100 * number + i, layers=200)) for i in range(30)])
    before = store.path.stat().st_size + store.path.with_name("adapters.db-wal").stat().st_size
    freed = store.gc(2)
    assert freed == Freed(60, 60, 60 * len(packed(0, layers=200)))
    assert [one.version for one in store.history("n7")] == [4, 3]
    assert store.get("n7").data == packed(307, layers=200)
    assert store.verify().sound
    wal = store.path.with_name("adapters.db-wal")
    assert store.path.stat().st_size + wal.stat().st_size < before - freed.bytes
    assert store.gc(2) == Freed()
    assert store.gc(1).versions == 30


def test_verify_counts_and_reports_its_progress(store: AdapterStore):
    store.add_many([NewAdapter(f"n{number}", packed(number % 5), ("t",)) for number in range(7)])
    seen: list[tuple[int, int]] = []
    checked = store.verify(lambda done, total: seen.append((done, total)))
    assert checked.sound
    assert (checked.versions, checked.blobs, checked.bytes) == (7, 5, sum(len(packed(i)) for i in range(5)))
    assert seen[-1] == (5, 5)


def test_an_acknowledged_write_is_synced(store: AdapterStore):
    with store._database.reading() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL: the log is synced by every commit
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA page_size").fetchone() == (PAGE_BYTES,)
        assert connection.execute("PRAGMA foreign_keys").fetchone() == (1,)


def test_names_of_any_script(store: AdapterStore):
    names = ["Ärzte/Müller", "用户/1", "a [v] b", "100%", "x.y-z_@1b", "🙂"]
    store.add_many([NewAdapter(name, packed(1), (name,)) for name in names if len(name.encode()) < 64])
    assert [one.name for one in store.list().records] == sorted(names)
    assert [one.name for one in store.list(tag="用户/1").records] == ["用户/1"]


def test_not_stored_names_what_is_close(store: AdapterStore):
    store.add("team/user-1", packed(1))
    with pytest.raises(NotStoredError, match="did you mean team/user-1"):
        store.get("team/user-2")
    with pytest.raises(NotStoredError, match="the newest is 1"):
        store.get("team/user-1", version=2)

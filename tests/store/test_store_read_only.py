"""A store where nothing can be written: it is read, that is said once, and nothing is written beside it."""

import multiprocessing
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from small_adapters import packed

from randbasis import errors
from randbasis.store import AdapterStore

NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that others may look into, which pytest's are not."""
    found = Path(tempfile.mkdtemp())
    found.chmod(0o755)
    yield found
    found.chmod(0o755)
    shutil.rmtree(found)


@pytest.fixture
def store(folder: Path) -> Path:
    path = folder / "adapters.db"
    with AdapterStore(path) as opened:
        opened.add("one", packed(1), ["t"])
    return path


def without_rights(path: Path, work: Callable[[Path], Any], *, hidden: Path | None = None) -> Any:
    """What ``work`` gives in a process that may read the folder and not write it, and what it warned of."""
    for file in path.parent.iterdir():
        file.chmod(0 if file == hidden else 0o444)
    path.parent.chmod(0o555)

    def child(send: Connection) -> None:
        if os.getuid() == 0:  # whom no rights bind
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                found = work(path)
            except errors.RandbasisError as error:
                found = error
        send.send((found, [str(one.message) for one in told if "nothing can be written" in str(one.message)]))

    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe()
    process = context.Process(target=child, args=(send,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that threads of torch do not come along
        process.start()
    found = receive.recv() if receive.poll(60) else pytest.fail("the child did not answer")
    process.join()
    return found


def read(path: Path) -> tuple[bytes, list[str], bool]:
    with AdapterStore(path, create=False) as store:
        return store.get("one").data, [one.name for one in store.list(tag="t").records], store.verify().sound


def test_a_store_on_a_read_only_mount_is_read(store: Path):
    before = store.read_bytes()
    found, told = without_rights(store, read)
    assert found == (packed(1), ["one"], True)
    assert len(told) == 1
    assert str(store) in told[0]
    assert [file.name for file in store.parent.iterdir()] == [store.name]
    assert store.read_bytes() == before


def test_it_is_not_written(store: Path):
    def write(path: Path) -> None:
        with AdapterStore(path) as opened:
            opened.add("two", packed(2))

    found, _ = without_rights(store, write)
    assert isinstance(found, errors.StoreAccessError)


def test_a_log_that_is_not_in_the_file_is_not_passed_over(store: Path):
    """The newest version is in the log alone: it is read, or the store is refused; never an older state."""
    with AdapterStore(store) as opened:
        opened.add("one", packed(7), ["t"])
        for behind in ("", "-wal"):
            shutil.copy(f"{store}{behind}", store.parent / f"copy.db{behind}")
    assert os.path.getsize(store.parent / "copy.db-wal") > 0
    found, _ = without_rights(store.parent / "copy.db", read)
    assert isinstance(found, errors.StoreAccessError) or found[0] == packed(7), found
    shutil.copy(store.parent / "copy.db", store.parent.parent / f"{store.parent.name}.alone")
    alone = store.parent.parent / f"{store.parent.name}.alone"
    try:
        with AdapterStore(alone) as opened:
            assert opened.get("one").data == packed(1)  # so that reading the file alone would have been noticed
    finally:
        for file in alone.parent.glob(f"{alone.name}*"):
            file.unlink()


def test_a_store_that_cannot_be_read_either_is_refused(store: Path):
    store.chmod(0o444)

    def unreadable(path: Path) -> Any:
        return read(path.parent / "hidden.db")

    shutil.copy(store, store.parent / "hidden.db")
    found, told = without_rights(store, unreadable, hidden=store.parent / "hidden.db")
    assert isinstance(found, errors.StoreAccessError)
    assert told == []


def test_who_may_write_is_told_nothing(store: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(store)[0] == packed(1)

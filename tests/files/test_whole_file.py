"""One file, whole or absent: on this machine and behind a URL, by one rule of what may be replaced."""

import os
import pickle
import sqlite3
import stat
from pathlib import Path

import pytest
from safetensors import SafetensorError

from randbasis.errors import LocationError, OutputExistsError, RemoteError, SaveError
from randbasis.files import whole_file as module
from randbasis.files.locations import Remote
from randbasis.files.output_checks import check_output_file, check_output_folder
from randbasis.files.output_set import put_back, set_aside
from randbasis.files.saving import not_saved, saving
from randbasis.files.whole_file import whole_file, write, write_many

FULL = OSError(28, "No space left on device")
EXISTS = "exists; give overwrite to replace it, or another name"


class WorkError(Exception):
    """Of whatever writes."""


def put(path: Path | str, text: str, *, overwrite: bool = False, error: BaseException | None = None) -> None:
    with whole_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(text)
        if error is not None:
            raise error


@pytest.mark.parametrize("error", [FULL, WorkError(), KeyboardInterrupt()], ids=["full", "other", "key"])
@pytest.mark.parametrize("old", ["old", None])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(
    old: str | None, error: BaseException, tmp_path: Path
):
    path = tmp_path / "a"
    if old:
        path.write_text(old)
    with pytest.raises(SaveError if error is FULL else type(error)):
        put(path, "new", overwrite=True, error=error)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == ([("a", "old")] if old else [])
    put(path, "new", overwrite=True)
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_writer_that_writes_nothing_is_a_failure(tmp_path: Path):
    with (
        pytest.raises(SaveError, match=r"could not be written: .*what was there before is kept"),
        whole_file(tmp_path / "a"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_refused_before_anything_is_written(tmp_path: Path):
    (tmp_path / "a").write_text("old")
    for attempt in (put, lambda path, text: write(path, text.encode())):
        with pytest.raises(OutputExistsError, match=EXISTS):
            attempt(tmp_path / "a", "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a", "old")]


@pytest.mark.parametrize("by_link", [False, True])
def test_a_device_or_a_pipe_is_not_replaced_by_a_file(by_link: bool, tmp_path: Path):
    """Whoever may write into /dev would have a file for /dev/null, and all that is written there from then on."""
    output = pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    if by_link:
        output = tmp_path / "link"
        output.symlink_to(pipe)
    with pytest.raises(OutputExistsError, match="a device or a pipe"):
        write(output, b"new", overwrite=True)
    assert stat.S_ISFIFO(output.stat().st_mode)


def test_a_link_to_nothing_is_something_that_is_there(tmp_path: Path):
    link = tmp_path / "link"
    link.symlink_to("absent")
    with pytest.raises(OutputExistsError, match="give overwrite"):
        write(link, b"new")
    assert link.is_symlink()


def test_a_url_takes_a_file_whole_or_not_at_all(remote_folder: str):
    url = f"{remote_folder}/a"
    with pytest.raises(WorkError):
        put(url, "half", error=WorkError())
    assert Remote(url).kind() is None
    put(url, "old")
    for attempt in (put, lambda path, text: write(path, text.encode())):
        with pytest.raises(OutputExistsError, match=EXISTS):
            attempt(url, "new")
    with pytest.raises(SaveError, match=url):
        put(url, "half", overwrite=True, error=FULL)
    assert Remote(remote_folder).read_files({"a": 9}) == [b"old"]
    put(url, "new", overwrite=True)
    assert Remote(remote_folder).read_files({"a": 9}) == [b"new"]
    with pytest.raises(OutputExistsError, match="exists and is a folder, not a file"):
        put(remote_folder, "new", overwrite=True)


def test_a_remote_failure_is_one_of_the_remote(memory_folder: str, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: object) -> None:
        raise RemoteError("gone")

    monkeypatch.setattr(Remote, "upload", refused)
    with pytest.raises(RemoteError, match="gone"):
        put(f"{memory_folder}/a", "new")


def test_many_files_stop_at_the_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, data: bytes) -> int:
        if data == b"2":
            raise FULL
        return whole(path, data)

    whole = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SaveError, match=r"the disk is full .*; make room; write again"):
        write_many({tmp_path / "x" / name: name.encode() for name in "123"}, kept="write again")
    assert [(file.name, file.read_text()) for file in (tmp_path / "x").iterdir()] == [("1", "1")]


def test_many_files_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda _: calls.append("fsync"))
    monkeypatch.setattr(os, "sync", lambda: calls.append("sync"))
    write_many({tmp_path / "x" / name: name.encode() for name in "123"})
    module.flush_everything()
    assert calls == ["sync"]


# --- the rule ---


def test_a_name_that_cannot_be_taken_is_refused_before_the_work(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SaveError, match=r"there is no folder '.*not.there'; make it first"):
        check_output_file(tmp_path / "not" / "there" / "a", overwrite=True)
    check_output_folder(tmp_path / "not" / "there" / "a", overwrite=False)
    for check in (check_output_file, check_output_folder):
        with pytest.raises(SaveError, match=r"could not be written: '.*file' is a file; give another name"):
            check(tmp_path / "file" / "a", overwrite=True)
        with pytest.raises(LocationError, match="path of this machine"):
            check(Path("s3://bucket/a"), overwrite=True)
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match="exists and is a folder, not a file"):
            check_output_file(tmp_path / "folder", overwrite=overwrite)
        with pytest.raises(OutputExistsError, match="exists and is a file, not a folder"):
            check_output_folder(tmp_path / "file", overwrite=overwrite)
    assert not (tmp_path / "not").exists()


def test_a_file_of_this_machine_is_told_by_its_path(tmp_path: Path, memory_folder: str):
    assert check_output_file(str(tmp_path / "a"), overwrite=False) == tmp_path / "a"
    assert check_output_file((tmp_path / "a").as_uri(), overwrite=False) == tmp_path / "a"
    assert check_output_file(f"{memory_folder}/a", overwrite=False) is None


# --- the error ---


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FULL, r"the disk is full \(\[Errno 28\].*make room"),
        (sqlite3.OperationalError("database or disk is full"), r"the disk is full \(.*make room"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), r"the disk is full \(.*make room"),
        (PermissionError(13, "Permission denied"), "Permission denied; check the folder and its rights"),
        (RuntimeError("enforce fail at inline_container.cc"), r"inline_container\.cc; is the disk full\?"),
    ],
)
def test_failures_of_every_library_are_told_alike(error: Exception, told: str):
    made = not_saved("out", error)
    assert made.errno == (28 if "full (" in str(made) else 13 if isinstance(error, PermissionError) else 5)
    again = pickle.loads(pickle.dumps(made))
    assert (str(again), again.errno) == (str(made), made.errno)
    with pytest.raises(SaveError, match=rf"^out could not be written: .*{told}.*; what was there before is kept"):
        raise made


def test_an_error_that_is_not_of_writing_stays_what_it_is():
    for error in (RuntimeError("shapes do not match"), OutputExistsError("no"), ValueError("no")):
        with pytest.raises(type(error), match=str(error)), saving("out"):
            raise error


# --- a folder that grows ---


def test_what_was_set_aside_comes_back(tmp_path: Path):
    folder, aside = tmp_path / "run" / "checkpoints", tmp_path / "run" / ".before"
    set_aside(folder, aside)
    (folder / "a").write_text("first")
    set_aside(folder, aside)
    (folder / "a").write_text("stopped")
    set_aside(folder, aside)
    assert (list(folder.iterdir()), (aside / "a").read_text()) == ([], "first")
    put_back(folder, aside)
    assert ((folder / "a").read_text(), aside.exists()) == ("first", False)
    put_back(folder, aside)
    assert not folder.parent.exists()

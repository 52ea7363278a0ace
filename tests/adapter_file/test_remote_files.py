"""Packed files behind URLs: the same bytes, the same refusals, and no more read than it takes to refuse."""

from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFile
from malformed_files import FILES, GOOD, join, split
from packed_cases import CASES

from randbasis import errors
from randbasis.adapter_file import read, verify
from randbasis.files.locations import Remote


@pytest.mark.parametrize("name", ["nola", "vera"])
def test_what_is_written_is_read_and_verified(remote_folder: str, name: str):
    url = f"{remote_folder}/runs/{name}.safetensors"
    CASES[name].write(url)
    assert read(url).to_bytes() == CASES[name].to_bytes()
    found = verify(url)
    assert (found.as_json()["file"], found.canonical, found.bytes) == (url, True, len(CASES[name].to_bytes()))


def test_a_file_that_is_there_is_replaced_only_when_asked(remote_folder: str):
    url = f"{remote_folder}/a.safetensors"
    CASES["nola"].write(url)
    with pytest.raises(errors.OutputExistsError, match=url):
        CASES["vera"].write(url)
    with pytest.raises(errors.OutputExistsError, match="exists"):
        CASES["vera"].write(remote_folder, overwrite=True)
    assert read(url).to_bytes() == CASES["nola"].to_bytes()
    CASES["vera"].write(url, overwrite=True)
    assert read(url).to_bytes() == CASES["vera"].to_bytes()


def test_a_file_url_is_a_path(tmp_path: Path):
    url = (tmp_path / "a b.safetensors").as_uri()
    CASES["nola"].write(url)
    assert [file.name for file in tmp_path.iterdir()] == ["a b.safetensors"]  # no temporary file is left
    assert verify(url).path == tmp_path / "a b.safetensors"
    with pytest.raises(errors.OutputExistsError):
        CASES["nola"].write(url)


@pytest.mark.parametrize("name", FILES)
def test_a_malformed_file_is_refused(name: str, memory_folder: str):
    url = f"{memory_folder}/{name}"
    Remote(url).write(FILES[name][0])
    with pytest.raises(FILES[name][1]) as caught:
        read(url)
    assert type(caught.value) is FILES[name][1]
    assert str(caught.value).startswith(f"{url}: ")


def test_a_missing_file_and_a_folder(remote_folder: str):
    CASES["nola"].write(f"{remote_folder}/a/b")
    with pytest.raises(errors.PackedFileMissingError, match=f"'{remote_folder}/none' is not there"):
        read(f"{remote_folder}/none")
    with pytest.raises(errors.PackedFileMissingError, match=f"'{remote_folder}/a' is a directory; `randbasis pack`"):
        verify(f"{remote_folder}/a")


def test_what_is_refused_by_its_header_is_not_read_further(memory_folder: str, monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []

    def read_and_note(file: MemoryFile, size: int = -1) -> bytes:
        asked.append(size)
        return plain(file, size)

    plain = MemoryFile.read
    monkeypatch.setattr(MemoryFile, "read", read_and_note)
    Remote(f"{memory_folder}/a").write(GOOD + b"\0" * 1_000_000)
    with pytest.raises(errors.TruncatedFileError, match=str(len(GOOD) + 1_000_000)):
        read(f"{memory_folder}/a")
    assert len(asked) == 2
    assert sum(asked) < len(GOOD)


def test_a_file_that_ends_before_its_size_is_refused(memory_folder: str, monkeypatch: pytest.MonkeyPatch):
    """A server may say one size and send another."""
    header, _, data = split(GOOD)
    good = join(header, data)
    Remote(f"{memory_folder}/a").write(good[:-1])
    plain = Remote("memory://")._files.__class__.info
    monkeypatch.setattr(
        Remote("memory://")._files.__class__, "info", lambda files, path: plain(files, path) | {"size": len(good)}
    )
    with pytest.raises(errors.TruncatedFileError, match=f"{len(good)} bytes, it ended after {len(good) - 1}"):
        read(f"{memory_folder}/a")

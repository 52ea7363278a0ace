"""What is a path and what a URL, and the failures on the way to either."""

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from silent_hub import SilentHub

from randbasis import errors
from randbasis.adapter_file import read
from randbasis.adapters import open_adapter
from randbasis.files import locations
from randbasis.files.locations import Remote, local_path, reading


@pytest.mark.parametrize(
    "path",
    ["a/b.safetensors", "/a/b", "C:\\a\\b", "C:/a", "C://a", "s3:/bucket/a", "a b://c", "~/x", "://a", "1s3://a"],
)
def test_paths_are_paths(path: str):
    assert local_path(path) == Path(path)
    assert local_path(Path(path)) == Path(path)


@pytest.mark.parametrize("url", ["s3://bucket/a", "hf://datasets/a/b", "memory://a", "simplecache::s3://bucket/a"])
def test_urls_are_elsewhere(url: str):
    assert local_path(url) is None


def test_file_urls_are_those_of_pathlib(tmp_path: Path):
    path = tmp_path / "with space and % #"
    assert local_path(path.as_uri()) == path
    assert local_path(f"file://localhost{tmp_path.as_posix()}") == tmp_path
    with pytest.raises(errors.LocationError, match="third slash"):
        local_path("file://elsewhere/a")


def test_paths_do_not_need_fsspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    (tmp_path / "file").write_bytes(b"123")
    for location in (tmp_path / "file", str(tmp_path / "file"), (tmp_path / "file").as_uri()):
        with reading(location) as (stream, size):
            assert (stream.read(), size) == (b"123", 3)
    with pytest.raises(errors.MissingPackageError, match=r"fsspec, which is not .*install randbasis\[remote\]"):
        Remote("memory://a")


def test_the_module_itself_does_not_import_fsspec():
    tree = ast.parse(Path(locations.__file__).read_text(encoding="utf-8"))
    assert not [
        node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) and "fsspec" in str(vars(node))
    ]


def test_a_scheme_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch):
    registry = importlib.import_module("fsspec.registry")
    for module, scheme in (("s3fs", "s3"), ("gcsfs", "gs")):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(registry._registry, scheme, raising=False)
    with pytest.raises(errors.MissingPackageError, match=r"s3fs.*install randbasis\[s3\]"):
        Remote("s3://bucket/a")
    with pytest.raises(errors.MissingPackageError, match=r"gcsfs.*fsspec package of gs://"):
        Remote("gs://bucket/a")


def test_a_scheme_that_nobody_knows():
    with pytest.raises(errors.LocationError, match=r"scheme that fsspec knows.*'nowhere://a'"):
        Remote("nowhere://a")


@pytest.mark.parametrize("given", [None, 3, {}])
@pytest.mark.parametrize("call", [local_path, open_adapter, read])
def test_what_names_no_place(call: Callable[[Any], object], given: object):
    with pytest.raises(errors.LocationTypeError, match=rf"named by its path or URL, got {type(given).__name__}; "):
        call(given)


def test_files_and_folders(remote_folder: str, tmp_path: Path):
    folder, file = Remote(remote_folder), Remote(f"{remote_folder}/a")
    assert (folder.kind(), folder.names(), file.kind()) == (None, set(), None)
    with pytest.raises(FileNotFoundError), file.reading():
        pass
    file.write(b"12345")
    folder.write_files({"b/c": b"", "b/d": b"67"})
    assert (folder.kind(), folder.names(), file.kind()) == ("directory", {"a", "b"}, "file")
    with pytest.raises(IsADirectoryError), folder.reading():
        pass
    with file.reading() as (stream, size):
        assert (stream.read(2), size, stream.read()) == (b"12", 5, b"345")
    assert folder.sizes(["a", "b/c", "b/none", "b/d"]) == [5, 0, None, 2]
    assert folder.read_files({"a": 3, "b/none": 9, "b/d": 9}) == [b"123", None, b"67"]
    assert folder.read_files({}) == []
    (tmp_path / "up").write_bytes(b"89")
    folder.upload("e", tmp_path / "up")
    folder.download("e", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == b"89"
    folder.remove("e")
    file.write(b"0")  # another object of ours, or of another process, is seen at once
    assert (Remote(remote_folder).names(), folder.sizes(["a", "e"])) == ({"a", "b"}, [1, None])


def test_an_object_that_stands_for_its_folder_is_none_of_its_files(s3_folder: str):
    import s3fs

    s3fs.S3FileSystem().pipe_file(f"{s3_folder}/", b"")
    assert Remote(s3_folder).names() == set()


def test_a_bucket_that_is_not_there(s3_folder: str):
    missing = Remote(f"{s3_folder.rpartition('/')[0]}-missing/a")
    assert missing.kind() is None
    with pytest.raises(errors.RemoteError, match=f"{missing.url} could not be .*bucket does not exist"):
        missing.write(b"1")


def test_a_server_that_is_not_there(s3_folder: str, monkeypatch: pytest.MonkeyPatch):
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(errors.RemoteError, match=r"s3://bucket/a could not be reached.*127.0.0.1:1.*try again"):
        Remote("s3://bucket/a").kind()


def test_a_hub_that_is_not_there(silent_hub: SilentHub):
    import huggingface_hub

    huggingface_hub.HfFileSystem.clear_instance_cache()
    remote = Remote("hf://me/tiny/a")
    with pytest.raises(errors.RemoteError, match=r"hf://me/tiny/a could not be reached.*try again"):
        remote.kind()
    assert 1 <= silent_hub.asked <= 3
    huggingface_hub.HfFileSystem.clear_instance_cache()


def test_a_file_system_that_cannot_write():
    class ReadOnly(MemoryFileSystem):
        protocol = "readonly"

        def pipe_file(self, *_: object, **__: object) -> None:
            raise NotImplementedError

    fsspec.register_implementation("readonly", ReadOnly, clobber=True)
    with pytest.raises(errors.RemoteError, match=r"readonly://a could not be reached or written .NotImplementedError"):
        Remote("readonly://a").write(b"1")


def test_a_failure_of_the_reader_stays_what_it_is(memory_folder: str):
    Remote(f"{memory_folder}/a").write(b"1")
    with pytest.raises(errors.HeaderSizeError), reading(f"{memory_folder}/a"):
        raise errors.HeaderSizeError

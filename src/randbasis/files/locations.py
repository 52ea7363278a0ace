"""Where a file is: a path of this machine, or a URL that fsspec opens (``s3://``, ``hf://``, ``memory://``, …).

fsspec is imported when the first such URL is used. ``file://`` URLs are paths of this machine and need nothing, and
neither does anything else that does not begin with a scheme of two letters or more and ``://``.
"""

import io
import os
import re
import sys
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast
from urllib.parse import urlsplit
from urllib.request import url2pathname

from randbasis.errors import (
    BrokenPackageError,
    LocationError,
    LocationTypeError,
    MissingPackageError,
    RandbasisError,
    RemoteError,
)
from randbasis.optional import needing

Location = str | Path
"""A path of this machine, or a URL."""

LOOKS = 16
"""Questions to a remote file system at a time."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::[A-Za-z][A-Za-z0-9+.-]+)*://")
_ONE_SLASH = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+(?:::[A-Za-z][A-Za-z0-9+.-]+)*):/(?=[^/]|$)")
_FOREIGN = {
    "aiohttp": "ClientError",
    "botocore.exceptions": "BotoCoreError",
    "huggingface_hub.errors": "HFValidationError",
}
"""Module → class of the failures that implementations of fsspec raise beside OSError."""


class _Files(Protocol):
    """What is used of ``fsspec.AbstractFileSystem``."""

    def info(self, path: str) -> Mapping[str, Any]: ...
    def ls(self, path: str, detail: bool) -> list[str]: ...
    def open(self, path: str, mode: str) -> BinaryIO: ...
    def pipe(self, path: Mapping[str, bytes]) -> object: ...
    def cat_ranges(self, paths: list[str], starts: list[int], ends: list[int], on_error: str) -> list[object]: ...
    def put_file(self, lpath: str, rpath: str) -> object: ...
    def get_file(self, rpath: str, lpath: str) -> object: ...
    def rm_file(self, path: str) -> object: ...


def local_path(location: Location) -> Path | None:
    """The path on this machine, or None where a location is elsewhere.

    Raises:
        LocationError: a ``file://`` URL names another machine.
        LocationTypeError: it is no location.
    """
    if not isinstance(location, str | os.PathLike):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise LocationTypeError(
            f"a file or folder must be named by its path or URL, got {type(location).__name__}; give a str or a Path"
        )
    if not isinstance(location, str) or not _URL.match(location):
        return Path(location)
    parts = urlsplit(location)
    if parts.scheme.lower() != "file":
        return None
    if parts.netloc not in ("", "localhost"):
        raise LocationError(
            f"a file:// URL must name a file of this machine, such as file:///folder/file, got {location!r} on "
            f"{parts.netloc!r}; put a third slash before the path"
        )
    return Path(url2pathname(parts.path))


def local_output(location: Location) -> Path:
    """The path on this machine of something that can be written only there, such as a folder.

    A ``Path`` of a URL has lost a slash, and is known all the same.

    Raises:
        LocationError: it is elsewhere.
    """
    path = local_path(_ONE_SLASH.sub(r"\1:///", str(location)))
    if path is None:
        raise LocationError(
            f"output must be a path of this machine, got {str(location)!r}; write it here and copy it there, or make "
            "a packed file, which can be written to a URL"
        )
    return path


@contextmanager
def reading(location: Location) -> Generator[tuple[BinaryIO, int]]:
    """Open a file and tell its size in bytes; of a remote one, only what is read is fetched, in blocks.

    Raises:
        FileNotFoundError: there is none.
        IsADirectoryError: it is a directory.
        RemoteError: it could not be reached.
    """
    path = local_path(location)
    if path is None:
        with Remote(str(location)).reading() as found:
            yield found
        return
    if not path.is_file():
        raise IsADirectoryError(str(path)) if path.is_dir() else FileNotFoundError(str(path))
    with path.open("rb") as stream:
        yield stream, path.stat().st_size


class Remote:
    """A file or folder behind a URL.

    Nothing that was listed before is believed: another process may have written meanwhile.

    Args:
        url: such as ``"s3://bucket/folder"``.

    Raises:
        MissingPackageError: fsspec, or the package of the scheme, is not installed.
        LocationError: there is no such scheme.
    """

    def __init__(self, url: str) -> None:
        self.url = url if url.endswith("://") else url.rstrip("/")
        with _reported(url):
            self._files, self._root = _connect(url)

    def kind(self) -> str | None:
        """``"file"``, ``"directory"``, or None where there is nothing."""
        with _reported(self.url):
            try:
                return str(self._files.info(self._root)["type"])
            except FileNotFoundError:
                return None

    @contextmanager
    def reading(self) -> Generator[tuple[BinaryIO, int]]:
        """See :func:`reading`."""
        with _reported(self.url):
            info = self._files.info(self._root)
            if info["type"] == "directory":
                raise IsADirectoryError(self.url)
            with self._files.open(self._root, "rb") as stream:
                if info.get("size") is None or not stream.seekable():
                    data = stream.read()
                    yield io.BytesIO(data), len(data)
                else:
                    yield stream, int(info["size"])

    def write(self, data: bytes) -> None:
        """Put a file there, whole or not at all, in place of one that is there.

        Raises:
            RemoteError: it could not be put there.
        """
        with _reported(self.url, writing=True):
            self._files.pipe({self._root: data})

    # --- a folder ---

    def names(self) -> set[str]:
        """Names of what lies in the folder; none where there is no such folder."""
        with _reported(self.url):
            try:
                found = self._files.ls(self._root, detail=False)
            except FileNotFoundError:
                return set()
        # A folder that a console made is an object of its own, and stands among its names.
        inside = {path.rstrip("/") for path in found} - {self._root.rstrip("/")}
        return {path.rpartition("/")[2] for path in inside}

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Bytes of files in the folder, None for each that is not there; many are asked for at a time."""

        def size(name: str) -> int | None:
            with _reported(self._url(name)):
                try:
                    return int(self._files.info(self._path(name))["size"])
                except FileNotFoundError:
                    return None

        with ThreadPoolExecutor(LOOKS) as threads:
            return [*threads.map(size, names)]

    def write_files(self, files: Mapping[str, bytes]) -> None:
        """Put files into the folder, each whole or not at all; many at a time where the file system can."""
        with _reported(self.url, writing=True):
            self._files.pipe({self._path(name): data for name, data in files.items()})

    def read_files(self, limits: Mapping[str, int]) -> list[bytes | None]:
        """Contents of files in the folder, None for each that is not there; many at a time where it can.

        Args:
            limits: name → how many bytes to read at most.
        """
        if not limits:
            return []
        paths = [self._path(name) for name in limits]
        with _reported(self.url):
            found = self._files.cat_ranges(paths, [0] * len(paths), [*limits.values()], on_error="return")
            for one in found:
                if isinstance(one, BaseException) and not isinstance(one, FileNotFoundError):
                    raise one
        return [one if isinstance(one, bytes) else None for one in found]

    def upload(self, name: str, source: Path) -> None:
        """Put a file of this machine there, whole or not at all: into the folder, or with an empty name as it."""
        with _reported(self._url(name), writing=True):
            self._files.put_file(str(source), self._path(name))

    def download(self, name: str, target: Path) -> None:
        """Copy a file onto this machine: of the folder, or with an empty name the remote itself.

        Raises:
            FileNotFoundError: there is none.
        """
        with _reported(self._url(name)):
            self._files.get_file(self._path(name), str(target))

    def remove(self, name: str) -> None:
        """Take a file out of the folder."""
        with _reported(self._url(name), writing=True):
            self._files.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def _url(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url


def _connect(url: str) -> tuple[_Files, str]:
    with needing(f"opening {url!r}", "fsspec", "remote"):
        from fsspec.core import url_to_fs  # pyright: ignore[reportUnknownVariableType]
    try:
        return cast("tuple[_Files, str]", url_to_fs(url, use_listings_cache=False))
    except ImportError as error:
        cause = error.__cause__ or error  # fsspec's own words say "install" whatever went wrong
        if not isinstance(cause, ModuleNotFoundError):
            raise BrokenPackageError(
                f"{url!r} needs a package that is there and cannot be imported ({type(cause).__name__}: {cause}); mend "
                "that, or install it anew"
            ) from error
        scheme = url.partition(":")[0]
        extra = "randbasis[s3]" if scheme in ("s3", "s3a") else f"the fsspec package of {scheme}://"
        raise MissingPackageError(f"{url!r} needs a package that is missing ({cause}): install {extra}") from error
    except ValueError as error:
        if "Protocol not known" not in str(error):
            raise LocationError(
                f"a URL must be one that fsspec opens, got {url!r} ({error}); give all that its scheme needs"
            ) from error
        raise LocationError(
            f"a URL must have a scheme that fsspec knows, such as s3://, hf://, memory:// or file://, got {url!r} "
            f"({error}); name a path of this machine, or another scheme"
        ) from error


@contextmanager
def _reported(url: str, *, writing: bool = False) -> Generator[None]:
    """Failures on the way as :class:`RemoteError`; for a reader, no such file and a directory stay what they are."""
    try:
        yield
    except RandbasisError:
        raise
    except _failures() as error:
        if not writing and isinstance(error, FileNotFoundError | IsADirectoryError):
            raise
        told = str(error) or type(error).__name__
        raise RemoteError(
            f"{url} could not be reached or written ({told}); check the URL, the rights and the network, and try again"
        ) from error


def _failures() -> tuple[type[BaseException], ...]:
    loaded = [getattr(sys.modules[module], name) for module, name in _FOREIGN.items() if module in sys.modules]
    hub = sys.modules.get("huggingface_hub.errors")
    # Connections that fail are of a class of httpx, or of the fork of it that the installed client uses.
    client = () if hub is None else hub.HfHubHTTPError.__bases__
    return (OSError, NotImplementedError, *loaded, *client)

"""Exported folders: packed files named by their hash and a manifest, on this machine or behind a URL."""

import hashlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol, TextIO

from randbasis.errors import ManifestError
from randbasis.files.locations import Remote
from randbasis.files.output_checks import never_replaced
from randbasis.files.whole_file import flush_everything, whole_file, write_many
from randbasis.store.manifest import MANIFEST, content_name, read_manifest
from randbasis.store.records import Record

PART = f"{MANIFEST}.part"
"""An empty file that marks an export that has not come to its end."""
_GOES_ON = "export again: it goes on"


class ExportFolder(Protocol):
    """Where an export is written."""

    def check(self) -> None:
        """Raise OutputExistsError where there is something else than an earlier export."""
        ...

    def absent(self, sizes: Mapping[str, int]) -> set[str]:
        """Of some digests with the bytes of their contents, those of which the folder has no whole content."""
        ...

    def write(self, contents: Mapping[str, bytes]) -> None:
        """Add contents by their digests, each whole or not at all."""
        ...

    def manifest(self) -> AbstractContextManager[TextIO]:
        """A context in which the manifest is written; it gets its name when the context ends well."""
        ...


class LocalFolder:
    """An exported folder on this machine.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    # --- to write ---

    def check(self) -> None:
        """See :class:`ExportFolder`."""
        if self._path.exists() and not (
            self._path.is_dir() and _is_export({found.name for found in self._path.iterdir()})
        ):
            raise never_replaced(self._path, "earlier export")

    def absent(self, sizes: Mapping[str, int]) -> set[str]:
        """See :class:`ExportFolder`; what is there is hashed."""
        return {digest for digest in sizes if not self._is_whole(digest)}

    def write(self, contents: Mapping[str, bytes]) -> None:
        """See :class:`ExportFolder`."""
        write_many({self._path / content_name(digest): data for digest, data in contents.items()}, kept=_GOES_ON)

    @contextmanager
    def manifest(self) -> Generator[TextIO]:
        """See :class:`ExportFolder`.

        Raises:
            SaveError: the folder could not be written.
        """
        write_many({self._path / PART: b""}, kept=_GOES_ON)
        with whole_file(self._path / MANIFEST, overwrite=True, kept=_GOES_ON) as temporary:
            with temporary.open("w", encoding="utf-8") as file:
                yield file
            flush_everything()  # once for all contents, before the manifest vouches for them
        (self._path / PART).unlink(missing_ok=True)

    def _is_whole(self, digest: str) -> bool:
        place = self._path / content_name(digest)
        return place.is_file() and hashlib.sha256(place.read_bytes()).hexdigest() == digest

    # --- to read ---

    def records(self) -> Iterator[Record]:
        """All versions, in the order of name and version."""
        return read_manifest(self._path / MANIFEST, str(self._path))

    def contents(self, records: Sequence[Record]) -> Iterator[bytes]:
        """The bytes of each as they lie there."""
        for record in records:
            place = self._path / content_name(record.digest)
            if not place.is_file() or place.stat().st_size != record.bytes:
                raise _no_content(str(place), record)
            yield place.read_bytes()


class RemoteFolder:
    """An exported folder behind a URL.

    Args:
        remote: the folder.
    """

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._begun = False

    def check(self) -> None:
        """See :class:`ExportFolder`; tells too whether an export goes on."""
        names = self._remote.names()
        self._begun = bool(names)
        if self._remote.kind() == "file" or not _is_export(names):
            raise never_replaced(self._remote.url, "earlier export")

    def absent(self, sizes: Mapping[str, int]) -> set[str]:
        """See :class:`ExportFolder`; what is there with its size is whole, since it was put there as a whole."""
        if not self._begun:
            return {*sizes}
        found = self._remote.sizes([content_name(digest) for digest in sizes])
        return {digest for (digest, size), there in zip(sizes.items(), found, strict=True) if size != there}

    def write(self, contents: Mapping[str, bytes]) -> None:
        """See :class:`ExportFolder`."""
        if contents:
            self._remote.write_files({content_name(digest): data for digest, data in contents.items()})

    @contextmanager
    def manifest(self) -> Generator[TextIO]:
        """See :class:`ExportFolder`; it is written on this machine and sent at the end."""
        self._remote.write_files({PART: b""})
        with (
            whole_file(f"{self._remote.url}/{MANIFEST}", overwrite=True) as path,
            path.open("w", encoding="utf-8") as file,
        ):
            yield file
        self._remote.remove(PART)


class RemoteOrigin:
    """Versions in an exported folder behind a URL, whose manifest lies on this machine.

    Args:
        remote: the folder.
        folder: of this machine, for the manifest.

    Raises:
        ManifestError: there is no manifest.
    """

    def __init__(self, remote: Remote, folder: Path) -> None:
        self._remote, self._manifest = remote, folder / MANIFEST
        if MANIFEST in remote.names():
            remote.download(MANIFEST, self._manifest)

    def records(self) -> Iterator[Record]:
        """All versions, in the order of name and version."""
        return read_manifest(self._manifest, self._remote.url)

    def contents(self, records: Sequence[Record]) -> Iterator[bytes]:
        """The bytes of each as they lie there."""
        # One byte more than there should be, to notice a content that is too long; no more of it is fetched.
        limits = {content_name(record.digest): record.bytes + 1 for record in records}
        found = dict(zip(limits, self._remote.read_files(limits), strict=True))
        for record in records:
            data = found[content_name(record.digest)]
            if data is None or len(data) != record.bytes:
                raise _no_content(f"{self._remote.url}/{content_name(record.digest)}", record)
            yield data


def _is_export(names: set[str]) -> bool:
    return not names or MANIFEST in names or PART in names


def _no_content(where: str, record: Record) -> ManifestError:
    return ManifestError(f"{where} must be a file of {record.bytes} bytes by the manifest, it is not; export again")

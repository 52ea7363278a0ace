"""STORE ↔ FOLDER or FILE: versions copied in batches, each batch one transaction, so that a cut-off copy goes on."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Protocol

from randbasis.errors import ManifestError, OutputExistsError, SaveError, StoreMissingError
from randbasis.store import tables
from randbasis.store.contents import check_content
from randbasis.store.database import Database
from randbasis.store.manifest import MANIFEST, content_path, read_manifest, write_first, write_last, write_record
from randbasis.store.names import check_adapter_name
from randbasis.store.records import Progress, Record, Selection, Transfer
from randbasis.store.tables import Content

BATCH = 500
"""Versions of one transaction and in memory at a time."""
PART = f"{MANIFEST}.part"
"""The manifest of an export that has not come to its end."""


class Origin(Protocol):
    """Where versions come from."""

    def records(self) -> Iterator[Record]:
        """All of them, in the order of name and version, each time from the first."""
        ...

    def data(self, record: Record) -> bytes | None:
        """The bytes of a content, or None where it was removed meanwhile."""
        ...


class StoreOrigin:
    """Versions of a store.

    Args:
        database: of the store.
        selection: which.
        newest: only the newest of each adapter.
    """

    def __init__(self, database: Database, selection: Selection, *, newest: bool = False) -> None:
        self._database, self._selection, self._newest = database, selection, newest

    def records(self) -> Iterator[Record]:
        """All of them."""
        after = ("", 0)
        while True:
            with self._database.reading() as connection:
                found = tables.page(connection, self._selection, after, BATCH, newest=self._newest)
            if not found:
                return
            yield from found
            after = found[-1].name, found[-1].version

    def data(self, record: Record) -> bytes | None:
        """The bytes, whose hash is checked."""
        with self._database.reading() as connection:
            found = tables.load(connection, record.name, record.version)
        return None if found is None else found.data


class FolderOrigin:
    """Versions in an exported folder.

    Args:
        folder: with the manifest.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def records(self) -> Iterator[Record]:
        """All of them."""
        return read_manifest(self._folder)

    def data(self, record: Record) -> bytes:
        """The bytes as they lie there."""
        path = content_path(self._folder, record.digest)
        if not path.is_file() or path.stat().st_size != record.bytes:
            raise ManifestError(
                f"{path} must be a file of {record.bytes} bytes by the manifest, it is not; export again"
            )
        return path.read_bytes()


def export_folder(
    database: Database, path: Path, selection: Selection, *, newest: bool, progress: Progress | None
) -> Transfer:
    """See :meth:`randbasis.store.AdapterStore.export`."""
    if path.exists() and not (path.is_dir() and _is_export(path)):
        raise OutputExistsError(f"output {str(path)!r} exists and is no earlier export; name another folder")
    origin = StoreOrigin(database, selection, newest=newest)
    total = _count(database, selection, newest=newest)
    try:
        path.mkdir(parents=True, exist_ok=True)
        return _write_folder(origin, path, total, progress)
    except OSError as error:
        raise SaveError(f"{path} could not be written ({error}); make room and export again: it goes on") from error


def export_file(
    database: Database, path: Path, selection: Selection, *, newest: bool, progress: Progress | None
) -> Transfer:
    """See :meth:`randbasis.store.AdapterStore.export`."""
    target = Database(path, create=True, timeout=database.timeout)
    try:
        origin = StoreOrigin(database, selection, newest=newest)
        return _copy(origin, target, "", _as_stored, progress)
    finally:
        target.close()


def import_into(database: Database, path: Path, *, prefix: str, progress: Progress | None) -> Transfer:
    """See :meth:`randbasis.store.AdapterStore.import_from`."""
    if not path.exists():
        raise StoreMissingError(f"there is no export {str(path)!r}; name the folder or file that was exported")
    if path.is_dir():
        return _copy(FolderOrigin(path), database, prefix, _checked, progress)
    source = Database(path, create=False, timeout=database.timeout)
    try:
        return _copy(StoreOrigin(source, Selection()), database, prefix, _checked, progress)
    finally:
        source.close()


class _ToContent(Protocol):
    def __call__(self, record: Record, data: bytes) -> Content: ...


def _copy(origin: Origin, target: Database, prefix: str, content: _ToContent, progress: Progress | None) -> Transfer:
    """Everything that could be refused by its record is refused before the first version is written."""
    total = 0
    with target.reading() as connection:
        for record in origin.records():
            check_adapter_name(prefix + record.name)
            tables.is_there(connection, replace(record, name=prefix + record.name))
            total += 1
    done = written = size = 0
    records = origin.records()
    while batch := [*islice(records, BATCH)]:
        checked = [*_new_ones(origin, target, prefix, content, batch)]
        with target.writing() as connection:
            for record, one in checked:
                if tables.restore(connection, record, one):
                    written, size = written + 1, size + len(one.data)
        done += len(batch)
        if progress is not None:
            progress(done, max(done, total))
    return Transfer(done, written, size)


def _new_ones(
    origin: Origin, target: Database, prefix: str, content: _ToContent, batch: list[Record]
) -> Iterator[tuple[Record, Content]]:
    for record in batch:
        renamed = replace(record, name=prefix + record.name)
        with target.reading() as connection:
            there = tables.is_there(connection, renamed)
        if not there and (data := origin.data(record)) is not None:
            yield renamed, content(record, data)


def _as_stored(record: Record, data: bytes) -> Content:
    """A content whose hash was checked when it was read, and whose form when it was put in."""
    return Content(data, bytes.fromhex(record.digest), record.method, bytes.fromhex(record.base))


def _checked(record: Record, data: bytes) -> Content:
    """A content that nothing is known of."""
    content = check_content(data, f"{record.name} version {record.version}")
    found = (content.digest.hex(), content.method, content.base.hex(), len(data))
    said = (record.digest, record.method, record.base, record.bytes)
    if found != said:
        raise ManifestError(
            f"{record.name} version {record.version} must have (digest, method, base, bytes) {said}, got {found}; "
            "the export was damaged or changed: export again"
        )
    return content


def _is_export(path: Path) -> bool:
    return not any(path.iterdir()) or (path / MANIFEST).is_file() or (path / PART).is_file()


def _count(database: Database, selection: Selection, *, newest: bool) -> int:
    with database.reading() as connection:
        return tables.count(connection, selection, newest=newest)


def _write_folder(origin: StoreOrigin, path: Path, total: int, progress: Progress | None) -> Transfer:
    done = written = size = 0
    with (path / PART).open("w", encoding="utf-8") as manifest:
        write_first(manifest)
        for record in origin.records():
            if not _is_whole(content_path(path, record.digest), record.digest):
                if (data := origin.data(record)) is None:
                    continue
                _write_content(content_path(path, record.digest), data)
                written, size = written + 1, size + len(data)
            write_record(manifest, record)
            done += 1
            if progress is not None:
                progress(done, max(done, total))
        write_last(manifest, done)
    if hasattr(os, "sync"):
        os.sync()  # once for all contents, before the manifest vouches for them
    (path / PART).replace(path / MANIFEST)
    return Transfer(done, written, size)


def _is_whole(path: Path, digest: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


def _write_content(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_bytes(data)
    temporary.replace(path)

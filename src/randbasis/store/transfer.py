"""STORE ↔ FOLDER or FILE: versions copied in batches, each batch one transaction, so that a cut-off copy goes on."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from randbasis.errors import ManifestError, StoreFormatError, StoreMissingError, StoreVersionError
from randbasis.files.locations import Location, Remote, local_path
from randbasis.files.output_checks import never_replaced
from randbasis.files.whole_file import whole_file
from randbasis.store import tables
from randbasis.store.contents import check_content
from randbasis.store.database import Database
from randbasis.store.folders import ExportFolder, LocalFolder, RemoteFolder, RemoteOrigin
from randbasis.store.manifest import write_first, write_last, write_record
from randbasis.store.names import check_adapter_name
from randbasis.store.records import Progress, Record, Selection, Transfer
from randbasis.store.tables import Content

BATCH, BATCH_BYTES = 500, 64 << 20
"""Versions, and bytes of their contents, of one transaction and in memory at a time; a larger content goes alone."""


class Origin(Protocol):
    """Where versions come from."""

    def records(self) -> Iterator[Record]:
        """All of them, in the order of name and version, each time from the first."""
        ...

    def contents(self, records: Sequence[Record]) -> Iterator[bytes | None]:
        """The bytes of each content, or None where it was removed meanwhile."""
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

    def contents(self, records: Sequence[Record]) -> Iterator[bytes | None]:
        """The bytes of each, whose hash is checked."""
        for record in records:
            with self._database.reading() as connection:
                found = tables.load(connection, record.name, record.version)
            yield None if found is None else found.data


def export_folder(
    database: Database, location: Location, selection: Selection, *, newest: bool, progress: Progress | None
) -> Transfer:
    """See :meth:`randbasis.store.AdapterStore.export`."""
    path = local_path(location)
    folder = RemoteFolder(Remote(str(location))) if path is None else LocalFolder(path)
    folder.check()
    origin = StoreOrigin(database, selection, newest=newest)
    return _write_folder(origin, folder, _count(database, selection, newest=newest), progress)


def export_file(
    database: Database, location: Location, selection: Selection, *, newest: bool, progress: Progress | None
) -> Transfer:
    """See :meth:`randbasis.store.AdapterStore.export`."""
    origin = StoreOrigin(database, selection, newest=newest)
    path = local_path(location)
    if path is not None:
        return _write_file(origin, path, database.timeout, progress)
    if Remote(str(location)).kind() is not None:
        raise never_replaced(location, "file of this machine to go on with")
    with whole_file(location) as path:
        return _write_file(origin, path, database.timeout, progress)


def import_into(database: Database, location: Location, *, prefix: str, progress: Progress | None) -> Transfer:
    """See :meth:`randbasis.store.AdapterStore.import_from`."""
    path = local_path(location)
    if path is None:
        return _import_remote(database, Remote(str(location)), prefix, progress)
    if not path.exists():
        raise _no_export(str(location))
    if path.is_dir():
        return _copy(LocalFolder(path), database, prefix, _checked, progress)
    return _import_file(database, path, prefix, progress)


def _import_remote(database: Database, remote: Remote, prefix: str, progress: Progress | None) -> Transfer:
    kind = remote.kind()
    if kind is None:
        raise _no_export(remote.url)
    with TemporaryDirectory() as folder:
        if kind == "directory":
            return _copy(RemoteOrigin(remote, Path(folder)), database, prefix, _checked, progress)
        path = Path(folder) / "adapters.db"
        remote.download("", path)
        try:
            return _import_file(database, path, prefix, progress)
        except (StoreFormatError, StoreVersionError) as error:
            raise type(error)(f"{remote.url}: {error}") from error


def _import_file(database: Database, path: Path, prefix: str, progress: Progress | None) -> Transfer:
    source = Database(path, create=False, timeout=database.timeout)
    try:
        return _copy(StoreOrigin(source, Selection()), database, prefix, _checked, progress)
    finally:
        source.close()


def _write_file(origin: "StoreOrigin", path: Path, timeout: float, progress: Progress | None) -> Transfer:
    target = Database(path, create=True, timeout=timeout)
    try:
        return _copy(origin, target, "", _as_stored, progress)
    finally:
        target.close()


def _no_export(where: str) -> StoreMissingError:
    return StoreMissingError(f"there is no export {where!r}; name the folder or file that was exported")


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
    for batch in _batches(origin.records()):
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
    def renamed(record: Record) -> Record:
        return replace(record, name=prefix + record.name)

    with target.reading() as connection:
        new = [record for record in batch if not tables.is_there(connection, renamed(record))]
    for record, data in zip(new, origin.contents(new), strict=True):
        if data is not None:
            yield renamed(record), content(record, data)


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


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    batch, size = list[Record](), 0
    for record in records:
        if batch and (len(batch) >= BATCH or size + record.bytes > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(record)
        size += record.bytes
    if batch:
        yield batch


def _count(database: Database, selection: Selection, *, newest: bool) -> int:
    with database.reading() as connection:
        return tables.count(connection, selection, newest=newest)


def _write_folder(origin: StoreOrigin, folder: ExportFolder, total: int, progress: Progress | None) -> Transfer:
    done = written = size = 0
    with folder.manifest() as manifest:
        write_first(manifest)
        for batch in _batches(origin.records()):
            kept, new = _missing_contents(origin, folder, batch)
            folder.write(new)
            written, size = written + len(new), size + sum(map(len, new.values()))
            for record in kept:
                write_record(manifest, record)
                done += 1
                if progress is not None:
                    progress(done, max(done, total))
        write_last(manifest, done)
    return Transfer(done, written, size)


def _missing_contents(
    origin: StoreOrigin, folder: ExportFolder, batch: list[Record]
) -> tuple[list[Record], dict[str, bytes]]:
    """The versions that can be exported, and those of their contents that the folder has not."""
    absent = folder.absent({record.digest: record.bytes for record in batch})
    kept: list[Record] = []
    new: dict[str, bytes] = {}
    for record in batch:
        if record.digest in absent and record.digest not in new:
            (data,) = origin.contents([record])
            if data is None:
                continue
            new[record.digest] = data
        kept.append(record)
    return kept, new

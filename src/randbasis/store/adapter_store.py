"""The store: a million adapters in one file."""

import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from randbasis.defaults import PAGE, STORE_TIMEOUT
from randbasis.errors import NotStoredError, StoreOptionError, near
from randbasis.files.locations import Location
from randbasis.store import tables, transfer, verification
from randbasis.store.contents import check_content
from randbasis.store.database import Database
from randbasis.store.names import check_adapter_name, check_count, check_digest, check_tags
from randbasis.store.records import (
    Checked,
    Freed,
    NewAdapter,
    Page,
    Progress,
    Record,
    Selection,
    Source,
    StoredAdapter,
    Transfer,
)

PAGE_LIMIT = 10_000
"""Most records of one page."""
GC_NAMES = 500
"""Adapters whose old versions go in one transaction: a writer that waits does not wait long."""
VACUUM_PAGES = 2_000
"""Pages that are given back to the system in one transaction."""
_ALIKE = 3
"""Letters at the beginning of a name that those are believed to have that were meant instead."""
_LOOKED_AT = 100
"""Names on each side of such a beginning among which the one that was meant is looked for."""


class AdapterStore:
    """Packed adapters under names and versions, in one SQLite file.

    Every change is one transaction, on the disk before the call returns: a kill of the process, and a power cut on a
    drive that keeps what it acknowledged, lose nothing that was acknowledged and leave nothing torn. Any number of
    threads and processes read while one writes; writers wait for each other. The same content is stored once.

    Args:
        path: of the file.
        create: make the file where there is none.
        timeout: seconds to wait for another writer.

    Raises:
        StoreMissingError: there is no file and ``create`` is not given, or no folder to put it in.
        StoreFormatError: the file is not a store.
        StoreVersionError: it is a store of another version of this package.
        StoreLockedError: another process kept it locked. Every call below raises it too.
        StoreAccessError: it cannot be opened or written with the rights that there are. Every call below raises it too.
    """

    def __init__(self, path: str | Path, *, create: bool = True, timeout: float = STORE_TIMEOUT) -> None:
        self._database = Database(path, create=create, timeout=timeout)

    @property
    def path(self) -> Path:
        """The file."""
        return self._database.path

    def close(self) -> None:
        """Close the file; other processes may go on."""
        self._database.close()

    def __enter__(self) -> "AdapterStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- putting in ---

    def add(self, name: str, source: Source, tags: Iterable[str] = ()) -> Record:
        """Put an adapter in; under a name that is there, as its next version.

        Args:
            name: such as ``"team/user-1"``.
            source: bytes, path or URL of a packed file, or a :class:`~randbasis.adapter_file.PackedAdapter`.
            tags: words to find it by.

        Raises:
            StoreNameError: the name or a tag is not one that a store takes.
            PackedFileMissingError: there is no such file.
            RandbasisError: the content breaks a rule of the packed file; see :func:`randbasis.adapter_file.read`.
            SaveError: the disk is full; the store is as it was.
        """
        return self.add_many([NewAdapter(name, source, check_tags(tags))])[0]

    def add_many(self, adapters: Iterable[NewAdapter]) -> tuple[Record, ...]:
        """Put a batch in, all or none, in one transaction; a thousand at a time is a good size.

        The batch is checked as a whole before the first is written, and is held in memory until then.

        Raises:
            RandbasisError: as :meth:`add`, for the first of the batch that is refused.
        """
        batch = [
            (check_adapter_name(one.name), check_tags(one.tags), check_content(one.source, f"adapter {one.name!r}"))
            for one in adapters
        ]
        created = _now()
        with self._database.writing() as connection:
            return tuple(tables.insert(connection, name, tags, content, created) for name, tags, content in batch)

    def rollback(self, name: str, to: int | None = None) -> Record:
        """Make an old version the newest: a new version with the content and the tags of the old one.

        Args:
            name: of the adapter.
            to: the version; None takes the one before the newest.

        Raises:
            NotStoredError: there is no such adapter or version, or none before the newest.
            StoreOptionError: it is the newest already.
        """
        if to is not None:
            check_count(to, "to")
        with self._database.writing() as connection:
            newest, *older = tables.versions(connection, name, tables.LAST_VERSION, 2) or [self._missing(name)]
            if to == newest.version:
                raise StoreOptionError(f"to must be an older version of {name!r}, {to} is the newest; name another one")
            if to is None and not older:
                raise NotStoredError(f"{name!r} must have a version to go back to, got one version alone; add another")
            old = older[0] if to is None else tables.find(connection, name, to) or self._missing(name, to)
            return tables.repeat(connection, old, _now())

    def tag(
        self, name: str, *, add: Iterable[str] = (), remove: Iterable[str] = (), version: int | None = None
    ) -> Record:
        """Give a version further tags, and take some from it; its content, number and time stay.

        Args:
            name: of the adapter.
            add: tags that it has from now on; those that it has already stay.
            remove: tags that it loses.
            version: of the adapter; None takes the newest.

        Raises:
            NotStoredError: there is no such adapter or version.
            StoreNameError: a tag is not one that a store takes.
            StoreOptionError: a tag is to go that the version has not, or that is to be added, too.
        """
        added, gone = check_tags(add), {*remove}
        if version is not None:
            check_count(version, "version")
        with self._database.writing() as connection:
            found = tables.find(connection, name, version) or self._missing(name, version)
            for one in sorted(gone - {*found.tags} | gone & {*added}):
                raise StoreOptionError(
                    f"remove must be tags that version {found.version} of {name!r} has and add does not name, got "
                    f"{one!r}; it has {', '.join(found.tags) or 'none'}"
                )
            return tables.retag(connection, found, check_tags([*({*found.tags} - gone), *added]))

    # --- finding ---

    def get(self, name: str | None = None, *, version: int | None = None, digest: str | None = None) -> StoredAdapter:
        """An adapter with its content, whose hash is checked.

        Args:
            name: of the adapter.
            version: of the adapter; None takes the newest.
            digest: SHA-256 of the content in hexadecimal, instead of a name.

        Raises:
            NotStoredError: there is none.
            StoreOptionError: not exactly one of name and digest is given, or the version or digest cannot be one.
            StoreDamagedError: the content is not what was put in.
        """
        if (name is None) == (digest is None) or (name is None and version is not None):
            raise StoreOptionError(
                f"give a name, with or without a version, or a digest; got {name=}, {version=}, {digest=}"
            )
        if name is None:
            key = check_digest(digest or "")
            with self._database.reading() as connection:
                found = tables.load_digest(connection, key)
            if found is None:
                raise NotStoredError(f"{self.path} has no content of digest {digest}; `randbasis store list` has them")
            return found
        if version is not None:
            check_count(version, "version")
        with self._database.reading() as connection:
            return tables.load(connection, name, version) or self._missing(name, version)

    def record(self, name: str, version: int | None = None) -> Record:
        """What the store knows of an adapter, without its content.

        Raises:
            NotStoredError: there is none.
        """
        if version is not None:
            check_count(version, "version")
        with self._database.reading() as connection:
            return tables.find(connection, name, version) or self._missing(name, version)

    def list(
        self,
        *,
        tag: str | None = None,
        base: str | None = None,
        method: str | None = None,
        after: str = "",
        limit: int = PAGE,
    ) -> Page:
        """The newest versions, page by page, in the order of their names; a page costs the same wherever it is.

        Args:
            tag: only those with this tag.
            base: only those for this base model, by its fingerprint in hexadecimal.
            method: only those of this method, by its name.
            after: the name after which to begin: :attr:`Page.next` of the page before.
            limit: most records of the page.

        Raises:
            StoreOptionError: the limit or the fingerprint cannot be one.
        """
        check_count(limit, "limit", most=PAGE_LIMIT)
        selection = _selection(tag, base, method)
        with self._database.reading() as connection:
            after_all = (after, tables.LAST_VERSION)
            found = tables.page(connection, selection, after_all, limit + 1, newest=True)
        return Page(tuple(found[:limit]), found[limit - 1].name if len(found) > limit else None)

    def history(self, name: str, *, before: int | None = None, limit: int = PAGE) -> tuple[Record, ...]:
        """The versions of an adapter, newest first.

        Args:
            name: of the adapter.
            before: only versions below this one, for the next page.
            limit: most versions.

        Raises:
            NotStoredError: there is no such adapter, or none below ``before``.
        """
        check_count(limit, "limit", most=PAGE_LIMIT)
        below = tables.LAST_VERSION if before is None else check_count(before, "before")
        with self._database.reading() as connection:
            return tuple(tables.versions(connection, name, below, limit) or [self._missing(name, before)])

    # --- taking out ---

    def remove(self, name: str, version: int | None = None) -> Freed:
        """Take out an adapter with all its versions, or one version.

        A version number is never given again. The pages are used again by later additions; :meth:`gc` makes the file
        smaller.

        Raises:
            NotStoredError: there is no such adapter or version.
        """
        if version is not None:
            check_count(version, "version")
        with self._database.writing() as connection:
            if version is not None:
                found = [tables.find(connection, name, version) or self._missing(name, version)]
            else:
                found = tables.versions(connection, name, tables.LAST_VERSION, tables.LAST_VERSION)
                found = found or [self._missing(name)]
            return tables.delete(connection, name, [record.version for record in found])

    def gc(self, keep: int, progress: Progress | None = None) -> Freed:
        """Keep the newest versions of every adapter, remove the older ones, and make the file smaller.

        Many short transactions: a kill leaves a part of the adapters with more versions than asked for.

        Args:
            keep: versions of each adapter, at least 1.
            progress: called with the pages of the file given back and those to give back.
        """
        check_count(keep, "keep")
        freed, after = Freed(), ""
        while True:
            with self._database.reading() as connection:
                names = tables.names_with_more(connection, keep, after, GC_NAMES)
            if not names:
                break
            with self._database.writing() as connection:
                for name in names:
                    old = tables.versions(connection, name, tables.LAST_VERSION, tables.LAST_VERSION)[keep:]
                    freed += tables.delete(connection, name, [record.version for record in reversed(old)])
            after = names[-1]
        self._shrink(progress)
        return freed

    def _shrink(self, progress: Progress | None) -> None:
        with self._database.reading() as connection:
            total = left = connection.execute("PRAGMA freelist_count").fetchone()[0]
            while left:
                # Not execute(): it stops at the first row, and this pragma gives back one page a row.
                connection.executescript(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")
                left = max(0, left - VACUUM_PAGES)
                if progress is not None:
                    progress(total - left, total)
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    # --- the whole ---

    def verify(self, progress: Progress | None = None) -> Checked:
        """Hash every content again, and hold every record against its content and the file's own structure.

        Args:
            progress: called with the contents checked and those there are.

        Raises:
            StoreDamagedError: the file is so damaged that SQLite cannot read it to its end.
        """
        return verification.verify(self._database, progress)

    def export(
        self,
        path: Location,
        *,
        one_file: bool = False,
        tag: str | None = None,
        base: str | None = None,
        method: str | None = None,
        newest: bool = False,
        progress: Progress | None = None,
    ) -> Transfer:
        """Write adapters with all their versions into a folder of packed files with a manifest, or into one file.

        What is there from an export that was cut off is not written again. Changes of the store while it is exported
        are in the export or not; every version in it is whole.

        Args:
            path: the folder, or the file, which is a store itself; or a URL that fsspec writes. A file behind a URL
                is made on this machine first.
            one_file: write a file.
            tag: only versions with this tag.
            base: only those for this base model, by its fingerprint in hexadecimal.
            method: only those of this method.
            newest: only the newest version of each adapter.
            progress: called with the versions written and those there are.

        Raises:
            OutputExistsError: the folder holds something else than an earlier export.
            StoreFormatError: the file is something else than a store.
            ImportConflictError: the file has other versions under the same numbers.
            SaveError: the disk is full.
            RemoteError: the URL could not be reached or written.
        """
        selection = _selection(tag, base, method)
        write = transfer.export_file if one_file else transfer.export_folder
        return write(self._database, path, selection, newest=newest, progress=progress)

    def import_from(self, path: Location, *, prefix: str = "", progress: Progress | None = None) -> Transfer:
        """Take in what :meth:`export` wrote, or another store: names, versions, times and tags as they were.

        What is there already is left alone, so that a cut-off import can be started again.

        Args:
            path: the folder or the file, or its URL. A file behind a URL is copied to this machine first.
            prefix: to put before every name, such as ``"old/"``.
            progress: called with the versions taken in and those there are.

        Raises:
            StoreMissingError: there is nothing.
            ManifestError: the manifest is missing, cut off or wrong, or a file is not what it says.
            ImportConflictError: a version is there with another content; nothing was changed.
            StoreNameError: a name is not one that a store takes; nothing was changed.
            RemoteError: the URL could not be reached.
        """
        return transfer.import_into(self._database, path, prefix=prefix, progress=progress)

    def _missing(self, name: str, version: int | None = None) -> NoReturn:
        with self._database.reading() as connection:
            newest = tables.find(connection, name, None)
            if newest is not None:
                raise NotStoredError(
                    f"{self.path} has {name!r}, but no such version of it ({version}); the newest is {newest.version}, "
                    "`randbasis store history` lists them"
                )
            around = tables.names_around(connection, name[:_ALIKE], _LOOKED_AT)
        raise NotStoredError(f"{self.path} has no adapter {name!r}; {near(name, around)}")


def _selection(tag: str | None, base: str | None, method: str | None) -> Selection:
    if base is not None:
        check_digest(base, "base")
    return Selection(tag, base, method)


def _now() -> int:
    return time.time_ns() // 1000

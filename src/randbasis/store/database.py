"""One SQLite file: its schema, its connections, its transactions, and its errors in this package's words."""

import os
import sqlite3
import time
import warnings
from collections import deque
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from randbasis.errors import (
    LocationError,
    RandbasisError,
    StoreAccessError,
    StoreClosedError,
    StoreDamagedError,
    StoreFormatError,
    StoreLockedError,
    StoreMissingError,
    StoreOptionError,
    StoreVersionError,
)
from randbasis.files.locations import local_path
from randbasis.files.saving import not_saved
from randbasis.files.whole_file import flush_directory

APPLICATION = int.from_bytes(b"rbas")
"""``PRAGMA application_id``: what tells a store from any other SQLite file."""
SCHEMA_VERSION = 1
"""``PRAGMA user_version``: the schema that is written, and the only one that is read."""
PAGE_BYTES = 8192
"""A content of 10 KB fills a third of such a page and one page beside the table: 6 % are lost."""
CACHE_KIB = 16 << 10
"""Of one connection; the operating system caches the file beside it."""
WAL_PAGES = 8192
"""Pages (64 MiB) in the log after which a writer moves them into the file: few syncs in long runs of additions."""

# A content has a number of its own so that the one index in random order, by digest, stays small. The list needs no
# look at the contents, which is why digest and size stand beside the name too.
TABLES = """
CREATE TABLE blobs (
  id INTEGER PRIMARY KEY,
  digest BLOB NOT NULL UNIQUE CHECK (length(digest) = 32),
  content BLOB NOT NULL
);
CREATE TABLE adapters (
  name TEXT NOT NULL,
  version INTEGER NOT NULL CHECK (version > 0),
  blob INTEGER NOT NULL REFERENCES blobs (id),
  digest BLOB NOT NULL,
  method TEXT NOT NULL,
  base BLOB NOT NULL,
  created INTEGER NOT NULL,
  bytes INTEGER NOT NULL,
  tags TEXT NOT NULL,
  PRIMARY KEY (name, version)
) WITHOUT ROWID;
CREATE INDEX adapters_by_blob ON adapters (blob);
CREATE INDEX adapters_by_base ON adapters (base, name, version);
CREATE INDEX adapters_by_method ON adapters (method, name, version);
CREATE TABLE tagged (
  tag TEXT NOT NULL,
  name TEXT NOT NULL,
  version INTEGER NOT NULL,
  PRIMARY KEY (tag, name, version)
) WITHOUT ROWID;
CREATE TABLE retired (
  name TEXT PRIMARY KEY,
  version INTEGER NOT NULL
) WITHOUT ROWID;
"""

_RETRY_SECONDS = 0.01
_LOCKED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_NO_ACCESS = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH}
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT}
_NOT_WRITTEN = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}


class Database:
    """The file and the connections of this process to it.

    A connection is used by one call at a time; there are as many as there were calls at once. Connections do not cross
    a fork: the child opens its own. A file that nobody may write here is read as it stands, which is said once.

    Args:
        path: of the file.
        create: make the file where there is none.
        timeout: seconds to wait for another writer.

    Raises:
        LocationError: the path is a URL.
        StoreMissingError: there is no file, or an empty one, and ``create`` is not given, or no folder to put it in.
        StoreFormatError: the file is not a store.
        StoreVersionError: it is a store of another schema.
        StoreLockedError: another process kept it locked.
        StoreAccessError: it cannot be opened or written with the rights that there are.
    """

    def __init__(self, path: str | Path, *, create: bool, timeout: float) -> None:
        if not 0 <= timeout <= 1e6:
            raise StoreOptionError(f"timeout must be seconds from 0 to a million, got {timeout!r}; 30 is the usual one")
        local = local_path(path)
        if local is None:
            raise LocationError(
                f"a store must be a file of this machine, got {str(path)!r}; import it into one, or export one to there"
            )
        self.path = local
        self.timeout = timeout
        self._source: str | Path = local
        self._process = os.getpid()
        self._idle: deque[sqlite3.Connection] = deque()
        self._of_parent: list[deque[sqlite3.Connection]] = []
        self._closed = False
        self._check_place(create)
        with ExitStack() as on_failure:
            on_failure.callback(self.close)
            with self._own_words():
                self._open(create)
            on_failure.pop_all()

    def close(self) -> None:
        """Close all connections; the last one to the file moves its log into it."""
        self._closed = True
        while self._process == os.getpid() and self._idle:
            self._idle.pop().close()

    @contextmanager
    def reading(self) -> Generator[sqlite3.Connection]:
        """A connection, outside of a transaction: each statement sees one state of the store.

        Raises:
            RandbasisError: as the class says, and :class:`~randbasis.errors.StoreClosedError`.
        """
        with self._own_words(), self._borrowed() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Generator[sqlite3.Connection]:
        """A connection inside a transaction, which is on the disk when the block ends and void when it raises.

        Raises:
            RandbasisError: as the class says, :class:`~randbasis.errors.StoreClosedError`, and
                :class:`~randbasis.errors.SaveError` when the disk is full.
        """
        with self._own_words(), self._borrowed() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    # --- opening ---

    def _open(self, create: bool) -> None:
        try:
            with self._borrowed() as connection:
                self._check_schema(connection, create)
        except sqlite3.OperationalError as error:
            readable = os.access(self.path, os.R_OK) and self.path.stat().st_size
            if _code(error) not in _NO_ACCESS or not readable:
                raise
            while self._idle:
                self._idle.pop().close()
            self._as_it_stands()
            with self._borrowed() as connection:
                self._check_schema(connection, False)

    def _as_it_stands(self) -> None:
        """From now on, read the file without the two beside it that a reader shares with writers.

        With a log beside it that is not empty the file alone is not the newest state: then SQLite may read both, where
        it can, but not the file without its log.
        """
        log = self.path.with_name(f"{self.path.name}-wal")
        left = log.exists() and log.stat().st_size > 0
        self._source = f"{self.path.absolute().as_uri()}?mode=ro{'' if left else '&immutable=1'}"
        warnings.warn(
            f"{self.path} lies where nothing can be written: it is read as it stands and must not change meanwhile",
            stacklevel=5,
        )

    def _check_place(self, create: bool) -> None:
        if self.path.is_dir():
            raise StoreFormatError(f"a store must be a file, {str(self.path)!r} is a directory; name a file in it")
        if not self.path.exists() and not create:
            raise StoreMissingError(
                f"there is no store {str(self.path)!r}; `randbasis store add` or `import` makes one"
            )
        if not self.path.parent.is_dir():
            raise StoreMissingError(f"there is no folder {str(self.path.parent)!r} for the store; make it first")

    def _check_schema(self, connection: sqlite3.Connection, create: bool) -> None:
        if _number(connection, "schema_version") == 0 and _number(connection, "application_id") == 0:
            if not create:
                raise StoreMissingError(f"{self.path} must hold a store, it is empty; `randbasis store add` makes one")
            self._make_schema(connection)
        if _number(connection, "application_id") != APPLICATION:
            raise StoreFormatError(
                f"{self.path} must be a store of randbasis, it is an SQLite file of something else; name another file"
            )
        if (found := _number(connection, "user_version")) != SCHEMA_VERSION:
            raise StoreVersionError(
                f"{self.path} must have schema {SCHEMA_VERSION} to be read by this version of randbasis, it has "
                f"{found}; use the version that wrote it, or export there and import here"
            )

    def _make_schema(self, connection: sqlite3.Connection) -> None:
        """The whole schema in one transaction; who comes second finds it made."""
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        self._log_ahead(connection)
        connection.execute("BEGIN IMMEDIATE")
        if _number(connection, "schema_version") == 0:
            for statement in TABLES.split(";")[:-1]:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
        flush_directory(self.path.parent)

    def _log_ahead(self, connection: sqlite3.Connection) -> None:
        """Switch to WAL, which does not wait by itself for another process that does the same."""
        until = time.monotonic() + self.timeout
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                if _code(error) not in _LOCKED or time.monotonic() > until:
                    raise
                time.sleep(_RETRY_SECONDS)
            else:
                return

    # --- connections ---

    @contextmanager
    def _borrowed(self) -> Generator[sqlite3.Connection]:
        if self._closed:
            raise StoreClosedError(f"{self.path} was closed; open it again with AdapterStore({str(self.path)!r})")
        if self._process != os.getpid():  # closing here what the parent uses would break its locks
            self._of_parent.append(self._idle)
            self._idle, self._process = deque(), os.getpid()
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        try:
            yield connection
        finally:
            if self._closed:
                connection.close()
            else:
                self._idle.append(connection)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._source,
            timeout=self.timeout,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=64,
            uri=self._source is not self.path,
        )
        try:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA fullfsync = ON")  # macOS: a sync that the drive's own cache does not swallow
            connection.execute("PRAGMA checkpoint_fullfsync = ON")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            connection.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
            connection.execute(f"PRAGMA journal_size_limit = {WAL_PAGES * PAGE_BYTES}")
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    # --- errors ---

    @contextmanager
    def _own_words(self) -> Generator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if (named := self._named(error, _code(error))) is None:
                raise
            raise named from error

    def _named(self, error: sqlite3.DatabaseError, code: int) -> RandbasisError | None:
        if code in _LOCKED:
            return StoreLockedError(
                f"{self.path} must become free within timeout={self.timeout:g} s, another process kept it locked "
                f"({error}); try again, or open the store with a longer timeout"
            )
        if code in _NO_ACCESS:
            return StoreAccessError(
                f"{self.path} and its folder must be readable and writable, got: {error}; change the rights, or use "
                "a copy"
            )
        if code in _NOT_WRITTEN:
            return not_saved(self.path, error, "the store is as it was")
        if code == sqlite3.SQLITE_NOTADB:
            return StoreFormatError(f"{self.path} must be a store of randbasis, got: {error}; name another file")
        if code in _DAMAGED:
            return StoreDamagedError(
                f"{self.path} must be a sound SQLite file with all its tables, got: {error}; take a copy, then "
                "`randbasis store export` what can still be read into a new store"
            )
        return None


def _number(connection: sqlite3.Connection, pragma: str) -> int:
    return connection.execute(f"PRAGMA {pragma}").fetchone()[0]


def _code(error: sqlite3.Error) -> int:
    """The primary code, without the details in the upper bits."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_MISUSE) & 0xFF

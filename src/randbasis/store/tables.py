"""The statements: what reads and changes the tables, on a connection that the caller holds."""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from randbasis.errors import ImportConflictError, StoreDamagedError
from randbasis.store.records import Freed, Record, Selection, StoredAdapter

LAST_VERSION = (1 << 63) - 1
"""Above every version: the place after all versions of a name."""

_COLUMNS = "a.name, a.version, a.digest, a.method, a.base, a.created, a.bytes, a.tags"


@dataclass(frozen=True, slots=True)
class Content:
    """Checked bytes of a packed file, and what the store says of them.

    Attributes:
        data: the bytes.
        digest: their SHA-256.
        method: name of the method.
        base: fingerprint of the base model.
    """

    data: bytes
    digest: bytes
    method: str
    base: bytes


def record_of(row: Sequence[Any]) -> Record:
    """A record from the columns of ``adapters`` in the order in which this module asks for them."""
    name, version, digest, method, base, created, size, tags = row
    return Record(name, version, digest.hex(), method, base.hex(), created, size, tuple(json.loads(tags)))


# --- reading ---


def find(connection: sqlite3.Connection, name: str, version: int | None) -> Record | None:
    """One version; the newest where None is named."""
    where, values = _named(name, version)
    row = connection.execute(f"SELECT {_COLUMNS} FROM adapters a WHERE {where}", values).fetchone()
    return None if row is None else record_of(row)


def load(connection: sqlite3.Connection, name: str, version: int | None) -> StoredAdapter | None:
    """One version with its content, hashed again.

    Raises:
        StoreDamagedError: the content is not what was put in.
    """
    where, values = _named(name, version)
    row = connection.execute(
        f"SELECT {_COLUMNS}, b.content FROM adapters a LEFT JOIN blobs b ON b.id = a.blob WHERE {where}", values
    ).fetchone()
    return None if row is None else _stored(row)


def load_digest(connection: sqlite3.Connection, digest: bytes) -> StoredAdapter | None:
    """A content by its hash, with the first of the versions that have it.

    Raises:
        StoreDamagedError: the content is not what was put in.
    """
    row = connection.execute(
        f"SELECT {_COLUMNS}, b.content FROM blobs b JOIN adapters a ON a.blob = b.id WHERE b.digest = ? "
        "ORDER BY a.name, a.version LIMIT 1",
        (digest,),
    ).fetchone()
    return None if row is None else _stored(row)


def page_statement(selection: Selection, *, newest: bool) -> str:
    """The statement of a page: it follows an index from where the last page ended and sorts nothing.

    Args:
        selection: decides which index.
        newest: leave out versions that have a newer one.
    """
    place, wheres = "a", list[str]()
    tables = "adapters a"
    if selection.tag is not None:
        place, tables = "t", "tagged t CROSS JOIN adapters a ON a.name = t.name AND a.version = t.version"
        wheres.append("t.tag = :tag")
    wheres += [f"a.{key} = :{key}" for key in ("base", "method") if getattr(selection, key) is not None]
    wheres.append(f"({place}.name, {place}.version) > (:name, :version)")
    if newest:
        wheres.append("NOT EXISTS (SELECT 1 FROM adapters n WHERE n.name = a.name AND n.version > a.version)")
    order = f"{place}.name, {place}.version"
    return f"SELECT {_COLUMNS} FROM {tables} WHERE {' AND '.join(wheres)} ORDER BY {order} LIMIT :limit"


def page(
    connection: sqlite3.Connection, selection: Selection, after: tuple[str, int], limit: int, *, newest: bool
) -> list[Record]:
    """Records in the order of name and version, from the one after ``after``."""
    values = _page_values(selection, after, limit)
    return [record_of(row) for row in connection.execute(page_statement(selection, newest=newest), values).fetchall()]


def count(connection: sqlite3.Connection, selection: Selection, *, newest: bool) -> int:
    """How many records there are."""
    statement = f"SELECT count(*) FROM ({page_statement(selection, newest=newest)})"
    return connection.execute(statement, _page_values(selection, ("", 0), -1)).fetchone()[0]


def versions(connection: sqlite3.Connection, name: str, before: int, limit: int) -> list[Record]:
    """The versions of an adapter below one, newest first."""
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM adapters a WHERE name = ? AND version < ? ORDER BY version DESC LIMIT ?",
        (name, before, limit),
    )
    return [record_of(row) for row in rows.fetchall()]


def names_around(connection: sqlite3.Connection, place: str, limit: int) -> list[str]:
    """Names that come next before and after a place in their order, as many of each; few names are all of them."""
    found: list[str] = []
    for side, order in (("<", "DESC"), (">=", "ASC")):
        statement = f"SELECT DISTINCT name FROM adapters WHERE name {side} ? ORDER BY name {order} LIMIT ?"
        found += [name for (name,) in connection.execute(statement, (place, limit)).fetchall()]
    return found


def names_with_more(connection: sqlite3.Connection, keep: int, after: str, limit: int) -> list[str]:
    """Names that have more versions than ``keep``, in order."""
    rows = connection.execute(
        "SELECT name FROM adapters WHERE name > ? GROUP BY name HAVING count(*) > ? ORDER BY name LIMIT ?",
        (after, keep, limit),
    )
    return [name for (name,) in rows.fetchall()]


# --- writing ---


def insert(connection: sqlite3.Connection, name: str, tags: tuple[str, ...], content: Content, created: int) -> Record:
    """Put a content in as the next version of a name."""
    version, size = _next_version(connection, name), len(content.data)
    record = Record(name, version, content.digest.hex(), content.method, content.base.hex(), created, size, tags)
    _write(connection, record, _blob(connection, content))
    return record


def restore(connection: sqlite3.Connection, record: Record, content: Content) -> bool:
    """Put a version in as another store had it; False where it is there already.

    Raises:
        ImportConflictError: there is another one under its name and number.
    """
    if is_there(connection, record):
        return False
    _write(connection, record, _blob(connection, content))
    return True


def is_there(connection: sqlite3.Connection, record: Record) -> bool:
    """Whether a version is there exactly so.

    Raises:
        ImportConflictError: there is another one under its name and number.
    """
    found = find(connection, record.name, record.version)
    if found is not None and found != record:
        key = next(key for key, value in found.as_json().items() if value != record.as_json()[key])
        raise ImportConflictError(
            f"version {record.version} of {record.name!r} must be the same here and there, got another {key} "
            f"({found.as_json()[key]!r} here, {record.as_json()[key]!r} there); import under a prefix, or elsewhere"
        )
    return found is not None


def repeat(connection: sqlite3.Connection, record: Record, created: int) -> Record:
    """Make a version that is there the newest one, under the next number."""
    (content,) = connection.execute(
        "SELECT blob FROM adapters WHERE name = ? AND version = ?", (record.name, record.version)
    ).fetchone()
    again = replace(record, version=_next_version(connection, record.name), created=created)
    _write(connection, again, content)
    return again


def retag(connection: sqlite3.Connection, record: Record, tags: tuple[str, ...]) -> Record:
    """Give a version other tags."""
    key = (record.name, record.version)
    old, new = {*record.tags} - {*tags}, {*tags} - {*record.tags}
    connection.executemany(
        "DELETE FROM tagged WHERE tag = ? AND name = ? AND version = ?", [(tag, *key) for tag in old]
    )
    connection.executemany("INSERT INTO tagged VALUES (?, ?, ?)", [(tag, *key) for tag in new])
    text = json.dumps(tags, ensure_ascii=False)
    connection.execute("UPDATE adapters SET tags = ? WHERE name = ? AND version = ?", (text, *key))
    return replace(record, tags=tags)


def delete(connection: sqlite3.Connection, name: str, numbers: Iterable[int]) -> Freed:
    """Take versions out, and the contents that no other version has; their numbers are never given again."""
    freed = Freed()
    for number in numbers:
        key = (name, number)
        blob, size, tags = connection.execute(
            "SELECT blob, bytes, tags FROM adapters WHERE name = ? AND version = ?", key
        ).fetchone()
        connection.executemany(
            "DELETE FROM tagged WHERE tag = ? AND name = ? AND version = ?", [(tag, *key) for tag in json.loads(tags)]
        )
        connection.execute("DELETE FROM adapters WHERE name = ? AND version = ?", key)
        connection.execute(
            "INSERT INTO retired SELECT ?1, ?2 WHERE NOT EXISTS "
            "(SELECT 1 FROM adapters WHERE name = ?1 AND version > ?2) "
            "ON CONFLICT (name) DO UPDATE SET version = max(version, excluded.version)",
            key,
        )
        gone = connection.execute(
            "DELETE FROM blobs WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM adapters WHERE blob = ?1)", (blob,)
        ).rowcount
        freed += Freed(1, gone, gone * size)
    return freed


def _page_values(selection: Selection, after: tuple[str, int], limit: int) -> dict[str, Any]:
    base = None if selection.base is None else bytes.fromhex(selection.base)
    name, version = after
    return {
        "tag": selection.tag,
        "base": base,
        "method": selection.method,
        "name": name,
        "version": version,
        "limit": limit,
    }


def _named(name: str, version: int | None) -> tuple[str, tuple[str] | tuple[str, int]]:
    if version is None:
        return "a.name = ? ORDER BY a.version DESC LIMIT 1", (name,)
    return "a.name = ? AND a.version = ?", (name, version)


def _stored(row: Sequence[Any]) -> StoredAdapter:
    record = record_of(row[:-1])
    data: bytes = row[-1] or b""
    if (found := hashlib.sha256(data).hexdigest()) != record.digest:
        raise StoreDamagedError(
            f"version {record.version} of {record.name!r} must have a content of digest {record.digest}, got {found}; "
            "the store was damaged: roll back to another version, or add this one again from its file"
        )
    return StoredAdapter(record, data)


def _next_version(connection: sqlite3.Connection, name: str) -> int:
    newest, retired = connection.execute(
        "SELECT (SELECT max(version) FROM adapters WHERE name = ?1), (SELECT version FROM retired WHERE name = ?1)",
        (name,),
    ).fetchone()
    return 1 + max(newest or 0, retired or 0)


def _blob(connection: sqlite3.Connection, content: Content) -> int:
    """The number of a content, put in where it is new, and put right where it was damaged."""
    row = connection.execute(
        "SELECT id, content = ?2 FROM blobs WHERE digest = ?1", (content.digest, content.data)
    ).fetchone()
    if row is not None:
        number, same = row
        if not same:
            connection.execute("UPDATE blobs SET content = ? WHERE id = ?", (content.data, number))
        return number
    added = connection.execute("INSERT INTO blobs (digest, content) VALUES (?, ?)", (content.digest, content.data))
    return added.lastrowid or 0


def _write(connection: sqlite3.Connection, record: Record, blob: int) -> None:
    connection.execute(
        "INSERT INTO adapters VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            record.name,
            record.version,
            blob,
            bytes.fromhex(record.digest),
            record.method,
            bytes.fromhex(record.base),
            record.created,
            record.bytes,
            json.dumps(record.tags, ensure_ascii=False),
        ),
    )
    connection.executemany(
        "INSERT INTO tagged VALUES (?, ?, ?)", [(tag, record.name, record.version) for tag in record.tags]
    )

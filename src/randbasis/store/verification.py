"""A whole store held against its own hashes."""

import hashlib
from collections import Counter

from randbasis.store.database import Database
from randbasis.store.records import Checked, Progress

BATCH = 256
"""Contents in memory at a time."""
EXAMPLES = 100
"""Problems that are put in words."""

_RECORDS = """
SELECT a.name, a.version, b.digest IS a.digest, length(b.content) IS a.bytes,
  (SELECT count(*) FROM json_each(a.tags) j WHERE NOT EXISTS
    (SELECT 1 FROM tagged t WHERE t.tag = j.value AND t.name = a.name AND t.version = a.version))
FROM adapters a LEFT JOIN blobs b ON b.id = a.blob
WHERE (a.name, a.version) > (?, ?) ORDER BY a.name, a.version LIMIT ?
"""
_STRAY = {
    "content that no version has": """
SELECT hex(digest) FROM blobs b WHERE NOT EXISTS (SELECT 1 FROM adapters WHERE blob = b.id)""",
    "tag of a version that is not there": """
SELECT tag || ' of ' || name || ' version ' || version FROM tagged t
WHERE NOT EXISTS (SELECT 1 FROM adapters a WHERE a.name = t.name AND a.version = t.version)""",
}


class _Findings:
    def __init__(self) -> None:
        self.problems: Counter[str] = Counter()
        self.examples: list[str] = []

    def add(self, kind: str, what: str) -> None:
        self.problems[kind] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{kind}: {what}")


def verify(database: Database, progress: Progress | None) -> Checked:
    """See :meth:`randbasis.store.AdapterStore.verify`. Memory does not grow with the store."""
    findings = _Findings()
    blobs, size = _contents(database, findings, progress)
    count = _records(database, findings)
    with database.reading() as connection:
        for kind, statement in _STRAY.items():
            for (what,) in connection.execute(statement).fetchmany(EXAMPLES):
                findings.add(kind, what.lower())
        for (what,) in connection.execute(f"PRAGMA integrity_check({EXAMPLES})").fetchall():
            if what != "ok":
                findings.add("structure of the file", what)
    return Checked(count, blobs, size, dict(findings.problems), tuple(findings.examples))


def _contents(database: Database, findings: _Findings, progress: Progress | None) -> tuple[int, int]:
    """Hash every content; their number and bytes."""
    last, count, size = 0, 0, 0
    with database.reading() as connection:
        (total,) = connection.execute("SELECT count(*) FROM blobs").fetchone()
        while rows := connection.execute(
            "SELECT id, digest, content FROM blobs WHERE id > ? ORDER BY id LIMIT ?", (last, BATCH)
        ).fetchall():
            for _, digest, content in rows:
                size += len(content)
                if hashlib.sha256(content).digest() != digest:
                    findings.add("content that is not what its hash was taken of", digest.hex())
            last = rows[-1][0]
            count += len(rows)
            if progress is not None:
                progress(count, max(count, total))
    return count, size


def _records(database: Database, findings: _Findings) -> int:
    """Hold every record against its content and its tags; their number."""
    last, count = ("", 0), 0
    with database.reading() as connection:
        while rows := connection.execute(_RECORDS, (*last, BATCH)).fetchall():
            for name, version, same_digest, same_size, missing_tags in rows:
                what = f"{name} version {version}"
                if not same_digest or not same_size:
                    findings.add("version without the content that it names", what)
                if missing_tags:
                    findings.add("version that its tags do not find", what)
            last = rows[-1][:2]
            count += len(rows)
    return count

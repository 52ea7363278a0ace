"""The manifest of an exported folder: one JSON document a line, a record each, between a first and a last line."""

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TextIO

from randbasis.adapter_file.header import parse_object
from randbasis.errors import ManifestError, StoreNameError, StoreOptionError
from randbasis.store.names import check_adapter_name, check_count, check_digest, check_tags
from randbasis.store.records import Record

MANIFEST = "manifest.jsonl"
"""Name of the manifest in the folder."""
LINE_LIMIT = 1 << 20
"""Longest line in characters that is read."""

_FIRST = {"format": "randbasis-store", "version": 1}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def content_name(digest: str) -> str:
    """Where a content lies in an exported folder: named by its hash, 256 folders below one."""
    return f"adapters/{digest[:2]}/{digest}.safetensors"


def write_first(file: TextIO) -> None:
    """Begin a manifest."""
    _write(file, _FIRST)


def write_record(file: TextIO, record: Record) -> None:
    """Add a version."""
    _write(file, record.as_json())


def write_last(file: TextIO, count: int) -> None:
    """End a manifest, without which it counts as cut off, and bring it to the disk."""
    _write(file, {"adapters": count})
    file.flush()
    os.fsync(file.fileno())


def read_manifest(path: Path, folder: str) -> Iterator[Record]:
    """The records of an exported folder, one line in memory at a time.

    Args:
        path: of the manifest, on this machine.
        folder: path or URL, for messages.

    Raises:
        ManifestError: there is no manifest, it is cut off, or a line is not what it has to be.
    """
    if not path.is_file():
        raise ManifestError(f"{folder} must have a {MANIFEST}, got none; let `randbasis store export` run to its end")
    where = f"{folder}/{MANIFEST}"
    count, last = 0, ("", 0)
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        if _parse(file.readline(LINE_LIMIT), where, 1) != _FIRST:
            raise _wrong(where, 1, f"{json.dumps(_FIRST)}, as this version of randbasis writes and reads it", "another")
        while line := file.readline(LINE_LIMIT):
            document = _parse(line, where, count + 2)
            if document.keys() == {"adapters"}:
                if document["adapters"] != count or file.read(1):
                    raise _wrong(where, count + 2, f"the last, of {count} versions", document)
                return
            count += 1
            record = _record(document, where, count + 1)
            if (record.name, record.version) <= last:
                raise _wrong(where, count + 1, f"after {last} in order", (record.name, record.version))
            last = record.name, record.version
            yield record
    raise _wrong(where, count + 2, 'the last, {"adapters": NUMBER}', "nothing: the file is cut off")


def _write(file: TextIO, document: dict[str, Any]) -> None:
    file.write(json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n")


def _parse(line: str, where: str, number: int) -> dict[str, Any]:
    try:
        return parse_object(line)
    except ValueError as error:
        raise _wrong(where, number, f"a JSON object ({error})", line[:60]) from error


def _record(document: dict[str, Any], where: str, number: int) -> Record:
    try:
        record = Record(
            check_adapter_name(document["name"]),
            check_count(document["version"], "version"),
            check_digest(document["digest"]).hex(),
            str(document["method"]),
            check_digest(document["base"], "base").hex(),
            (datetime.fromisoformat(document["created"]) - _EPOCH) // timedelta(microseconds=1),
            check_count(document["bytes"], "bytes"),
            check_tags(document["tags"]),
        )
        again = record.as_json()
    except (StoreNameError, StoreOptionError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise _wrong(where, number, f"a version of an adapter ({type(error).__name__}: {error})", document) from error
    if again != document:
        raise _wrong(where, number, "a version of an adapter as randbasis writes it", document)
    return record


def _wrong(where: str, number: int, rule: str, found: object) -> ManifestError:
    shown = repr(found)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}…"
    return ManifestError(f"{where}: line {number} must be {rule}, got {shown}; export again")

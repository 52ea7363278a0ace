"""Who may ask for which adapters, and how fast: a small file of hashed keys.

A key is 256 random bits, shown once. The file has its SHA-256 alone: nobody can guess one, so that a slow hash, as
passwords need it, would protect nothing and cost every request. The file is read again when it changed.
"""

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import sqlite3
import threading
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

from randbasis.errors import KeysError, near
from randbasis.files.whole_file import whole_file
from randbasis.serve.limits import Rate
from randbasis.serve.settings import ADMIN, READ, ROLES

FORMAT = 1
LOCK_SECONDS = 30.0
"""How long a change waits for another one."""
_LOG = logging.getLogger("randbasis.serve")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PREFIX = "rb-"


@dataclass(frozen=True, slots=True)
class Key:
    """One client.

    Attributes:
        name: what it is called in the log and in the file.
        hash: SHA-256 of the secret, in hexadecimal.
        adapters: patterns of the names that it may ask for; ``*`` stands for any characters, slashes too. The base is
            asked for by its name like an adapter.
        rate: how fast, None for as fast as it likes.
        role: ``"admin"`` may load and unload adapters, too.
    """

    name: str
    hash: str
    adapters: tuple[str, ...]
    rate: Rate | None = None
    role: str = READ

    def may_use(self, adapter: str) -> bool:
        """Whether it may ask for an adapter of this name."""
        return any(fnmatchcase(adapter, pattern) for pattern in self.adapters)

    def as_json(self) -> dict[str, Any]:
        """Plain values, without the hash."""
        rate = None if self.rate is None else self.rate.text
        return {"name": self.name, "adapters": [*self.adapters], "rate": rate, "role": self.role}


ANYBODY = Key("anybody", "", ("*",), None, ADMIN)
"""Who asks where there is no file of keys."""


def make_key(name: str, adapters: Sequence[str], rate: str | None = None, role: str = READ) -> tuple[Key, str]:
    """A new key and its secret, which is nowhere else.

    Raises:
        KeysError: a part of it cannot be what it is.
    """
    secret = _PREFIX + secrets.token_urlsafe(32)
    hashed = _hash(secret)
    return _checked(Key(name, hashed, tuple(adapters), None if rate is None else Rate.parse(rate), role)), secret


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file; none where there is no file.

    Raises:
        KeysError: it is no file of keys.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise KeysError(f"{str(path)!r} must be a file of keys that can be read, got: {error}") from error
    try:
        document = json.loads(text)
        if document["format"] != FORMAT:
            raise KeysError(f"{str(path)!r} must have format {FORMAT}, got {document['format']!r}; upgrade randbasis")
        keys = tuple(_of_json(one) for one in document["keys"])
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        way_out = "make one with `randbasis keys add`"
        raise KeysError(
            f"{str(path)!r} must be a file of keys, got {type(error).__name__}: {error}; {way_out}"
        ) from error
    if len({one.name for one in keys}) < len(keys):
        raise KeysError(f"{str(path)!r} must have each name once; take one of the doubles out")
    return keys


def write_keys(path: Path, keys: Sequence[Key]) -> None:
    """Write a file of keys, whole or not at all, which its owner alone can read.

    Raises:
        SaveError: the operating system refused.
    """
    document = {"format": FORMAT, "keys": [one.as_json() | {"hash": one.hash} for one in keys]}
    with whole_file(path, overwrite=True) as temporary:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(json.dumps(document, indent=1) + "\n")
        temporary.chmod(0o600)


def add_key(path: Path, name: str, adapters: Sequence[str], rate: str | None, role: str) -> tuple[Key, str]:
    """Add a key to a file, which is made where there is none; the key and its secret.

    Raises:
        KeysError: there is one of this name, or a part of it cannot be what it is.
        SaveError: the file cannot be written.
    """
    key, secret = make_key(name, adapters, rate, role)
    with _alone(path):
        keys = read_keys(path)
        if name in {one.name for one in keys}:
            raise KeysError(f"name must be new, {name!r} is in {str(path)!r}; remove it first, or take another")
        write_keys(path, [*keys, key])
    return key, secret


def remove_key(path: Path, name: str) -> Key:
    """Take a key out of a file.

    Raises:
        KeysError: there is none of this name.
        SaveError: the file cannot be written.
    """
    with _alone(path):
        keys = read_keys(path)
        gone = next((one for one in keys if one.name == name), None)
        if gone is None:
            raise KeysError(f"{str(path)!r} has no key {name!r}; {near(name, [one.name for one in keys])}")
        write_keys(path, [one for one in keys if one is not gone])
    return gone


@contextmanager
def _alone(path: Path) -> Generator[None]:
    """A block that no other process is in for the same file: else one of two changes would be lost.

    The lock is one of SQLite on a file beside it, which every system has and which ends with its process.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        connection = sqlite3.connect(lock, timeout=LOCK_SECONDS, isolation_level=None)
        with closing(connection):
            connection.execute("BEGIN EXCLUSIVE")
            yield
    except sqlite3.Error as error:
        raise KeysError(
            f"{str(path)!r} must be changed by one at a time, and {str(lock)!r} could not be locked: {error}; see that "
            "the folder is there and can be written, and try again"
        ) from error


class KeyRing:
    """The keys of a file as they are now.

    Where there never was a file, anybody may ask for anything. Once there was one, every request needs a key: also
    when the last is removed, or the file goes or cannot be read, which then is told in the log.

    Args:
        path: of the file; None for no keys.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self._lock = threading.Lock()
        self._seen: object = None
        self._keys: tuple[Key, ...] = ()
        self._needed = False
        if path is not None:
            self._seen, self._keys = self._mark(), read_keys(path)
            self._needed = self._seen is not None

    @property
    def needed(self) -> bool:
        """Whether a key has to be given."""
        self._look()
        return self._needed

    def find(self, secret: str | None) -> Key | None:
        """Whose secret it is; None where it is nobody's and one is needed.

        Every key is compared, each in constant time, so that the time does not tell how near a guess was.
        """
        self._look()
        if not self._needed:
            return ANYBODY
        hashed = _hash(secret or "")
        found = None
        for one in self._keys:
            if hmac.compare_digest(one.hash, hashed):
                found = one
        return found if secret else None

    def _mark(self) -> object:
        with suppress(OSError):
            stat = os.stat(cast("Path", self._path))
            return stat.st_mtime_ns, stat.st_size, stat.st_ino
        return None

    def _look(self) -> None:
        if self._path is None or (mark := self._mark()) == self._seen:
            return
        with self._lock:
            try:
                keys = read_keys(self._path)
            except KeysError as error:
                _LOG.error("the keys stay as they were: %s", error)
            else:
                self._keys, self._needed = keys, self._needed or mark is not None
            self._seen = mark


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()


def _of_json(value: dict[str, Any]) -> Key:
    rate = value.get("rate")
    adapters = value["adapters"]
    if not isinstance(adapters, list):  # of a text the letters would be taken, a * among them
        raise KeysError(f"adapters must be a list of patterns, got {adapters!r}; write [{json.dumps(adapters)}]")
    key = Key(value["name"], value["hash"], tuple(cast("list[str]", adapters)), None, value["role"])
    return _checked(key if rate is None else replace(key, rate=Rate.parse(rate)))


def _checked(key: Key) -> Key:
    if not _NAME.fullmatch(key.name):
        raise KeysError(f"name must be letters, digits and any of . _ -, at most 64, got {key.name!r}")
    if key.role not in ROLES:
        raise KeysError(f"role must be one of {', '.join(ROLES)}, got {key.role!r}")
    if not key.adapters or not all(isinstance(one, str) and one for one in cast("Sequence[object]", key.adapters)):
        raise KeysError(f"adapters must be at least one pattern, such as 'acme/*', got {[*key.adapters]}")
    if not re.fullmatch(r"[0-9a-f]{64}", key.hash):
        raise KeysError(f"hash of the key {key.name!r} must be 64 hexadecimal digits; add the key anew")
    return key

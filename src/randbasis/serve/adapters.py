"""NAME → LEASE: which adapter a name means now, and the right to use it until the answer ends.

A name means the newest version that the store has when a request comes; ``NAME@VERSION`` means that one. Each version
is resident under a name of its own, so that requests that run keep theirs, and the rows of old versions go when nobody
leases them any more. What an admin loaded from a file stands before the store.
"""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from randbasis.errors import (
    AdapterRefusedError,
    AnswerError,
    BankFullError,
    NotStoredError,
    RandbasisError,
    StoreAccessError,
    StoreLockedError,
)
from randbasis.store import AdapterStore

_VERSION = re.compile(r"(?P<name>.+)@(?P<version>[1-9][0-9]{0,17})")
_BUSY = (StoreLockedError, StoreAccessError, BankFullError)
"""What the store or the bank is at fault for, and no adapter."""


class Bank(Protocol):
    """What is needed of a bank here."""

    def load(self, name: str, source: Any, *, version: int | None = None, pin: bool = False) -> Any:
        """Make an adapter resident."""
        ...

    def unload(self, name: str) -> Any:
        """Take it out; leases keep it."""
        ...

    def lease(self, name: str) -> Any:
        """The right to use it."""
        ...

    def __contains__(self, name: object) -> bool: ...


@dataclass(frozen=True, slots=True)
class Named:
    """What a client's word for a model means.

    Attributes:
        word: as it was written.
        name: of the adapter; None for the base.
        version: that was asked for; None for the newest.
    """

    word: str
    name: str | None
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Listed:
    """An adapter as ``/v1/models`` tells it.

    Attributes:
        name: that a client asks with.
        version: the newest; None of one that was loaded from a file.
        method: ``"nola"``, ….
        nbytes: of its packed file.
        created: seconds since 1970.
        resident: whether its newest version is in memory.
    """

    name: str
    version: int | None
    method: str
    nbytes: int
    created: int
    resident: bool


class Adapters:
    """The adapters that a server may answer with.

    Args:
        bank: where they are resident.
        store: where they come from; None for those alone that an admin loads.
        base: the name of the base model.
        folder: below which files may be loaded; None for none.
    """

    def __init__(self, bank: Bank, store: AdapterStore | None, base: str, folder: Path | None = None):
        self._bank = bank
        self._store = store
        self._folder = folder
        self.base = base
        self._lock = threading.Lock()
        self._loaded: dict[str, Listed] = {}
        self._keys: dict[str, str] = {}
        self._newest: dict[str, int] = {}

    def named(self, word: str) -> Named:
        """What a client's ``model`` means: the base's name; ``NAME`` or ``NAME@VERSION``, also behind ``BASE:``."""
        if word == self.base:
            return Named(word, None)
        name = word.removeprefix(f"{self.base}:")
        found = _VERSION.fullmatch(name)
        return Named(word, name) if found is None else Named(word, found["name"], int(found["version"]))

    def lease(self, named: Named) -> Any | None:
        """The right to use what is meant, until it is released; None for the base.

        Raises:
            NotStoredError: there is no such adapter or version.
            AdapterRefusedError: it is there and cannot be served: damaged, or made for another base.
            StoreLockedError: the store is kept locked.
            StoreAccessError: the store cannot be read.
        """
        if named.name is None:
            return None
        key = self._keys.get(named.name) if named.version is None else None
        if key is None:
            key = self._resident_key(named)
        return self._leased(key, named)

    def load(self, name: str, source: str) -> None:
        """Make an adapter of a packed file resident, pinned, under a name that stands before the store's.

        Args:
            name: that clients ask with.
            source: path of a packed file below the folder, or ``store:NAME`` or ``store:NAME@VERSION``.

        Raises:
            AnswerError: the name cannot be one, or files may not be loaded from there.
            NotStoredError: there is no such entry of the store, or no such file.
            AdapterRefusedError: it cannot be served.
        """
        if name == self.base or name.startswith(f"{self.base}:") or _VERSION.fullmatch(name) or not name.strip():
            raise AnswerError(f"lora_name must be a name that is not the base's and has no @VERSION, got {name!r}")
        data = self._content(source)
        digest = hashlib.sha256(data).hexdigest()
        key = f"{name}@{digest[:16]}!"
        with self._refusing(name):
            resident = self._bank.load(key, data, pin=True)
        with self._lock:
            before = self._keys.get(name)
            self._keys[name] = key
            self._loaded[name] = Listed(name, None, resident.spec.method.name, len(data), 0, True)
        if before not in (None, key):
            self._bank.unload(before)

    def unload(self, name: str) -> None:
        """Take out what :meth:`load` made resident; requests that run keep it, and a store's entry shows again.

        Raises:
            NotStoredError: nobody loaded one of this name.
        """
        with self._lock:
            key = self._keys.pop(name, None)
            self._loaded.pop(name, None)
        if key is None:
            raise NotStoredError(f"no adapter {name!r} was loaded; /v1/models lists what there is")
        self._bank.unload(key)

    def listed(self) -> Iterator[Listed]:
        """All of them, by name; what was loaded from a file stands before the store's of the same name."""
        loaded = dict(self._loaded)
        after: str | None = ""
        while self._store is not None and after is not None:
            page = self._store.list(after=after, limit=1000)
            for one in page.records:
                if one.name not in loaded:
                    resident = _key(one.name, one.version) in self._bank
                    yield Listed(one.name, one.version, one.method, one.bytes, one.created // 1_000_000, resident)
            after = page.next
        yield from loaded.values()

    def _resident_key(self, named: Named) -> str:
        """The bank's name of a version, which the store has as asked or as its newest."""
        name = named.name or ""
        if self._store is None:
            raise NotStoredError(f"there is no adapter {name!r}; /v1/models lists what there is")
        record = self._store.record(name, named.version)
        key = _key(name, record.version)
        if named.version is None and record.version > (before := self._newest.get(name, 0)):
            self._newest[name] = record.version
            with suppress(LookupError):
                self._bank.unload(_key(name, before))
        return key

    def _leased(self, key: str, named: Named) -> Any:
        """A lease on what may be evicted between its loading and its lease, but hardly three times."""
        for _ in range(3):
            try:
                return self._bank.lease(key)
            except LookupError:
                self._load(key, named)
        return self._bank.lease(key)

    def _load(self, key: str, named: Named) -> None:
        if self._store is None or named.name is None:
            raise NotStoredError(f"there is no adapter {named.name!r} any more; /v1/models lists what there is")
        with self._refusing(key):
            version = int(key.rpartition("@")[2])
            stored = self._store.get(named.name, version=version)
            self._bank.load(key, stored, version=version)

    def _content(self, source: str) -> bytes:
        if source.startswith("store:"):
            named = self.named(source.removeprefix("store:"))
            if self._store is None or named.name is None:
                raise NotStoredError(f"there is no {source!r}; the server has no such store")
            with self._refusing(source):
                return self._store.get(named.name, version=named.version).data
        if self._folder is None:
            raise AnswerError(
                f"lora_path must be store:NAME or store:NAME@VERSION, got {source!r}; the server was started without "
                "a folder from which files may be loaded (--adapter-folder)"
            )
        try:
            path = (self._folder / source).resolve()
        except ValueError as error:  # a zero byte
            raise AnswerError(f"lora_path must be a path, got {source!r}; name a packed file") from error
        if not path.is_relative_to(self._folder.resolve()):
            raise AnswerError(f"lora_path must be below the server's folder of adapters, got {source!r}; put it there")
        try:
            return path.read_bytes()
        except OSError as error:
            raise NotStoredError(f"there is no file {source!r} that can be read; lora_path names one") from error

    def _refusing(self, name: str) -> "_Refusing":
        return _Refusing(name)


class _Refusing:
    """What is wrong with an adapter is told as that, whatever rule it breaks; what is wrong with the store is not."""

    def __init__(self, name: str):
        self._name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RandbasisError) and not isinstance(error, (*_BUSY, NotStoredError)):
            raise AdapterRefusedError(f"{self._name} cannot be served: {error}") from error


def _key(name: str, version: int) -> str:
    return f"{name}@{version}"

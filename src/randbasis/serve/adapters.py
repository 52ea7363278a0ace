"""NAME → LEASE: which adapter a name means now, and the right to use it until the answer ends.

A name means the newest version that the store has when a request comes; ``NAME@VERSION`` means that one. Each version
is resident under a name of its own, so that requests that run keep theirs, and the rows of old versions go when nobody
leases them any more. What an admin loaded from a file stands before the store.
"""

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
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
from randbasis.serve.live_store import LiveStore
from randbasis.store import AdapterStore, Record

_VERSION = re.compile(r"(?P<name>.+)@(?P<version>[1-9][0-9]{0,17})")
_TRIES = 4
"""How often an adapter is looked for that is evicted between its loading and its lease."""
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
        self._store = None if store is None else LiveStore(store)
        self._folder = folder
        self.base = base
        self._lock = threading.Lock()
        self._loaded: dict[str, Listed] = {}
        self._keys: dict[str, str] = {}
        self._newest: dict[str, Record] = {}

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
            BankFullError: others push it out of memory as soon as it is there.
        """
        if named.name is None:
            return None
        for _ in range(_TRIES):
            loaded = self._keys.get(named.name) if named.version is None else None
            record = None if loaded is not None else self._record(named)
            key = loaded if record is None else _key(record)
            with suppress(LookupError):  # evicted, unloaded or replaced since its name was looked up
                return self._bank.lease(str(key))
            if record is not None:
                self._load(record)
        raise BankFullError(f"{named.word!r} was taken out of memory each time it was loaded; try again in a moment")

    def load(self, name: str, source: str, may_use: Callable[[str], bool]) -> None:
        """Make an adapter of a packed file resident, pinned, under a name that stands before the store's.

        Args:
            name: that clients ask with.
            source: path of a packed file below the folder, or ``store:NAME`` or ``store:NAME@VERSION``.
            may_use: whether who asks may name an adapter of the store.

        Raises:
            AnswerError: the name cannot be one, or files may not be loaded from there.
            NotStoredError: there is no such entry of the store, or no such file.
            AdapterRefusedError: it cannot be served.
        """
        if name == self.base or name.startswith(f"{self.base}:") or _VERSION.fullmatch(name) or not name.strip():
            raise AnswerError(f"lora_name must be a name that is not the base's and has no @VERSION, got {name!r}")
        data = self._content(source, may_use)
        digest = hashlib.sha256(data).hexdigest()
        key = f"{name}@{digest[:16]}!"
        with self._lock:  # for all of it: else another's unloading comes between
            with self._refusing(name):
                resident = self._bank.load(key, data, pin=True)
            before = self._keys.get(name)
            self._keys[name] = key
            self._loaded[name] = Listed(name, None, resident.spec.method.name, len(data), 0, True)
            if before is not None and before != key:
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
            page = self._store.now().list(after=after, limit=1000)
            for one in page.records:
                if one.name not in loaded:
                    resident = _key(one) in self._bank
                    yield Listed(one.name, one.version, one.method, one.bytes, one.created // 1_000_000, resident)
            after = page.next
        yield from loaded.values()

    def _record(self, named: Named) -> Record:
        """What the store says of a version, as asked or its newest; of a new one the one before is taken out."""
        name = named.name or ""
        if self._store is None:
            raise NotStoredError(f"there is no adapter {name!r}; /v1/models lists what there is")
        record = self._store.now().record(name, named.version)
        before = self._newest.get(name)
        if named.version is None and (before is None or (record.version >= before.version and record != before)):
            self._newest[name] = record
            if before is not None and _key(before) != _key(record):
                with suppress(LookupError):
                    self._bank.unload(_key(before))
        return record

    def _load(self, record: Record) -> None:
        assert self._store is not None
        with self._refusing(f"{record.name}@{record.version}"):
            stored = self._store.now().get(record.name, version=record.version)
            self._bank.load(_key(stored.record), stored, version=record.version)

    def _content(self, source: str, may_use: Callable[[str], bool]) -> bytes:
        if source.startswith("store:"):
            named = self.named(source.removeprefix("store:"))
            if self._store is None or named.name is None or not may_use(named.name):
                raise NotStoredError(f"there is no {source!r}; /v1/models lists what there is")
            try:
                with self._refusing(source):
                    return self._store.now().get(named.name, version=named.version).data
            except NotStoredError as error:  # whose own message names what is called alike, other users' too
                raise NotStoredError(f"there is no {source!r}; /v1/models lists what there is") from error
        if self._folder is None:
            raise AnswerError(
                f"lora_path must be store:NAME or store:NAME@VERSION, got {source!r}; the server was started without "
                "a folder from which files may be loaded (--adapter-folder)"
            )
        try:
            path = (self._folder / source).resolve()
        except (ValueError, OSError, RuntimeError) as error:  # a zero byte; links in a ring
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


def _key(record: Record) -> str:
    """The bank's name of a version; with its digest, since another store may take the place of the first."""
    return f"{record.name}@{record.version}:{record.digest[:16]}"

"""``store:NAME`` and ``store:NAME@VERSION``: which entry is meant, and in which store it is looked for."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from randbasis.errors import StoreMissingError
from randbasis.store import AdapterStore, StoredAdapter

STORE_VARIABLE = "RANDBASIS_STORE"
"""Environment variable that names the file of the store behind ``store:NAME``."""
STORE_FILE = "adapters.db"
"""The store in the working directory, where the variable is not set."""
_ENTRY = re.compile(r"store:(?P<name>.*?)(@(?P<version>\d{1,19}))?", re.DOTALL)
_BESIDE = ("", "-wal", "-shm")
"""What SQLite puts behind the name of a store for the files that it keeps beside it."""


@dataclass(frozen=True)
class StoreEntry:
    """An adapter in a store.

    Attributes:
        name: of the adapter.
        version: None for the newest.
    """

    name: str
    version: int | None

    @classmethod
    def named(cls, location: object) -> "StoreEntry | None":
        """The entry that a location names; None where it is no entry of a store."""
        found = _ENTRY.fullmatch(location) if isinstance(location, str) else None
        version = found["version"] if found is not None else None
        return None if found is None else cls(found["name"], None if version is None else int(version))

    @property
    def store(self) -> Path:
        """The file of the store, whether or not it is there."""
        return Path(os.environ.get(STORE_VARIABLE) or STORE_FILE)

    @property
    def files(self) -> list[Path]:
        """Every file of the store."""
        return [self.store.with_name(self.store.name + behind) for behind in _BESIDE]

    def read(self) -> StoredAdapter:
        """The adapter with its content, whose hash is checked.

        Raises:
            StoreMissingError: there is no store.
            NotStoredError: the store has no such adapter or version.
        """
        if not self.store.is_file():
            raise StoreMissingError(
                f"store:{self.name} is looked for in the store that the environment variable {STORE_VARIABLE} names, "
                f"else in {STORE_FILE!r} in the working directory, got "
                f"{STORE_VARIABLE}={os.environ.get(STORE_VARIABLE)!r} and no file at {str(self.store)!r}; "
                "set the variable to the file of a store, or go to where it lies"
            )
        with AdapterStore(self.store, create=False) as store:
            return store.get(self.name, version=self.version)

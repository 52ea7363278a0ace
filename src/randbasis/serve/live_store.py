"""A store whose file may be replaced, as by one that is copied in from elsewhere, while it is served."""

import logging
import os
import threading
from pathlib import Path

from randbasis.errors import RandbasisError, StoreAccessError
from randbasis.store import AdapterStore

_LOG = logging.getLogger("randbasis.serve")


class LiveStore:
    """The store that lies under a path now. Open connections would go on with the file that was there before.

    Args:
        store: that is open.
    """

    def __init__(self, store: AdapterStore):
        self._store = store
        self._file = _file_at(store.path)
        self._lock = threading.Lock()

    def now(self) -> AdapterStore:
        """The store.

        Raises:
            StoreAccessError: there is none any more under its path.
        """
        if _file_at(self._store.path) != self._file:
            with self._lock:
                self._open()
        return self._store

    def _open(self) -> None:
        path = self._store.path
        found = _file_at(path)
        if found == self._file:  # another thread was here
            return
        try:
            # The old one is closed with the last call that reads it.
            self._store = AdapterStore(path, create=False)
        except RandbasisError as error:
            raise StoreAccessError(
                f"the store must stay where it is while it is served, but: {error}; put it back"
            ) from error
        self._file = found
        _LOG.warning("the file of the store was replaced: adapters come from the new one now")


def _file_at(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino

"""FILES → STORE: packed adapters by name, version, digest, tag, base and method, a million in one SQLite file.

    with AdapterStore("adapters.db") as store:
        store.add("team/user-1", "adapter.safetensors", tags=["support"])
        store.get("team/user-1").packed()

What it promises, and how it is laid out, is docs/store.md.
"""

from randbasis.store.adapter_store import AdapterStore
from randbasis.store.records import Checked, Freed, NewAdapter, Page, Record, StoredAdapter, Transfer

__all__ = ["AdapterStore", "Checked", "Freed", "NewAdapter", "Page", "Record", "StoredAdapter", "Transfer"]

"""AN ADAPTER AT REST: the one reader of folder, packed file, URL and store entry, and what is done with what it reads.

    found = open_adapter("store:team/user-1@3")
    model = put(model, exact(found))

It is read by :mod:`randbasis.adapters.saved`, packed, inspected, planned, quantized, merged into its base, and put on a
model without touching the disk.
"""

from randbasis.adapters.packed import exact, pack_adapter, unpack_adapter
from randbasis.adapters.putting import load_packed, put
from randbasis.adapters.saved import AdapterLocation, SavedAdapter, open_adapter, open_folder

__all__ = [
    "AdapterLocation",
    "SavedAdapter",
    "exact",
    "load_packed",
    "open_adapter",
    "open_folder",
    "pack_adapter",
    "put",
    "unpack_adapter",
]

"""Packed files on their way in: read, checked by the rules of their format, hashed."""

import hashlib
from pathlib import Path

from randbasis.store.records import Source
from randbasis.store.tables import Content


def check_content(source: Source, what: str) -> Content:
    """The bytes of a packed adapter, once every rule of its format holds.

    Args:
        source: bytes, path or URL of a packed file, or the adapter itself.
        what: what it is, for messages.

    Raises:
        PackedFileMissingError: there is no such file.
        RandbasisError: it breaks a rule of the format; see :func:`randbasis.adapter_file.read`.
    """
    from randbasis.adapter_file import Contents  # numpy, which a store needs for what is new alone
    from randbasis.adapter_file.container import opened

    if isinstance(source, bytes):
        data, spec = source, Contents.from_bytes(source, what).spec
    elif isinstance(source, (str, Path)):
        with opened(source) as (stream, _):
            data = stream.read()
        spec = Contents.from_bytes(data, str(source)).spec
    else:
        data, spec = source.to_bytes(), source.spec
    return Content(data, hashlib.sha256(data).digest(), spec.method.name, bytes.fromhex(spec.fingerprint))

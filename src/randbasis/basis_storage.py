"""The kinds of storage that frozen matrices may have between calls, by name; :mod:`randbasis.ops` keeps them."""

from typing import Literal, cast, get_args

from randbasis.errors import StorageError, not_one_of

BasisStorage = Literal["auto", "packed", "dense", "recompute"]
"""``packed``: raw words (1 bit an entry for the sign law); ``dense``: floating point; ``recompute``: nothing.

Where each place belongs to one matrix of several (law ``hashed``), ``dense`` is ``packed``: one word for each place."""


def check_storage(name: str) -> BasisStorage:
    """The kind of storage of that name.

    Raises:
        StorageError: there is no such kind.
    """
    if name not in get_args(BasisStorage):
        raise StorageError(not_one_of("basis_storage", name, get_args(BasisStorage)))
    return cast("BasisStorage", name)

"""One version of one adapter in memory, and the right to use it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from randbasis.adapter_file import Spec
    from randbasis.bank.profile import Profile
    from randbasis.bank.table import Table


@dataclass(slots=True, eq=False)
class Resident:
    """One version of one adapter. A newer version of the same name is another one.

    Attributes:
        name: what requests call it.
        version: of the store, or counted by the bank from 1 where none was given.
        digest: SHA-256 of its packed bytes, hexadecimal; of its coefficients, where it was no file.
        spec: everything about it but the numbers.
        profile: what it has in common with others.
        table: that holds its coefficients.
        slot: its row there.
        extra: what was trained beside the coefficients (heads), by module path and parameter.
        nbytes: of the row and of ``extra``.
        pinned: whether it may not be evicted.
        leases: how many use it now.
        replaced: whether its name means another one, or none, by now: the last lease frees it.
    """

    name: str
    version: int
    digest: str
    spec: "Spec"
    profile: "Profile"
    table: "Table"
    slot: int
    extra: Mapping[str, Mapping[str, Tensor]]
    nbytes: int
    pinned: bool = False
    leases: int = 0
    replaced: bool = False

    def values(self) -> Tensor:
        """Its coefficients ``[count]``, in the order of its spec, as they are kept."""
        return self.table[self.slot]


@dataclass(slots=True, eq=False)
class Lease:
    """The right to use a resident adapter: it stays as it is until :meth:`release`, which may be called twice.

    Attributes:
        resident: what is used.
    """

    resident: Resident
    _end: Callable[[Resident], None] = field(repr=False)
    _ended: bool = field(default=False, repr=False)

    def release(self) -> None:
        """End it."""
        if not self._ended:
            self._ended = True
            self._end(self.resident)

    def holds(self, end: Callable[[Resident], None]) -> bool:
        """Whether it has not ended, and is of the bank that ends its leases so."""
        return not self._ended and self._end == end

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

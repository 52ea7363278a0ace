"""What the store answers with: records, pages, contents and reports, all plain values."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

if TYPE_CHECKING:  # it needs torch, and most of a store does not
    from randbasis.adapter_file import PackedAdapter

Source: TypeAlias = Union[bytes, str, Path, "PackedAdapter"]
"""A packed adapter to put into a store: its bytes, its file, or itself."""

Progress = Callable[[int, int], None]
"""Called with what is done and what there is to do."""


@dataclass(frozen=True, slots=True)
class NewAdapter:
    """One adapter of a batch.

    Attributes:
        name: what it is to be called; a name that is there gets a version more.
        source: bytes, path or URL of a packed file, or a :class:`~randbasis.adapter_file.PackedAdapter`.
        tags: words to find it by.
    """

    name: str
    source: Source
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """One version of an adapter, without its content.

    Attributes:
        name: of the adapter.
        version: from 1; never given twice under one name.
        digest: SHA-256 of the packed bytes, in hexadecimal.
        method: ``"nola"``, ``"vera"``, …
        base: fingerprint of the base model, in hexadecimal.
        created: when this version was added, in microseconds since 1970 (UTC).
        bytes: size of the packed file.
        tags: sorted.
    """

    name: str
    version: int
    digest: str
    method: str
    base: str
    created: int
    bytes: int
    tags: tuple[str, ...]

    @property
    def created_at(self) -> datetime:
        """When this version was added."""
        return datetime.fromtimestamp(self.created // 1_000_000, UTC).replace(microsecond=self.created % 1_000_000)

    def as_json(self) -> dict[str, Any]:
        """Plain values; the time in ISO 8601."""
        return asdict(self) | {
            "created": self.created_at.isoformat(timespec="microseconds"),
            "tags": [*self.tags],
        }


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """One version of an adapter with its content, whose hash was checked when it was read.

    Attributes:
        record: what the store knows of it.
        data: the bytes of the packed file, as they were added.
    """

    record: Record
    data: bytes

    def packed(self) -> "PackedAdapter":
        """The content, parsed."""
        from randbasis.adapter_file import PackedAdapter

        return PackedAdapter.from_bytes(self.data, f"{self.record.name} version {self.record.version}")


@dataclass(frozen=True, slots=True)
class Selection:
    """Which adapters are meant; None means all.

    Attributes:
        tag: only versions with this tag.
        base: only adapters of this base, by its fingerprint in hexadecimal.
        method: only adapters of this method.
    """

    tag: str | None = None
    base: str | None = None
    method: str | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list.

    Attributes:
        records: in ascending order of the names.
        next: what ``after`` has to be for the next page; None on the last one.
    """

    records: tuple[Record, ...]
    next: str | None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"adapters": [record.as_json() for record in self.records], "next": self.next}


@dataclass(frozen=True, slots=True)
class Freed:
    """What was taken out of a store.

    Attributes:
        versions: how many versions of adapters.
        blobs: how many contents that no other version has.
        bytes: of those contents.
    """

    versions: int = 0
    blobs: int = 0
    bytes: int = 0

    def __add__(self, other: "Freed") -> "Freed":
        return Freed(self.versions + other.versions, self.blobs + other.blobs, self.bytes + other.bytes)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Transfer:
    """What an export or import did.

    Attributes:
        versions: how many versions it covers.
        written: how many contents (into a folder) or versions (into a file or store) were new there; the others were
            there from an earlier, cut-off run.
        bytes: of the contents that were written.
    """

    versions: int
    written: int
    bytes: int

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Checked:
    """What the verification of a store found.

    Attributes:
        versions: of adapters.
        blobs: contents.
        bytes: of all contents, every one of them hashed again.
        problems: kind of problem → how many.
        examples: the first of the problems, in words.
    """

    versions: int
    blobs: int
    bytes: int
    problems: Mapping[str, int]
    examples: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "sound": self.sound,
            "versions": self.versions,
            "blobs": self.blobs,
            "bytes": self.bytes,
            "problems": dict(self.problems),
            "examples": [*self.examples],
        }

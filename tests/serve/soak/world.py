"""What the store holds over time, as the one who writes it knows it: the truth that answers are held against."""

import random
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from served import random_adapter

from randbasis.adapter_file import PackedAdapter
from randbasis.store import AdapterStore, NewAdapter

SIZE = 2.0
"""Standard deviation of coefficients: large enough that every adapter answers in its own words."""
BATCH = 500
HOT = 25
"""About as many names are changed again and again."""
RECENT = 8


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a name, or a version of it, stands for.

    Attributes:
        content: seed of the adapter; None where there is none.
        broken: whether its bytes in the store were damaged.
    """

    content: int | None
    broken: bool = False


ABSENT = Meaning(None)


@dataclass(slots=True)
class Change:
    """From when on, and not before, a name may have meant this; ``done`` is when it surely did."""

    began: float
    done: float
    meaning: Meaning


@dataclass
class Course:
    """All that a name ever meant, and each of its versions.

    Attributes:
        newest: in the order in which it was changed.
        versions: number → what it holds, likewise.
    """

    newest: list[Change] = field(default_factory=list)
    versions: dict[int, list[Change]] = field(default_factory=dict)

    def now(self) -> dict[int, Meaning]:
        """The versions that there are."""
        found = {number: changes[-1].meaning for number, changes in self.versions.items()}
        return {number: meaning for number, meaning in found.items() if meaning != ABSENT}


def within(changes: list[Change], began: float, ended: float) -> set[Meaning]:
    """What may have been met by somebody who looked once, between two moments."""
    found = {ABSENT} if not changes or began < changes[0].done else set[Meaning]()
    for one, following in zip(changes, [*changes[1:], None], strict=True):
        until = inf if following is None else following.done
        if one.began <= ended and until >= began:
            found.add(one.meaning)
    return found


class World:
    """A store, the changes that are made to it, and what was ever true of it.

    Args:
        path: of the store, which is made.
        model: that the adapters are of.
        count: of adapters.
        seed: of the changes.
    """

    def __init__(self, path: Path, model: Any, count: int, seed: int):
        self._path, self._model = path, model
        self._dice = random.Random(seed)
        self._contents = 0
        self._lock = threading.Lock()
        self.courses: dict[str, Course] = {}
        self.changes: dict[str, int] = {}
        self.recent: deque[str] = deque(maxlen=RECENT)
        self.store = AdapterStore(path)
        names = [f"team-{number % 20}/user-{number}" for number in range(count)]
        for start in range(0, count, BATCH):
            batch = [(name, self._fresh()) for name in names[start : start + BATCH]]
            began = time.monotonic()
            records = self.store.add_many([NewAdapter(name, self.adapter(content)) for name, content in batch])
            for (name, content), record in zip(batch, records, strict=True):
                self._happened(name, record.version, Meaning(content), began)

    def adapter(self, content: int) -> PackedAdapter:
        """The adapter of a seed."""
        return random_adapter(self._model, content, size=SIZE)

    def meant(self, name: str, version: int | None, began: float, ended: float) -> set[Meaning]:
        """What a request may have met that came and went in this time."""
        course = self.courses.get(name, Course())
        return within(course.newest if version is None else course.versions.get(version, []), began, ended)

    def some_version(self, dice: random.Random, name: str) -> int:
        """A version that a name has had."""
        return dice.choice(sorted(self.courses[name].versions))

    # --- changes ---

    def change(self) -> None:
        """One change of a random kind; of several threads one at a time."""
        with self._lock:
            self._change()

    def _change(self) -> None:
        kind = self._dice.choices(["update", "roll back", "remove", "damage", "damage new"], [8, 5, 2, 2, 2])[0]
        names = sorted(self.courses)
        name = self._dice.choice(names[:: len(names) // HOT or 1] if self._dice.random() < 0.7 else names)
        self.recent.append(name)
        sound = [number for number, one in self.courses[name].now().items() if not one.broken]
        if kind == "damage new":
            self._add(f"broken/user-{len(self.courses)}", damaged=True)
        elif kind == "roll back" and len(sound) > 1:
            self._roll_back(name, self._dice.choice(sorted(sound)[:-1]))
        elif kind == "remove" and sound:
            self._remove(name)
        else:
            kind = kind if kind == "damage" else "update"
            self._add(name, damaged=kind == "damage")
        self.changes[kind] = self.changes.get(kind, 0) + 1

    def _add(self, name: str, *, damaged: bool) -> None:
        content, began = self._fresh(), time.monotonic()
        record = self.store.add(name, self.adapter(content))
        self._happened(name, record.version, Meaning(content), began)
        if damaged:
            began = time.monotonic()
            flip_a_byte(self._path, name, record.version)
            self._happened(name, record.version, Meaning(content, broken=True), began)

    def _roll_back(self, name: str, to: int) -> None:
        began = time.monotonic()
        record = self.store.rollback(name, to)
        self._happened(name, record.version, self.courses[name].now()[to], began)

    def _remove(self, name: str) -> None:
        began = time.monotonic()
        self.store.remove(name)
        course, done = self.courses[name], time.monotonic()
        for changes in (course.newest, *course.versions.values()):
            if changes[-1].meaning != ABSENT:
                changes.append(Change(began, done, ABSENT))

    def _happened(self, name: str, version: int, meaning: Meaning, began: float) -> None:
        change = Change(began, time.monotonic(), meaning)
        course = self.courses.setdefault(name, Course())
        course.newest.append(change)
        course.versions.setdefault(version, []).append(change)

    def _fresh(self) -> int:
        self._contents += 1
        return self._contents

    # --- what is left ---

    def lost(self) -> list[str]:
        """Adapters and versions that should be in the store, whole, and are not; and what should not be there."""
        found: list[str] = []
        with AdapterStore(self._path) as store:
            there = set(stored(store))
            expected = {
                (name, number): one for name, course in self.courses.items() for number, one in course.now().items()
            }
            found += [f"{name}@{number}" for name, number in sorted(there ^ set(expected))]
            for name, number in sorted(there & {key for key, one in expected.items() if not one.broken}):
                content = expected[name, number].content
                assert content is not None
                if store.get(name, version=number).data != self.adapter(content).to_bytes():
                    found.append(f"{name}@{number}")
        return found


def stored(store: AdapterStore) -> Iterator[tuple[str, int]]:
    """Every name with every version that a store has."""
    after: str | None = ""
    while after is not None:
        page = store.list(after=after, limit=1000)
        for one in page.records:
            yield from ((one.name, version.version) for version in store.history(one.name, limit=1000))
        after = page.next


def flip_a_byte(path: Path, name: str, version: int) -> None:
    """Damage the bytes of a version, behind the store's back."""
    with sqlite3.connect(path, timeout=30) as connection:
        query = "SELECT id, content FROM blobs WHERE id = (SELECT blob FROM adapters WHERE name = ? AND version = ?)"
        number, content = connection.execute(query, (name, version)).fetchone()
        damaged = bytearray(content)
        damaged[-1] ^= 0x10
        connection.execute("UPDATE blobs SET content = ? WHERE id = ?", (bytes(damaged), number))
    connection.close()

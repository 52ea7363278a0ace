"""The store against a dictionary, under any order of calls."""

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from small_adapters import packed

from randbasis.store import AdapterStore, NewAdapter

NAMES = st.sampled_from(["a", "b", "b/c", "d"])
CONTENTS = [packed(number) for number in range(4)]
NUMBERS = st.integers(0, len(CONTENTS) - 1)
TAGS = st.lists(st.sampled_from(["x", "y"]), unique=True, max_size=2)


class StoreMachine(RuleBasedStateMachine):
    """`versions` is name → version → (content, tags); `last` the highest number ever given."""

    @initialize()
    def open(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "adapters.db"
        self.store = AdapterStore(self.path)
        self.versions: dict[str, dict[int, tuple[bytes, tuple[str, ...]]]] = {}
        self.last: dict[str, int] = {}

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    def expect(self, name: str, number: int, tags: Any) -> int:
        version = self.last[name] = self.last.get(name, 0) + 1
        self.versions.setdefault(name, {})[version] = (CONTENTS[number], tuple(sorted(tags)))
        return version

    @rule(batch=st.lists(st.tuples(NAMES, NUMBERS, TAGS), max_size=4))
    def add(self, batch: list[tuple[str, int, list[str]]]) -> None:
        records = self.store.add_many([NewAdapter(name, CONTENTS[n], tuple(tags)) for name, n, tags in batch])
        assert [one.version for one in records] == [self.expect(*one) for one in batch]

    @precondition(lambda self: any(len(found) > 1 for found in self.versions.values()))
    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(name for name, found in self.versions.items() if len(found) > 1)))
        old = data.draw(st.sampled_from(sorted(self.versions[name])[:-1]))
        content, tags = self.versions[name][old]
        assert self.store.rollback(name, old).version == self.expect(name, CONTENTS.index(content), tags)

    @precondition(lambda self: self.versions)
    @rule(data=st.data(), whole=st.booleans())
    def remove(self, data: st.DataObject, whole: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.versions)))
        version = None if whole else data.draw(st.sampled_from(sorted(self.versions[name])))
        gone = [version] if version is not None else sorted(self.versions[name])
        assert self.store.remove(name, version).versions == len(gone)
        for one in gone:
            del self.versions[name][one]
        self.forget_empty()

    @rule(keep=st.integers(1, 3))
    def gc(self, keep: int) -> None:
        self.store.gc(keep)
        self.versions = {name: dict(sorted(found.items())[-keep:]) for name, found in self.versions.items()}

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = AdapterStore(self.path, create=False)

    def forget_empty(self) -> None:
        self.versions = {name: found for name, found in self.versions.items() if found}

    @invariant()
    def agrees(self) -> None:
        newest = {name: max(found) for name, found in self.versions.items()}
        assert {one.name: one.version for one in self.store.list().records} == newest
        for name, found in self.versions.items():
            assert [one.version for one in self.store.history(name)] == sorted(found, reverse=True)
            for version, (content, tags) in found.items():
                stored = self.store.get(name, version=version)
                assert (stored.data, stored.record.tags) == (content, tags)
        for tag in ("x", "y"):
            tagged = [name for name, version in sorted(newest.items()) if tag in self.versions[name][version][1]]
            assert [one.name for one in self.store.list(tag=tag).records] == tagged
        checked = self.store.verify()
        assert checked.sound, checked.examples
        assert checked.blobs == len({content for found in self.versions.values() for content, _ in found.values()})


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=25, stateful_step_count=12)

"""Kill a writer of a store at random moments, again and again, and hold what is left against what it acknowledged.

    python tests/store/crash_writer.py --kills 1000 --seed 0

One process imports the package; each writer is a fork of it, works through a random sequence of calls that the parent
can work out too, sends one byte for every call that returned, and dies of SIGKILL. What the store then holds must be
the state after the acknowledged calls, or after these and the one that was under way: nothing lost, nothing torn.
"""

import argparse
import copy
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from randbasis.adapter_file import Base, PackedAdapter, Spec, SpecMatrix, group_matrices
from randbasis.methods import Nola
from randbasis.store import AdapterStore, NewAdapter

NAMES = [f"team/user-{number}" for number in range(12)]
ROUNDS_A_FILE = 25
"""Kills after which a new store begins, so that some kills hit the making of one."""


def contents(count: int) -> list[bytes]:
    """Adapters of about 10 KB."""
    method = Nola(seed=1, r=2, num_basis=1200, alpha=2.0)
    matrices = [SpecMatrix(f"layers.{i}.q", "", 0, 16, 16, 16, method) for i in range(2)]
    spec = Spec(method, Base(), group_matrices(matrices), 16)
    values = torch.arange(spec.count, dtype=torch.float32)
    return [PackedAdapter.of(spec, values % 1000 + number).to_bytes() for number in range(count)]


CONTENTS = contents(48)


Versions = dict[str, dict[int, tuple[bytes, tuple[str, ...]]]]
"""name → version → (content, tags)"""
DONE, NOT_DONE = "killed within a call that was done", "killed within a call that was not done"


@dataclass
class State:
    """What a store has to hold, and the highest number ever given to a name."""

    versions: Versions = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)

    def put(self, name: str, content: bytes, tags: tuple[str, ...]) -> None:
        self.last[name] = self.last.get(name, 0) + 1
        self.versions.setdefault(name, {})[self.last[name]] = (content, tags)

    def drop(self, name: str, numbers: list[int]) -> None:
        for number in numbers:
            del self.versions[name][number]
        if not self.versions[name]:
            del self.versions[name]


Call = Callable[[AdapterStore], object]


def next_call(dice: random.Random, state: State) -> tuple[str, Call]:
    """A random call, and in `state` what it leads to."""
    kind = dice.choices(["batch", "one", "rollback", "remove", "gc", "close"], [5, 4, 2, 2, 1, 1])[0]
    old = [name for name, found in sorted(state.versions.items()) if len(found) > 1]
    if kind == "close":
        return kind, lambda store: store.close()
    if kind == "gc":
        for name, found in list(state.versions.items()):
            state.drop(name, sorted(found)[:-2])
        return kind, lambda store: store.gc(2)
    if kind in ("rollback", "remove") and old:
        name = dice.choice(old)
        number = dice.choice(sorted(state.versions[name])[:-1])
        if kind == "rollback":
            state.put(name, *state.versions[name][number])
            return kind, lambda store: store.rollback(name, number)
        state.drop(name, [number])
        return kind, lambda store: store.remove(name, number)
    batch = [(dice.choice(NAMES), dice.choice(CONTENTS), ("t",)) for _ in range(dice.randint(2, 40))]
    batch = batch if kind == "batch" else batch[:1]
    for item in batch:
        state.put(*item)
    return kind, lambda store: store.add_many([NewAdapter(*item) for item in batch])


def write_until_killed(path: Path, dice: random.Random, state: State, acknowledge: int) -> None:
    store = AdapterStore(path)
    while True:
        kind, call = next_call(dice, state)
        call(store)
        if kind == "close":
            store = AdapterStore(path)
        os.write(acknowledge, b".")


def found_in(path: Path) -> tuple[Versions, bool]:
    """All that a store holds, every content hashed, and whether the store says that it is sound."""
    with AdapterStore(path) as store:
        names = [record.name for record in store.list(limit=1000).records]
        checked = store.verify()
        if not checked.sound:
            print(*checked.examples, sep="\n", file=sys.stderr)
            return {}, False
        return {
            name: {
                record.version: (store.get(name, version=record.version).data, record.tags)
                for record in store.history(name, limit=1000)
            }
            for name in names
        }, True


def verdict_on(found: Versions, acknowledged: State, after: State) -> str:
    """What a kill left: the call that was under way done or not done, or a store in a state nobody asked for."""
    if found == acknowledged.versions:
        return NOT_DONE
    if found == after.versions:
        return DONE
    kept = [
        found.get(name, {}).get(number) == content
        for name, versions in acknowledged.versions.items()
        for number, content in versions.items()
        if number in after.versions.get(name, {})
    ]
    return "torn" if all(kept) else "lost"


def killed_after(path: Path, seed: int, state: State, moment: random.Random) -> int:
    """Let a writer work, kill it, and count what it acknowledged."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            write_until_killed(path, random.Random(seed), state, writing)
        finally:  # it is killed in the call above, or has failed
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    acknowledged, enough = 0, moment.choice([0, 0, 1, 2, 4])
    while acknowledged < enough and os.read(reading, 1):
        acknowledged += 1
    time.sleep(moment.uniform(0, 0.015))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    while rest := os.read(reading, 1 << 16):
        acknowledged += len(rest)
    os.close(reading)
    assert os.WIFSIGNALED(status), "the writer ended by itself"
    return acknowledged


def run(folder: Path, kills: int, seed: int) -> dict[str, object]:
    moment = random.Random(seed)
    counts: Counter[str] = Counter()
    path, state = folder, State()
    for number in range(kills):
        if number % ROUNDS_A_FILE == 0:
            path, state = folder / f"{number}.db", State()
        before = copy.deepcopy(state)
        acknowledged = killed_after(path, seed + number, state, moment)
        dice, state = random.Random(seed + number), before
        for _ in range(acknowledged):
            counts[next_call(dice, state)[0]] += 1
        after = copy.deepcopy(state)
        hit, _ = next_call(dice, after)
        found, sound = found_in(path)
        verdict = verdict_on(found, state, after) if sound else "torn"
        counts["acknowledged"] += acknowledged
        counts[verdict] += 1
        counts[f"killed within {hit}"] += 1
        if verdict in ("lost", "torn"):
            print(f"kill {number} (seed {seed + number}), within {hit}: {verdict}", file=sys.stderr)
            path, state = folder / f"{number} again.db", State()
        else:
            state = after if verdict == DONE else state
    wrong = {verdict: counts.pop(verdict, 0) for verdict in ("lost", "torn")}
    return {"kills": kills, "seed": seed, **wrong, **dict(sorted(counts.items()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="where to put the stores; by default a temporary directory")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        result = run(Path(folder), arguments.kills, arguments.seed)
    print(json.dumps({**result, "seconds": round(time.perf_counter() - began, 2)}))
    sys.exit(1 if result["lost"] or result["torn"] else 0)


if __name__ == "__main__":
    main()

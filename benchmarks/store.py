"""``python -m benchmarks.store --adapters 1000000 --directory DIR``: a store of many adapters against folders of them.

Every adapter is another one, of 10 KB: NOLA on 32 matrices, 4,608 coefficients of 16 bits. The other side is one PEFT
directory an adapter, on the same disk, with the two files that PEFT writes; its files are written and read as plain
bytes, without PEFT's own time, and not synced, as PEFT does not sync them. Additions to the store are synced.
Rows are appended to a csv; with fewer folders than adapters, sizes of folders are extrapolated, and the rows say so.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import machine, rows
from benchmarks.case import seconds as timed
from randbasis.adapter_file import Base, PackedAdapter, Spec, SpecMatrix, group_matrices
from randbasis.adapters.packed import unpack_adapter
from randbasis.methods import Nola
from randbasis.store import AdapterStore, NewAdapter

ADDITIONS = rows.RESULTS / "store.csv"
COLUMNS = [*machine.COLUMNS, "adapters", "disk", "side", "measure", "value", "unit", "note"]
PAGE = 100
TAG_EVERY = 1000
TENTH, GROWTH = "add, up to ", "memory added, up to "
"""How the measures of a growing store begin; the number of adapters follows."""

STORE, FOLDERS = "store", "PEFT directories"

Row = tuple[str, str, float, str, str]


class Contents:
    """Distinct packed files made from one, by new coefficients and the two digests that change with them."""

    def __init__(self, seed: int) -> None:
        method = Nola(seed=1, r=8, num_basis=72, alpha=8.0)
        names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(16) for p in "qv"]
        matrices = [SpecMatrix(name, "", 0, 2048, 2048, 2048, method) for name in names]
        self._spec = Spec(method, Base("base", "llama"), group_matrices(matrices), 16)
        self._draw = np.random.default_rng(seed)
        values = torch.zeros(self._spec.count)
        adapter = PackedAdapter.of(self._spec, values)
        whole = adapter.to_bytes()
        self._size = adapter.coefficients.numel() * 2
        self._head = whole[: -self._size]
        header = json.loads(self._head[8:])["__metadata__"]
        self._text, self._sha = header["spec"], header["sha256"].encode()
        self._digest = hashlib.sha256(whole[-self._size :]).hexdigest()

    def __call__(self) -> bytes:
        """The next one."""
        data = self._draw.standard_normal(self._spec.count, dtype=np.float32).astype(np.float16).tobytes()
        digest = hashlib.sha256(data).hexdigest()
        text = hashlib.sha256(self._text.replace(self._digest, digest).encode()).hexdigest()
        return self._head.replace(self._digest.encode(), digest.encode()).replace(self._sha, text.encode()) + data

    def check(self) -> None:
        """Raise unless these are the bytes that the package writes."""
        data = self()
        assert PackedAdapter.from_bytes(data).to_bytes() == data


def percentile(seconds: list[float], share: int) -> float:
    return statistics.quantiles(seconds, n=100)[share - 1]


def scattered(number: int, adapters: int) -> str:
    """Names of all numbers below `adapters`, in an order that is not theirs."""
    return f"team/user-{number * 2_654_435_761 % adapters:09}"


def resident() -> float:
    """Memory of this process now, in MB."""
    with Path("/proc/self/statm").open(encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def store_rows(folder: Path, adapters: int, batch: int, gets: int) -> Iterator[Row]:
    """Fill a store, then read from it."""
    path, make = folder / "adapters.db", Contents(0)
    make.check()
    before = resident()
    with AdapterStore(path) as store:
        yield from _growing(store, make, adapters, batch)
        single = [timed(lambda n=n: store.add(f"single/{n}", make())) for n in range(100)]
        yield STORE, "add one p50", statistics.median(single) * 1e3, "ms", "a transaction each, synced"
        yield from _reading(store, adapters, gets)
        yield STORE, "memory added", resident() - before, "MB", "resident set, after less before"
        yield (
            STORE,
            "peak memory",
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
            "MB",
            "with torch and peft",
        )
    yield STORE, "file", path.stat().st_size / 1e6, "MB", f"{len(make())} bytes an adapter"
    yield STORE, "disk an adapter", path.stat().st_size / (adapters + 100), "bytes", "with all indexes"
    with AdapterStore(path) as store:
        seconds = timed(lambda: _must_be_sound(store))
        yield STORE, "verify", adapters / seconds, "adapters/s", "every content hashed, structure checked"


def _growing(store: AdapterStore, make: Contents, adapters: int, batch: int) -> Iterator[Row]:
    before, in_batches, memory, processor = resident(), list[float](), list[float](), 0.0
    for start in track(range(0, adapters, batch), "store: add", console=Console(stderr=True)):
        numbers = range(start, min(start + batch, adapters))
        tags = (("rare",) if number % TAG_EVERY == 0 else () for number in numbers)
        items = [NewAdapter(scattered(n, adapters), make(), tag) for n, tag in zip(numbers, tags, strict=True)]
        began = time.process_time()
        in_batches.append(timed(lambda items=items: store.add_many(items)))
        processor += time.process_time() - began
        memory.append(resident() - before)
    note = f"transactions of {batch}, synced, checked, names in no order"
    yield STORE, "add, batched", adapters / sum(in_batches), "adapters/s", note
    note = f"a thread without waits; 15-minute load average {os.getloadavg()[2]:.1f} on {os.cpu_count()} cores"
    yield STORE, "add, by processor time", adapters / processor, "adapters/s", note
    tenth = max(1, len(in_batches) // 10)
    for first in range(0, len(in_batches), tenth):
        part = in_batches[first : first + tenth]
        stop = min(adapters, (first + len(part)) * batch)
        yield STORE, f"{TENTH}{stop}", (stop - first * batch) / sum(part), "adapters/s", f"from {first * batch}"
        yield STORE, f"{GROWTH}{stop}", memory[first + len(part) - 1], "MB", "resident set less that before"


def _reading(store: AdapterStore, adapters: int, gets: int) -> Iterator[Row]:
    names = [scattered(random.Random(n).randrange(adapters), adapters) for n in range(gets)]
    first = [timed(lambda name=name: store.get(name)) for name in names]
    warm = [timed(lambda name=name: store.get(name)) for name in random.Random(0).sample(names, gets)]
    for what, seconds in (("first", first), ("warm", warm)):
        for share in (50, 99):
            note = f"{gets} random names, hashed"
            yield STORE, f"get p{share}, {what}", percentile(seconds, share) * 1e3, "ms", note
    pages = [timed(lambda after=after: store.list(after=after, limit=PAGE)) for after in names[:200]]
    yield STORE, "list page p50", statistics.median(pages) * 1e3, "ms", f"{PAGE} names from a random one"
    tagged = [timed(lambda after=after: store.list(tag="rare", after=after, limit=PAGE)) for after in names[:200]]
    yield STORE, "list page by tag p50", statistics.median(tagged) * 1e3, "ms", f"{PAGE} of 1 in {TAG_EVERY}"


def _must_be_sound(store: AdapterStore) -> None:
    assert store.verify().sound


def folder_rows(folder: Path, adapters: int, folders: int, gets: int) -> Iterator[Row]:
    """The same with one PEFT directory an adapter."""
    side, root = FOLDERS, folder / "folders"
    packed = folder / "one.safetensors"
    packed.write_bytes(Contents(0)())
    unpack_adapter(packed, folder / "one", base_name="base")
    files = {file.name: file.read_bytes() for file in sorted((folder / "one").iterdir())}
    of = f"{folders} folders" + ("" if folders == adapters else f" for {adapters}")

    def write(number: int) -> None:
        place = root / f"user-{number:09}"
        place.mkdir(parents=True)
        for name, data in files.items():
            (place / name).write_bytes(data)

    def read(name: str) -> list[bytes]:
        return [(root / name / file).read_bytes() for file in files]

    numbers = track(range(folders), "folders: write", console=Console(stderr=True))
    yield side, "add", folders / timed(lambda: [write(n) for n in numbers]), "adapters/s", f"{of}, not synced"
    names = [f"user-{random.Random(n).randrange(folders):09}" for n in range(gets)]
    for name in names:
        read(name)
    warm = [timed(lambda name=name: read(name)) for name in random.Random(0).sample(names, gets)]
    for share in (50, 99):
        yield side, f"get p{share}, warm", percentile(warm, share) * 1e3, "ms", f"{of}, not hashed"
    listed = [timed(lambda: sorted(os.listdir(root))[:PAGE]) for _ in range(3)]
    yield side, "list page p50", statistics.median(listed) * 1e3, "ms", f"{of}, all names are read"
    sample = [place for number in range(min(folders, 100)) for place in _places(root / f"user-{number:09}")]
    size = sum(place.stat().st_blocks * 512 for place in sample) / min(folders, 100)
    yield side, "disk an adapter", size, "bytes", f"blocks of 100 folders with their {len(files)} files"
    extrapolated = "" if folders == adapters else f"extrapolated from {folders} folders"
    yield side, "file", size * adapters / 1e6, "MB", extrapolated


def _places(folder: Path) -> list[Path]:
    return [folder, *folder.iterdir()]


def disk_of(folder: Path) -> str:
    """Kind and size of the disk, and how long one sync takes on it."""
    seconds: list[float] = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(20):
            file.write(b"x" * 10_000)
            file.flush()
            seconds.append(timed(lambda: os.fsync(file.fileno())))
    return f"sync {statistics.median(seconds) * 1e3:.2g} ms, SQLite {sqlite3.sqlite_version}"


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store", description=__doc__)
    parser.add_argument("--adapters", type=int, default=10_000, help="in the store")
    parser.add_argument("--folders", type=int, help="PEFT directories; by default a tenth of the adapters")
    parser.add_argument("--batch", type=int, default=1000, help="adapters of one transaction")
    parser.add_argument("--gets", type=int, default=10_000, help="random names to get")
    parser.add_argument("--directory", type=Path, help="on the disk to measure; by default a temporary one")
    parser.add_argument("--output", type=Path, default=ADDITIONS, help="csv to append to")
    given = parser.parse_args()
    torch.set_num_threads(1)
    folders = given.folders or max(100, given.adapters // 10)
    with tempfile.TemporaryDirectory(dir=given.directory) as folder:
        about = {**machine.about(), "adapters": given.adapters, "disk": disk_of(Path(folder))}
        measured = [*store_rows(Path(folder), given.adapters, given.batch, given.gets)]
        (Path(folder) / "adapters.db").unlink()
        measured += folder_rows(Path(folder), given.adapters, folders, given.gets)
        shutil.rmtree(Path(folder) / "folders")
    plain = [{**about, **dict(zip(COLUMNS[-5:], row, strict=True))} for row in measured]
    rows.append(given.output, [{**row, "value": f"{row['value']:.5g}"} for row in plain], COLUMNS)
    _print(about, measured)


def _print(about: dict[str, object], measured: list[Row]) -> None:
    table = Table(title=f"{about['adapters']:,} adapters, {about['device']}, {about['disk']}")
    for column in COLUMNS[-5:]:
        table.add_column(column, justify="right" if column == "value" else "left")
    for side, measure, value, unit, note in measured:
        table.add_row(side, measure, f"{value:,.4g}", unit, note)
    Console().print(table)


if __name__ == "__main__":
    main()

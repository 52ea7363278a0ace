"""Writers and readers of one store, each a process of its own, all opening it at the same time before it exists.

    python tests/store/concurrent_processes.py --writers 3 --readers 3 --additions 20

Every writer adds to a name of its own and to one that all share; every reader checks the hash of what it gets and that
no version of a name is older than one it saw before. Each writer also has two threads on one object.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from small_adapters import packed

from randbasis.errors import NotStoredError, StoreMissingError
from randbasis.store import AdapterStore, NewAdapter


def write(path: Path, writer: int, additions: int) -> None:
    with AdapterStore(path, timeout=120) as store:
        threads = [threading.Thread(target=_add, args=(store, f"{writer}-{i}", additions)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [len(store.history(f"own-{writer}-{i}")) for i in range(2)] == [additions, additions]


def _add(store: AdapterStore, who: str, additions: int) -> None:
    for number in range(additions):
        content = packed(number)
        store.add_many([NewAdapter(f"own-{who}", content), NewAdapter("shared", content, (who,))])


def read(path: Path, writers: int, additions: int) -> None:
    newest: dict[str, int] = {}
    until = time.monotonic() + 120
    while newest.get("shared", 0) < 2 * writers * additions:
        assert time.monotonic() < until, newest
        try:
            with AdapterStore(path, create=False, timeout=120) as store:
                for record in store.list().records:
                    found = store.get(record.name).record
                    assert found.version >= record.version >= newest.get(record.name, 0)
                    newest[record.name] = found.version
        except (StoreMissingError, NotStoredError):
            time.sleep(0.001)


def fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:  # nothing of the parent runs in a child
        if code:
            traceback.print_exc()
        os._exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--writers", type=int, default=3)
    parser.add_argument("--readers", type=int, default=3)
    parser.add_argument("--additions", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapters.db"
        children = [fork(lambda i=i: write(path, i, given.additions)) for i in range(given.writers)]
        children += [fork(lambda: read(path, given.writers, given.additions)) for _ in range(given.readers)]
        failed = [child for child in children if os.waitpid(child, 0)[1]]
        with AdapterStore(path) as store:
            checked = store.verify()
            numbers = [one.version for one in store.history("shared", limit=10_000)]
    print(json.dumps({"failed": len(failed), **checked.as_json()}))
    assert numbers == [*range(len(numbers), 0, -1)]
    sys.exit(bool(failed) or not checked.sound)


if __name__ == "__main__":
    main()

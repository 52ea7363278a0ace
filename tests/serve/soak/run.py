"""A server under load and faults, each of its answers held against the answer of its adapter alone.

    PYTHONPATH=tests/support python tests/serve/soak/run.py --requests 2000 --adapters 1000 --seconds 300 --seed 0

Requests of many clients, of adapters and of the base, newest versions and named ones, stream over HTTP from a server
in a process of its own. Meanwhile adapters are updated, rolled back, removed and damaged in the store, clients hang up,
and the server is killed and started again. One JSON document says what came of it; the exit code is 1 where an answer
was wrong, an adapter lost, a request failed for no reason, a slot kept, or memory grew.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import httpx
from clients import Asked, Line, ask
from judge import Verdicts, judged
from oracle import MAX_TOKENS, Oracle, prompts, tiny_base
from transformers import AutoModelForCausalLM
from world import World

CHANGE_EVERY = 8
"""Requests from one change of the store to the next."""
KILLS = (0.2, 0.4)
"""After which part of the requests the server is killed; behind the last, memory is watched."""
RESIDENT = 0.4
"""Part of the adapters that memory is given for, so that some have to go; but room for three of each client."""
ROW_BYTES = 4096
"""Of a resident adapter here, on average."""
GROWTH = 0.03
"""Memory may grow by this part between the two halves of what follows the last kill."""
STARTING = 120.0


@dataclass(frozen=True)
class Plan:
    """How much.

    Attributes:
        requests: to be sent.
        adapters: in the store when it begins.
        clients: that send at a time.
        seconds: after which no more is sent.
        seed: of requests and changes.
    """

    requests: int
    adapters: int
    clients: int
    seconds: float
    seed: int


class Server:
    """``randbasis serve`` in a process that may be killed.

    Args:
        folder: for its log.
        base: of the model.
        store: of the adapters.
        row_bytes: that they may take.
    """

    def __init__(self, folder: Path, base: str, store: Path, row_bytes: int):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._command = [sys.executable, "-m", "randbasis", "serve", "--model", base, "--store", str(store)]
        self._command += ["--port", str(port), "--keys", str(folder / "no-keys.json"), "--device", "cpu"]
        self._command += ["--row-bytes", str(row_bytes), "--threads", "1"]
        self.line = Line(f"http://127.0.0.1:{port}", Path(base).name, MAX_TOKENS)
        self.log = folder / "server.log"
        self._process: asyncio.subprocess.Process | None = None
        self.memory: list[float] = []

    async def start(self, client: httpx.AsyncClient) -> None:
        """Until it answers."""
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(*self._command, stdout=log, stderr=log)
        until = time.monotonic() + STARTING
        while True:
            try:
                if (await client.get(f"{self.line.url}/health")).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if self._process.returncode is not None or time.monotonic() > until:
                raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-2000:]}")
            await asyncio.sleep(0.1)
        self.memory = []
        self.line.up.set()

    async def kill(self, client: httpx.AsyncClient) -> None:
        """As a machine that loses its power would; then start it again."""
        assert self._process is not None
        self.line.up.clear()
        began = time.monotonic()
        self._process.kill()
        await self._process.wait()
        await self.start(client)
        self.line.kills.append((began, time.monotonic()))

    async def watch(self) -> None:
        """Its memory, from time to time."""
        while True:
            if self.line.up.is_set() and self._process is not None:
                self.memory.append(resident_mb(self._process.pid))
            await asyncio.sleep(0.2)

    async def stop(self) -> int:
        """As an administrator would; its exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return await self._process.wait()

    def end(self) -> None:
        """Whatever happened."""
        if self._process is not None and self._process.returncode is None:
            os.kill(self._process.pid, signal.SIGKILL)


def resident_mb(pid: int) -> float:
    """Memory of a process that is its own."""
    fields = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in fields.splitlines() if line.startswith("RssAnon")) / 1024


def planned(count: int, world: World, seed: int) -> list[Asked]:
    """Requests in a random order: each adapter at least once where there are as many, and the base."""
    dice, choices = random.Random(seed), prompts(seed)
    names: list[str | None] = [*world.courses]
    dice.shuffle(names)
    names = names[: round(0.8 * count)]
    names += [None if dice.random() < 0.6 else dice.choice(names or [None]) for _ in range(count - len(names))]
    dice.shuffle(names)
    return [Asked(name, None, dice.choice(choices), hangs_up=dice.random() < 0.04) for name in names]


async def load(server: Server, world: World, requests: list[Asked], how: Plan) -> None:
    """All requests by some clients at a time, with changes and kills between them."""
    dice, loop = random.Random(how.seed + 1), asyncio.get_running_loop()
    until = time.monotonic() + how.seconds
    kills = [round(part * len(requests)) for part in KILLS]
    waiting = iter(enumerate(requests))
    limits = httpx.Limits(max_connections=how.clients + 2, max_keepalive_connections=how.clients)
    async with httpx.AsyncClient(timeout=60, limits=limits, trust_env=False) as client:
        await server.start(client)

        async def one_client() -> None:
            for number, asked in waiting:
                if time.monotonic() > until:
                    return
                if number in kills:
                    await server.kill(client)
                if number % CHANGE_EVERY == 0:
                    await loop.run_in_executor(None, world.change)
                _vary(asked, world, dice)
                await ask(client, server.line, asked)

        watching = asyncio.create_task(server.watch())
        try:
            await asyncio.gather(*(one_client() for _ in range(how.clients)))
        finally:
            watching.cancel()


def _vary(asked: Asked, world: World, dice: random.Random) -> None:
    """Some requests name a version, some what was just changed, some what was damaged."""
    if asked.name is None:
        return
    drawn = dice.random()
    broken = [name for name in [*world.courses] if name.startswith("broken/")]
    if drawn < 0.04 and broken:
        asked.name = dice.choice(broken)
    elif drawn < 0.15 and world.recent:
        asked.name = dice.choice([*world.recent])
    elif drawn < 0.3:
        asked.version = world.some_version(dice, asked.name)


async def free_slots(server: Server) -> dict[str, float]:
    """What waits and runs once all clients are gone: nothing, a moment later."""
    found: dict[str, float] = {}
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        for _ in range(100):
            text = (await client.get(f"{server.line.url}/metrics")).text
            found = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line.startswith("rand")}
            if not found["randbasis_requests_waiting"] + found["randbasis_requests_running"]:
                break
            await asyncio.sleep(0.05)
    return found


async def soak(folder: Path, how: Plan) -> dict[str, Any]:
    """The whole run, as one document."""
    base = tiny_base(folder / "tiny")
    world = World(folder / "adapters.db", AutoModelForCausalLM.from_pretrained(base), how.adapters, how.seed)
    requests = planned(how.requests, world, how.seed)
    resident = max(round(RESIDENT * how.adapters), 3 * how.clients)
    server = Server(folder, base, folder / "adapters.db", resident * ROW_BYTES)
    began = time.monotonic()
    try:
        await load(server, world, requests, how)
        took = time.monotonic() - began
        metrics = await free_slots(server)
        code = await server.stop()
    finally:
        server.end()
    oracle = Oracle(base, world.adapter)
    verdicts = judged([one for one in requests if one.tries], world, oracle)
    about = {"adapters": how.adapters, "clients": how.clients, "seed": how.seed, "exit": code}
    return document(verdicts, world, server, metrics, oracle, took) | about


def document(
    verdicts: Verdicts, world: World, server: Server, metrics: dict[str, float], oracle: Oracle, took: float
) -> dict[str, Any]:
    """What is reported."""
    down = sum(ended - began for began, ended in server.line.kills)
    middle, last = halves(server.memory)
    return {
        **verdicts.counts(),
        "lost": len(world.lost()),
        "changes": dict(sorted(world.changes.items())),
        "kills": len(server.line.kills),
        "loads": int(metrics["randbasis_bank_loads_total"]),
        "evictions": int(metrics["randbasis_bank_evictions_total"]),
        "slots_kept": int(metrics["randbasis_requests_waiting"] + metrics["randbasis_requests_running"]),
        "memory_mb": [round(middle, 1), round(last, 1)],
        "solo_answers": len(oracle),
        "distinct_solo_answers": oracle.distinct(),
        **verdicts.put_checked(oracle),
        "tokens_per_second": round(verdicts.tokens / max(took - down, 1e-9), 1),
        "seconds": round(took, 1),
        "seconds_down": round(down, 1),
    }


def halves(memory: list[float]) -> tuple[float, float]:
    """Of what follows the first third, in which caches fill: the mean before and behind the middle."""
    rest = memory[len(memory) // 3 :] or [0.0]
    return mean(rest[: max(1, len(rest) // 2)]), mean(rest[len(rest) // 2 :])


def sound(found: dict[str, Any]) -> bool:
    """Whether all is as it must be."""
    nothing = ("wrong", "failed", "lost", "slots_kept", "put_differs", "exit")
    middle, last = found["memory_mb"]
    return not any(found[name] for name in nothing) and last <= middle * (1 + GROWTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="to be sent")
    parser.add_argument("--adapters", type=int, default=1000, help="in the store when it begins")
    parser.add_argument("--clients", type=int, default=32, help="that send at a time")
    parser.add_argument("--seconds", type=float, default=300.0, help="after which no more is sent")
    parser.add_argument("--seed", type=int, default=0, help="of requests and changes")
    parser.add_argument("--directory", type=Path, help="to leave the server's log in; by default a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.directory or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        plan = Plan(given.requests, given.adapters, given.clients, given.seconds, given.seed)
        found = asyncio.run(soak(folder, plan))
        if not sound(found) and (folder / "server.log").is_file():
            print((folder / "server.log").read_text()[-4000:], file=sys.stderr)
    print(json.dumps(found))
    sys.exit(0 if sound(found) else 1)


if __name__ == "__main__":
    main()

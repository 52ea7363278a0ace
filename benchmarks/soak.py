"""``python -m benchmarks.soak --requests 2000 --seconds 300``: a server under load and faults; the count is kept.

What is asked, what is done to it and how it is judged is tests/serve/soak/; here its answer becomes a row of a csv.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import machine, rows

TESTS = machine.ROOT / "tests"
PLAN = ["requests", "adapters", "clients", "seed"]
COUNTS = [
    *("answered", "of_the_base", "of_a_version", "refused", "hung_up", "sent_again", "ambiguous", "ties"),
    *("wrong", "failed", "lost", "slots_kept", "kills", "loads", "evictions"),
    *("solo_answers", "distinct_solo_answers", "put_checked", "put_differs"),
    *("first_token_p50_ms", "first_token_p99_ms", "tokens_per_second", "seconds", "seconds_down"),
]
SOAKS = rows.RESULTS / "soak.csv"
COLUMNS = [*machine.COLUMNS, "others", *PLAN, *COUNTS, "changes", "memory_mb"]


def main() -> None:
    """Parse the arguments and run; exits with 1 where something is not as it must be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=2000, help="to be sent")
    parser.add_argument("--adapters", type=int, default=1000, help="in the store when it begins")
    parser.add_argument("--clients", type=int, default=32, help="that send at a time")
    parser.add_argument("--seconds", type=float, default=300.0, help="after which no more is sent")
    parser.add_argument("--seed", type=int, default=0, help="of requests and changes")
    parser.add_argument("--output", type=Path, default=SOAKS, help="csv to append to")
    given = parser.parse_args()
    options = ("requests", "adapters", "clients", "seconds", "seed")
    arguments = [word for name in options for word in (f"--{name}", str(getattr(given, name)))]
    path = os.pathsep.join(filter(None, [str(TESTS / "support"), os.environ.get("PYTHONPATH")]))
    about, watch = machine.about(), machine.Watch()
    command = [sys.executable, str(TESTS / "serve" / "soak" / "run.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if not done.stdout:
        sys.exit(done.returncode or 1)
    counts = json.loads(done.stdout)
    rows.append(given.output, [{**about, "others": f"{watch.others():.2f}", **_row(counts)}], COLUMNS)
    Console().print_json(data=counts)
    sys.exit(done.returncode)


def _row(counts: dict[str, Any]) -> dict[str, Any]:
    changes = ", ".join(f"{name} {number}" for name, number in counts["changes"].items())
    memory = " ".join(map(str, counts["memory_mb"]))
    return {**{name: counts[name] for name in (*PLAN, *COUNTS)}, "changes": changes, "memory_mb": memory}


if __name__ == "__main__":
    main()

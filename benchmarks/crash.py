"""``python -m benchmarks.crash --kills 1000 --seed 0``: kill a writer of a store at random moments, and keep the count.

What is killed and how it is judged is tests/store/crash_writer.py; here its answer becomes a row of a csv.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import machine, rows
from benchmarks.store import disk_of

WRITER = Path(__file__).resolve().parent.parent / "tests" / "store" / "crash_writer.py"
COUNTS = ["kills", "seed", "acknowledged", "lost", "torn"]
KILLS = rows.RESULTS / "crash.csv"
COLUMNS = [*machine.COLUMNS, "disk", *COUNTS, "within", "seconds"]


def main() -> None:
    """Parse the arguments and run; exits with 1 where something was lost or torn."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crash", description=__doc__)
    parser.add_argument("--kills", type=int, default=1000, help="of the writer")
    parser.add_argument("--seed", type=int, default=0, help="of the calls and of the moments")
    parser.add_argument("--directory", type=Path, help="on the disk to use; by default a temporary one")
    parser.add_argument("--output", type=Path, default=KILLS, help="csv to append to")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.directory) as folder:
        about = {**machine.about(), "disk": disk_of(Path(folder))}
        arguments = ["--kills", str(given.kills), "--seed", str(given.seed), "--directory", folder]
        done = subprocess.run([sys.executable, str(WRITER), *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if not done.stdout:
        sys.exit(done.returncode or 1)
    counts = json.loads(done.stdout)
    rows.append(given.output, [{**about, **_row(counts)}], COLUMNS)
    Console().print_json(data=counts)
    sys.exit(done.returncode)


def _row(counts: dict[str, Any]) -> dict[str, Any]:
    began = "killed within "
    within = ", ".join(f"{name.removeprefix(began)} {n}" for name, n in counts.items() if name.startswith(began))
    return {**{name: counts[name] for name in COUNTS}, "within": within, "seconds": counts["seconds"]}


if __name__ == "__main__":
    main()

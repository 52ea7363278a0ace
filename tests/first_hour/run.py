"""`make first-hour`: what a new user does in the first hour, in a shell, from a copy of the clone, each step checked.

README first, then the jobs of commands.py. Tells number, seconds and command of each; exits with 1 where one failed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support")]
from commands import HOUR, Ran, Step  # noqa: E402
from new_user import NEEDED, copy_of_the_clone, environment  # noqa: E402

ACTIVATE = "if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=HERE.parents[1] / ".cache" / "first-hour", help="made anew")
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    copy_of_the_clone(given.folder, (*NEEDED, "tests/first_hour"))
    return run_all(HOUR, given.folder, data="RANDBASIS_DATA" in os.environ)


def run_all(steps: Sequence[Step], folder: Path, *, data: bool) -> int:
    """Run the steps; 1 where one failed.

    Args:
        steps: in their order.
        folder: to run them in.
        data: whether there is the folder of models and data sets that some of them need.
    """
    began, failed, skipped = time.perf_counter(), 0, 0
    for number, step in enumerate(steps, 1):
        head = f"{number:3}/{len(steps)}"
        shown = " ".join(step.command.split())
        if step.data and not data:
            skipped += 1
            print(
                f"{head}      -    {shown}\n        skipped: RANDBASIS_DATA names no folder of models and data",
                flush=True,
            )
            continue
        start = time.perf_counter()
        problem = problem_of(step, folder)
        print(f"{head} {time.perf_counter() - start:6.1f} s  {shown}", flush=True)
        if problem:
            failed += 1
            print(f"FAILED: {problem}", flush=True)
    took = time.perf_counter() - began
    print(f"{len(steps)} commands in {took / 60:.1f} minutes: {failed} failed, {skipped} skipped", flush=True)
    return 1 if failed else 0


def problem_of(step: Step, folder: Path) -> str:
    """What went wrong; empty where nothing did."""
    shell = ["bash", "-ec", f"{ACTIVATE}{step.first}\n{step.command}"]
    done = subprocess.run(
        shell, cwd=folder, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    said = f"\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    if done.returncode != step.exits:
        return f"exit code {done.returncode}, not {step.exits}{said}"
    try:
        good = step.check is None or step.check(Ran(step.command, done.stdout, done.stderr, folder))
    except (ValueError, LookupError, OSError, TypeError) as error:
        return f"{type(error).__name__}: {error}{said}"
    return "" if good else f"it did not do what it should{said}"


if __name__ == "__main__":
    sys.exit(main())

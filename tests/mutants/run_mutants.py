"""`make mutants`: small faults put into modules that hold promises, by cosmic-ray; each must fail a test.

A seed picks some of the mutants of each module, in a copy of the tree, and runs the tests that cover the module against
each. What survives is a test that is missing, or a line that nothing needs: it is shown as a diff.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

ROOT = Path(__file__).resolve().parents[2]
COPIES = ROOT / ".cache" / "mutants"

COPIED = ("src", "tests", "docs", "examples", "requirements", "pyproject.toml", "README.md")

#: Module -> the tests that hold what it promises.
COVERED = {
    "adapter_file/codec.py": ["tests/adapter_file/test_codec.py"],
    "codes.py": ["tests/test_codes.py"],
    "contraction.py": ["tests/test_contraction.py"],
    "files/output_checks.py": ["tests/files/test_output_set.py", "tests/files/test_whole_file.py"],
    "files/output_set.py": ["tests/files/test_output_set.py"],
    "train/task.py": ["tests/train/test_pieces.py", "tests/train/test_taken_rightly.py"],
    "tuner/adapter_names.py": ["tests/tuner/test_adapter_names.py"],
    "tuner/base_shapes.py": ["tests/adapters/test_plan.py", "tests/tuner/test_refusals.py"],
    "tuner/factor_cache.py": ["tests/tuner/test_factor_cache.py", "tests/tuner/test_mixed_batches.py"],
    "tuner/heads.py": ["tests/tuner/test_heads.py"],
    "tuner/meaning.py": ["tests/tuner/test_meaning.py"],
    "tuner/prepared_pass.py": ["tests/tuner/test_factor_cache.py"],
    "tuner/snapshot.py": ["tests/tuner/test_factor_cache.py"],
    "tuner/switching.py": ["tests/tuner/test_switching.py"],
    "tuner/targets.py": ["tests/tuner/test_targets.py", "tests/tuner/test_slices.py"],
}
CONFIG = """[cosmic-ray]
module-path = "src/randbasis/{module}"
timeout = {timeout}
excluded-modules = []
test-command = "{python} -m pytest -x -q -p no:cacheprovider {tests}"
[cosmic-ray.distributor]
name = "local"
"""


def keep_some(database: WorkDB, count: int, seed: int) -> None:
    """Skip all mutants but some that the seed picks."""
    items = sorted(database.work_items, key=lambda item: item.job_id)
    items.sort(key=lambda item: str(item.mutations))
    chosen = random.Random(seed).sample(items, min(count, len(items)))
    skipped = WorkResult(output="not picked", test_outcome=TestOutcome.KILLED, worker_outcome=WorkerOutcome.SKIPPED)
    database.set_multiple_results([item.job_id for item in items if item not in chosen], skipped)


def run_module(module: str, count: int, seed: int, timeout: int) -> tuple[int, list[str]]:
    """Number of mutants that were run, and the diffs of those that survived."""
    copy = COPIES / module.replace("/", "-").removesuffix(".py")
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
    config, session = copy / "cosmic-ray.toml", copy / "session.sqlite"
    tests = " ".join(COVERED[module])
    config.write_text(CONFIG.format(module=module, timeout=timeout, python=sys.executable, tests=tests))
    environment = os.environ | {"PYTHONPATH": f"{copy / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}

    def run(*words: str | Path) -> None:
        command = [sys.executable, "-m", "cosmic_ray.cli", *map(str, words)]
        subprocess.run(command, cwd=copy, env=environment | {"OMP_NUM_THREADS": "1"}, check=True)

    run("baseline", config)
    run("init", "--force", config, session)
    with use_db(session, mode=WorkDB.Mode.open) as database:
        keep_some(database, count, seed)
    run("exec", config, session)
    with use_db(session, mode=WorkDB.Mode.open) as database:
        results = [result for _, result in database.results if result.worker_outcome != WorkerOutcome.SKIPPED]
    return len(results), [str(r.diff) for r in results if r.test_outcome == TestOutcome.SURVIVED]


def main() -> int:
    """Exit code 1 when a mutant survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--module", choices=sorted(COVERED), action="append", help="default: all")
    parser.add_argument("--each", type=int, default=4, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=int, default=300, help="seconds for the tests of one mutant")
    options = parser.parse_args()
    total, survived = 0, 0
    for module in options.module or sorted(COVERED):
        count, diffs = run_module(module, options.each, options.seed, options.timeout)
        total, survived = total + count, survived + len(diffs)
        print(f"{module}: {count} mutants, {len(diffs)} survived", *diffs, sep="\n", flush=True)
    print(f"make mutants: {total} mutants, {survived} survived")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())

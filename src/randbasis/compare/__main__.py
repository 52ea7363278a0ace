"""``python -m randbasis.compare run STUDY``: the runs that are missing."""

import argparse
from pathlib import Path

from rich.console import Console

from randbasis.compare.pool import run_study
from randbasis.compare.studies import STUDIES, study_named


def main() -> None:
    """Run a study."""
    parser = argparse.ArgumentParser(prog="python -m randbasis.compare", description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", type=Path, required=True, help="folder of data sets and models")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of the raw rows")
    parser.add_argument("--workers", type=int, default=4, help="processes of one thread each")
    given = parser.parse_args()
    study = study_named(given.study, given.data)
    run_study(study, given.results / f"{study.name}.jsonl", workers=given.workers, console=Console(stderr=True))


if __name__ == "__main__":
    main()

"""What defaults are chosen by: ``sweep`` makes the missing runs, ``defaults`` writes the page of learning rates.

``rounding`` does both for ``fuse_rounding``, ``rates`` the page of the rates that comparisons tried. Studies
that compare methods are the files of ``randbasis compare``.
"""

import argparse
import time
from pathlib import Path

from rich.console import Console

from benchmarks.rows import RESULTS
from studies.defaults_page import write_page
from studies.rates import all_trials
from studies.rates_page import write_rates
from studies.rounding import ROUNDING, run_cells
from studies.rounding_page import write_rounding
from studies.sweep import DEFAULTS, SETS, grid, rivals, run_sweep
from studies.sweep_rows import read_rows

EXAMPLE = "example: python -m studies sweep --data DATA && python -m studies defaults"


def main(arguments: list[str] | None = None) -> None:
    """Make runs, or write a page.

    Args:
        arguments: of the command, ``None`` for those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m studies", description=__doc__, epilog=EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True)
    sweep = commands.add_parser("sweep", help="make the runs that defaults are chosen from", epilog=EXAMPLE)
    sweep.add_argument("--data", type=Path, required=True, help="folder of data sets and models")
    sweep.add_argument("--sets", default=",".join(SETS), help="which of them")
    sweep.add_argument("--seconds", type=float, help="begin no run after that many")
    defaults = commands.add_parser("defaults", help="write the page of defaults from those runs", epilog=EXAMPLE)
    defaults.add_argument("--page", type=Path, default=Path("docs/defaults.md"), help="the page to write")
    rounding = commands.add_parser("rounding", help="make the runs that fuse_rounding is judged by", epilog=EXAMPLE)
    rounding.add_argument("--data", type=Path, help="folder of data sets and models; none: write the page alone")
    rounding.add_argument("--seeds", type=int, default=3, help="of each method on each set")
    rounding.add_argument("--seconds", type=float, help="begin no cell after that many")
    rounding.add_argument("--page", type=Path, default=Path("docs/rounding.md"), help="the page to write")
    rates = commands.add_parser("rates", help="write the page of the rates that comparisons tried", epilog=EXAMPLE)
    rates.add_argument("--studies", type=Path, default=Path("studies"), help="folder of study files")
    rates.add_argument("--page", type=Path, default=Path("docs/results/rates.md"), help="the page to write")
    for command in (sweep, defaults, rounding, rates):
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of the raw rows")
    given = parser.parse_args(arguments)
    console = Console(stderr=True)
    if given.command == "sweep":
        cells = grid(given.sets.split(","))
        path, began = given.results / DEFAULTS, time.monotonic()
        run_sweep(cells, given.data, path, seconds=given.seconds, console=console)
        left = None if given.seconds is None else given.seconds - (time.monotonic() - began)
        run_sweep(rivals(read_rows(path)), given.data, path, seconds=left, console=console)
        return
    if given.command == "rounding":
        path = given.results / ROUNDING
        if given.data is not None:
            run_cells(given.data, path, seeds=given.seeds, seconds=given.seconds, console=console)
        write_rounding(read_rows(path), given.page)
        console.print(f"wrote {given.page}")
        return
    if given.command == "rates":
        write_rates(all_trials(given.studies, given.results), given.page)
        console.print(f"wrote {given.page}")
        return
    write_page(read_rows(given.results / DEFAULTS), given.page)
    console.print(f"wrote {given.page}")


if __name__ == "__main__":
    main()

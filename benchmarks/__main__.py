"""``python -m benchmarks [run|report|targets|list]``: run cases, write tables and pictures, judge the targets."""

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import machine, plots, registry, report, rows, store_page
from benchmarks.case import Case, chosen_sides, run
from benchmarks.tables import number
from benchmarks.targets import verdicts
from randbasis.errors import RandbasisError

TINY_TIMINGS = Path(".cache/benchmarks/tiny.csv")
COMMANDS = ("run", "report", "targets", "list")
FAILURES = (AssertionError, RuntimeError, ValueError, OSError, RandbasisError)
"""What stops one case and not the others."""


def main(words: Sequence[str] | None = None) -> int:
    """Parse the arguments and do what they say.

    Returns:
        0; 1 when a case failed, a target is missed or a page is stale; 2 when what was asked for cannot be done.
    """
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] not in (*COMMANDS, "-h", "--help"):
        words = ["run", *words]
    given = _parser().parse_args(words)
    console = Console(width=None if sys.stdout.isatty() else 150)
    if given.command == "list":
        return _list(given, console)
    if given.command == "run":
        return _run(given, console)
    runs = rows.newest(rows.read(given.input))
    return _report(given, runs, console) if given.command == "report" else _targets(given, runs, console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (("run", "check and time cases (the default)"), ("list", "name the cases")):
        command = commands.add_parser(name, help=about)
        command.add_argument("--only", nargs="+", default=[], metavar="WORD", help="families, or words of case names")
        command.add_argument("--sides", nargs="+", default=[], metavar="WORD", help="words of side names")
        command.add_argument("--model", help="words of the model's name, such as 'GPT-2 6'")
        command.add_argument("--tokens", type=int, help="tokens of the case")
        command.add_argument("--all", action="store_true", help="every case with every side")
        command.add_argument("--tiny", action="store_true", help="at sizes that say nothing about speed")
        command.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
        if name == "run":
            command.add_argument("--rounds", type=int, help="of every side; by default what fits the case's time")
            command.add_argument("--threads", type=int, default=4, help="of torch")
            command.add_argument("--again", action="store_true", help="also what is measured for this revision")
            command.add_argument("--within", type=float, metavar="SECONDS", help="begin no case after that time")
            command.add_argument("--output", type=Path, help=f"csv to append to; by default {rows.TIMINGS.name}")
    for name, about in (("report", "write the page's tables and pictures"), ("targets", "met or missed")):
        command = commands.add_parser(name, help=about)
        command.add_argument("--input", type=Path, default=rows.TIMINGS, help="csv to read")
        if name == "targets":
            command.add_argument("--device", choices=["cpu", "cuda"], help="only the targets for it")
        if name == "report":
            command.add_argument("--page", type=Path, nargs="+", default=report.PAGES, help="Markdown")
            command.add_argument("--pictures", type=Path, default=report.PICTURES, help="folder for them")
            command.add_argument("--check", action="store_true", help="only say whether the pages are up to date")
    return parser


def _selected(given: argparse.Namespace) -> list[Case]:
    cases = registry.all_cases(tiny=given.tiny, everything=given.all, device=given.device)
    return registry.select(cases, only=given.only, everything=given.all, model=given.model, tokens=given.tokens)


def _list(given: argparse.Namespace, console: Console) -> int:
    for case in _selected(given):
        console.print(f"[bold]{case.family}[/]: {case.name}", highlight=False)
        console.print(f"    {', '.join(chosen_sides(case, given.sides))}", highlight=False)
    return 0


def _run(given: argparse.Namespace, console: Console) -> int:
    if given.device == "cuda" and not torch.cuda.is_available():
        console.print("--device cuda needs a CUDA device and a torch built for it; there is none here", style="red")
        return 2
    torch.set_num_threads(given.threads)
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"(transformers|peft|torch)(\.|$)")
    output = given.output or (TINY_TIMINGS if given.tiny else rows.TIMINGS)
    known = [] if given.again else rows.read(output)
    cases = _selected(given)
    todo = [case for case in cases if not rows.is_measured(case, known, chosen_sides(case, given.sides))]
    if not cases:
        console.print("no case fits; `python -m benchmarks list --all` names them", style="red")
        return 2
    if len(todo) < len(cases):
        console.print(f"{len(cases) - len(todo)} of {len(cases)} cases are measured for {machine.revision()}; --again")
    began = time.monotonic()
    failed: list[str] = []
    while todo and (given.within is None or time.monotonic() - began < given.within):
        case = todo.pop(0)
        failed += [] if _run_one(case, given, output, console) else [case.name]
    if todo:
        left = "; ".join(case.name for case in todo)
        console.print(f"not begun within {given.within:g} s, run again to go on: {left}", style="red", highlight=False)
    if failed:
        console.print(f"failed, and not timed: {'; '.join(failed)}", style="red", highlight=False)
    return 1 if failed or todo else 0


def _run_one(case: Case, given: argparse.Namespace, output: Path, console: Console) -> bool:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=12), TimeElapsedColumn())
    load = machine.load()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(case.name, total=None)
        try:
            outcome = run(
                case,
                chosen_sides(case, given.sides),
                given.rounds,
                lambda doing: progress.update(task, description=f"{case.name}: {doing}"),
            )
        except FAILURES as error:
            console.print(f"{case.name}: {type(error).__name__}: {error}", style="red", markup=False, highlight=False)
            return False
    made = rows.rows_of(case, outcome, load)
    rows.append(output, made)
    console.print(_table(case, made))
    return True


def _table(case: Case, made: list[dict[str, str]]) -> Table:
    first = made[0]
    caption = f"{first['rounds']} rounds; {first['checked']}; load {first['load']} {first['note']}"
    table = Table(title=f"{case.family}: {case.name}", caption=caption)
    for column in ("side", f"median {case.quantity}", "p20-p80", "ratio", "p20-p80", "over", case.unit or "rate"):
        table.add_column(column)
    for row in made:
        values = [
            number(float(row[name])) for name in ("median", "p20", "p80", "ratio", "ratio_p20", "ratio_p80", "over")
        ]
        median, p20, p80, ratio, low, high, over = values
        table.add_row(row["side"], median, f"{p20}-{p80}", ratio, f"{low}-{high}", over, row["rate"])
    return table


def _report(given: argparse.Namespace, runs: list[rows.Run], console: Console) -> int:
    pages: list[Path] = given.page
    try:
        texts = {page: page.read_text(encoding="utf-8") for page in pages}
        made = {page: report.filled(text, runs) for page, text in texts.items()}
    except (OSError, ValueError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 2
    stale = [page for page in pages if made[page] != texts[page]]
    if given.check:
        for page in stale:
            console.print(f"{page} is stale: run `python -m benchmarks report`", style="red", highlight=False)
        return int(bool(stale))
    for page in stale:
        page.write_text(made[page], encoding="utf-8")
    for written in (*stale, *plots.draw(runs, given.pictures), *store_page.draw(pages)):
        console.print(f"wrote {written}", highlight=False)
    return 0


def _targets(given: argparse.Namespace, runs: list[rows.Run], console: Console) -> int:
    table = Table(title="targets")
    for column in ("target", "limit", "measured", "20-80 %", "", "where"):
        table.add_column(column)
    missed = 0
    for target, finding in verdicts(runs):
        if given.device is not None and target.on_gpu != (given.device == "cuda"):
            continue
        limit = f"{'≥' if target.at_least else '≤'} {target.limit:g}"
        if finding is None:
            table.add_row(target.name, limit, "", "", "not measured", "")
            continue
        met = target.is_met(finding)
        missed += not met
        interval = f"{finding.low:.3g}-{finding.high:.3g}"
        table.add_row(
            target.name, limit, f"{finding.value:.3g}", interval, "met" if met else "[red]missed", finding.where
        )
    console.print(table)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())

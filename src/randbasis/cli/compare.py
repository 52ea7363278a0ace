"""``randbasis compare``: methods side by side, from a study file to a report."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table
from typer import Argument, Option

from randbasis.cli.command import in_command_words
from randbasis.cli.console import answer_table, reported
from randbasis.cli.noise import readable_worker
from randbasis.cli.parameters import AsJson

if TYPE_CHECKING:
    from randbasis.compare.pool import Planned
    from randbasis.compare.record import Record
    from randbasis.compare.study import Job

commands = typer.Typer(rich_markup_mode="markdown")

DATA_VARIABLE = "RANDBASIS_DATA"


@commands.command(
    epilog="Example: randbasis compare studies/glue.toml --data DATA --cores 2 --output docs/results/glue"
)
def compare(
    study: Annotated[Path, Argument(help="TOML file: data, methods with their budgets and grids, seeds.")],
    data: Annotated[
        Path | None,
        Option(help="Folder of models and rows; by default RANDBASIS_DATA, else that of the study."),
    ] = None,
    results: Annotated[Path, Option(help="Folder of the file of runs, NAME.jsonl.")] = Path("benchmarks/results"),
    output: Annotated[Path | None, Option(help="Folder of the report; by default beside the file of runs.")] = None,
    cores: Annotated[int | None, Option(help="Processes of one thread each; by default one a core.")] = None,
    seconds: Annotated[float | None, Option(help="Begin no run after that many; a later call goes on.")] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="List the rows with their options and learning rates; train nothing.")
    ] = False,
    report_only: Annotated[
        bool, Option("--report-only", help="Write the report of what is there; needs no models and no rows.")
    ] = False,
    only: Annotated[list[str] | None, Option(help="Name of a data set; others are left out. May be repeated.")] = None,
    rows: Annotated[
        list[str] | None, Option(help="Pattern of names of rows, such as 'NOLA*'; the first stays. May be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train methods at the same budgets on the same rows, and report quality per byte.

    Every row tries as many learning rates, chosen by loss on rows that are held out. What has run is kept, so the
    command can be stopped and called again.
    """
    with reported(as_json):
        from randbasis.compare.record import read_records
        from randbasis.compare.report import write_report
        from randbasis.compare.study import usable
        from randbasis.compare.study_file import read_study
        from randbasis.files.text_files import read_text

        folder = data or (Path(os.environ[DATA_VARIABLE]) if DATA_VARIABLE in os.environ else None)
        whole = read_study(study, folder, must_exist=not report_only)
        asked = whole.limited(only or (), rows or ())
        runs, told = results / f"{whole.name}.jsonl", _Told()
        summary: dict[str, Any] = {"study": whole.name, "results": str(runs)}
        if not report_only:
            from randbasis.compare.pool import planned, run_study

            plan = planned(asked)
            if dry_run:
                answer_table(_planned_json(plan, runs), _planned_table(plan), as_json)
                return
            count = (os.cpu_count() or 1) if cores is None else cores
            run_study(
                plan,
                runs,
                cores=count,
                seconds=seconds,
                told=told,
                failed=told.failed,
                prepare=partial(readable_worker, in_command_words),
            )
            now = plan.progress(read_records(runs))
            summary |= {"missing": now.total() - len(now.records), "impossible": list(plan.impossible)}
            summary |= {"diverged": now.diverged(), "failed": told.failures}
            found = now.records
        else:
            found = usable(asked, read_records(runs))
        prose = study.with_suffix(".md")
        comments = read_text(prose) if prose.is_file() else ""
        written = write_report(asked, found, output or results / whole.name, comments)
        summary |= {"runs": len(found), "report": [str(path) for path in written]}
        answer_table(summary, _summary_table(summary), as_json)
        if told.failures:
            raise typer.Exit(1)


class _Told:
    """One line a run."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.failures: list[str] = []

    def failed(self, job: "Job", error: Exception) -> None:
        """Say which run failed, and go on."""
        what = f"{job.data} · {job.row} · {job.phase} · rate {job.rate:g} · seed {job.seed}"
        self.failures.append(f"{what}: {type(error).__name__}: {error}")
        self.console.print(f"failed: {self.failures[-1]}", highlight=False, soft_wrap=True, markup=False)

    def __call__(self, record: "Record", done: int, total: int) -> None:
        scores = ", ".join(f"{k} {v:.4f}" for k, v in record.points[0].scores.items()) if record.points else "diverged"
        what = f"{record.data} · {record.row} · {record.phase} · rate {record.rate:g} · seed {record.seed}"
        self.console.print(
            f"{done}/{total} {what}: {scores} ({record.seconds:.0f} s)", highlight=False, soft_wrap=True, markup=False
        )


def _planned_json(plan: "Planned", runs: Path) -> dict[str, Any]:
    from randbasis.compare.budgets import sized
    from randbasis.compare.runs import surroundings
    from randbasis.compare.study import trial_rates

    rows = [
        {
            "data": data.name,
            "row": row.name,
            "method": row.method,
            "options": sized(row, surroundings(data).shapes),
            "rates": trial_rates(plan.middles[data.name, row.name], plan.study.trials),
            "seeds": plan.study.seeds,
        }
        for data in plan.study.data
        for row in plan.study.rows_on(data)
    ]
    return {"study": plan.study.name, "runs": plan.progress([]).total(), "results": str(runs), "rows": rows,
            "impossible": list(plan.impossible)}  # fmt: skip


def _planned_table(plan: "Planned") -> Table:
    found = _planned_json(plan, Path())
    table = Table(title=f"{found['study']}: {found['runs']} runs", caption="\n".join(found["impossible"]) or None)
    for name in ("data", "row", "options", "learning rates tried"):
        table.add_column(name)
    for row in found["rows"]:
        options = ", ".join(f"{key} {value}" for key, value in row["options"].items())
        table.add_row(row["data"], row["row"], options, ", ".join(f"{rate:g}" for rate in row["rates"]))
    return table


def _summary_table(summary: dict[str, Any]) -> Table:
    table = Table(show_header=False)
    for key, value in summary.items():
        table.add_row(key, "\n".join(cast("list[str]", value)) if isinstance(value, list) else str(value))
    return table

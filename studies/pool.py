"""A study, run by several processes of one thread each; what has ended is on disk, and a rerun goes on from there."""

import multiprocessing
import os
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from studies.runs import run_job
from studies.study import Job, Record, Study, all_jobs_count, ready_jobs, usable


def read_records(path: Path) -> list[Record]:
    """The records of a file of results, none when it does not exist; a line cut by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Record.of_line(line) for line in lines if line.endswith("}")]


def run_study(study: Study, path: Path, *, workers: int, console: Console | None = None) -> list[Record]:
    """Run what is missing.

    Args:
        study: what to run.
        path: its file of results, one line a run; each line is written when its run ends.
        workers: processes; 0 runs in this one.
        console: where to show progress, ``None`` for nowhere.

    Returns:
        The records of the study as it is now.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    records = read_records(path)
    with _progress(console) as progress, path.open("a", encoding="utf-8") as file:
        if file.tell() and not path.read_text(encoding="utf-8").endswith("\n"):
            file.write("\n")  # a crash cut the last line; the next one must not join it
        bar = progress.add_task(study.name, total=all_jobs_count(study), completed=len(usable(study, records)))
        for record in _ended(study, records, workers):
            file.write(record.line() + "\n")
            file.flush()
            records.append(record)
            progress.update(bar, completed=len(usable(study, records)))
            if console:
                console.print(_line(record), highlight=False)
    return usable(study, records)


def _ended(study: Study, records: list[Record], workers: int) -> Iterator[Record]:
    """Records in the order in which runs end; ``records`` is read again after each, and grows as the caller adds."""
    if workers == 0:
        while jobs := ready_jobs(study, records):
            yield run_job(study, jobs[0])
        return
    with _executor(workers) as executor:
        running: dict[Future[Record], Job] = {}
        while True:
            started = set(running.values())
            waiting = [job for job in ready_jobs(study, records) if job not in started]
            for job in waiting[: workers - len(running)]:
                running[executor.submit(run_job, study, job)] = job
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                del running[future]
                yield future.result()


@contextmanager
def _executor(workers: int) -> Generator[Executor]:
    """Fresh processes whose libraries see one thread each."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"), TOKENIZERS_PARALLELISM="false")
    executor = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _progress(console: Console | None) -> Generator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console or Console(quiet=True), disable=console is None) as progress:
        yield progress


def _line(record: Record) -> str:
    job = record.job
    scores = ", ".join(f"{name} {value:.4f}" for name, value in record.scores.items()) or "diverged"
    what = f"{job.setting} · {job.row} · {job.phase} · rate {job.rate:g} · seed {job.seed}"
    return f"{what}: {scores} ({record.seconds:.0f} s)"

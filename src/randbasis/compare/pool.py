"""JOBS → RECORDS: a study, run by several processes of one thread each; what has ended is on disk."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

from randbasis.compare.budgets import Shape, sized
from randbasis.compare.cells import read_cell
from randbasis.compare.record import Record, append_record, options_text, read_records
from randbasis.compare.rivals import configuration
from randbasis.compare.runs import middle_of, run_job, surroundings
from randbasis.compare.study import Data, Job, Progress, Row, Study, usable
from randbasis.errors import RandbasisError, StudyError, near
from randbasis.train.task import Task

Told = Callable[[Record, int, int], None]
"""Called with each record as its run ends, how many there are, and how many there will be."""
Failed = Callable[[Job, Exception], None]
"""Called with a run that failed, and why; the others go on."""


@dataclass(frozen=True)
class Planned:
    """A study with what has to be known before its first run.

    Attributes:
        study: without the rows that have no configuration on any data set.
        middles: ``(data, row)`` → the learning rate in the middle of those that are tried.
        options: ``(data, row)`` → those of the method, the size included that a budget means, as text.
        sources: data set → digest of its files.
        impossible: what was left out, and why, one sentence each.
    """

    study: Study
    middles: dict[tuple[str, str], float]
    options: dict[tuple[str, str], str]
    sources: dict[str, str]
    impossible: tuple[str, ...] = field(default=())

    def progress(self, records: list[Record]) -> Progress:
        """Where the study stands, without runs of other files or of a size that a budget no longer means."""
        valid = [
            one
            for one in records
            if one.options == self.options.get((one.data, one.row)) and one.sources == self.sources.get(one.data)
        ]
        return Progress(self.study, self.middles, usable(self.study, valid))


def planned(study: Study) -> Planned:
    """Find the size and the learning rates of each row on each data set; reads models, trains nothing.

    Raises:
        StudyError: a row has options that its method cannot have, or the task does not measure the metric.
    """
    middles: dict[tuple[str, str], float] = {}
    options: dict[tuple[str, str], str] = {}
    sources: dict[str, str] = {}
    impossible: list[str] = []
    data_of: dict[str, list[str]] = {row.name: [] for row in study.rows}
    for data in study.data:
        around, task = surroundings(data), read_cell(data, 0).task
        sources[data.name] = around.sources
        if data.metric not in task.metric_names:
            raise StudyError(
                f"{data.name}: metric {data.metric!r} is none of this task on these rows; "
                f"{near(data.metric, task.metric_names)}"
            )
        for row in study.rows_on(data):
            try:
                found = sized(row, around.shapes)
            except StudyError as error:
                impossible.append(f"{data.name}: {error}")
                continue
            _check_options(data, row, found, around.shapes, task)
            options[data.name, row.name] = options_text(found)
            middles[data.name, row.name] = middle_of(data, row)
            data_of[row.name].append(data.name)
    rows = tuple(replace(row, data=tuple(data_of[row.name])) for row in study.rows if data_of[row.name])
    return Planned(replace(study, rows=rows), middles, options, sources, tuple(impossible))


def _check_options(data: Data, row: Row, options: dict[str, Any], shapes: Sequence[Shape], task: Task) -> None:
    """Make the configuration once, before anything is trained."""
    try:
        configuration(
            row.method, options, shapes, targets=data.targets, seed=0, task_type=task.peft_task_type, head=[]
        )  # fmt: skip
    except (RandbasisError, ValueError, TypeError) as error:
        raise StudyError(f"{data.name}: row {row.name!r}: {error}") from error


def run_study(
    plan: Planned,
    path: Path,
    *,
    cores: int,
    seconds: float | None = None,
    told: Told | None = None,
    failed: Failed | None = None,
    prepare: Callable[[], None] | None = None,
) -> list[Record]:
    """Make the runs that are missing.

    Args:
        plan: what to run.
        path: its file of results; a line is added when a run ends, so a kill loses only the runs under way.
        cores: processes of one thread; 0 runs in this one.
        seconds: begin no run after that many.
        told: is told of each run that ends.
        failed: is told of each run that fails, which is not tried again in this call; None raises.
        prepare: is called in each process before its first run; a function of a module.

    Returns:
        The records of the study as it is now.
    """
    records, until = read_records(path), None if seconds is None else time.monotonic() + seconds
    lost: set[Job] = set()

    def ready() -> list[Job]:
        if until is not None and time.monotonic() > until:
            return []
        return [job for job in plan.progress(records).ready() if job not in lost]

    for job, result in _ended(plan.study, ready, cores, prepare):
        if isinstance(result, Exception):
            if failed is None:
                raise result
            lost.add(job)
            failed(job, result)
            continue
        append_record(path, result)
        records.append(result)
        if told is not None:
            now = plan.progress(records)
            told(result, len(now.records), now.total())
    return list(plan.progress(records).records)


def _ended(
    study: Study, ready: Callable[[], list[Job]], cores: int, prepare: Callable[[], None] | None
) -> Iterator[tuple[Job, Record | Exception]]:
    """Jobs and what came of them in the order in which they end; ``ready`` is asked again after each."""
    if cores == 0:
        while jobs := ready():
            yield jobs[0], _tried(study, jobs[0])
        return
    with _executor(cores, prepare) as executor:
        running: dict[Future[Record | Exception], Job] = {}
        while True:
            started = set(running.values())
            waiting = [job for job in ready() if job not in started]
            for job in waiting[: cores - len(running)]:
                running[executor.submit(_tried, study, job)] = job
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool as error:
                    raise StudyError(
                        f"a process ended in the middle of {job.data}, {job.row} or a run beside it: it was killed, or "
                        "memory ran out. Runs that had ended are kept: call the command again, with fewer --cores "
                        "where memory was short"
                    ) from error
                yield job, result


def _tried(study: Study, job: Job) -> Record | Exception:
    """The record of a run, or what it raised; a worker that dies takes the study with it."""
    try:
        return run_job(study, job)
    except Exception as error:  # noqa: BLE001 - any fault of one method must not cost the others' runs
        return error


def _begin_worker(prepare: Callable[[], None] | None) -> None:
    """A worker waits for jobs on a pipe that its neighbours hold open, too: a kill of the command must end them all."""
    command = multiprocessing.parent_process()
    assert command is not None

    def watch() -> None:
        connection.wait([command.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if prepare is not None:
        prepare()


@contextmanager
def _executor(cores: int, prepare: Callable[[], None] | None) -> Generator[Executor]:
    """Fresh processes whose libraries see one thread each."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    before = {name: os.environ.get(name) for name in (*names, "TOKENIZERS_PARALLELISM")}
    os.environ.update(dict.fromkeys(names, "1"), TOKENIZERS_PARALLELISM="false")
    executor = ProcessPoolExecutor(
        cores, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_worker, initargs=(prepare,)
    )
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

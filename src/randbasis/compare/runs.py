"""JOB → RECORD: one run, and all that depends on it, so that it comes out alike in any process."""

import ctypes
import gc
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from randbasis.compare.budgets import Shape, adapted_shapes, sized
from randbasis.compare.cells import Cell, read_cell
from randbasis.compare.forgetting import perplexity
from randbasis.compare.lora_precision import settle, train_at_bits
from randbasis.compare.points import as_stored, bytes_of, header_bytes
from randbasis.compare.record import Point, Record
from randbasis.compare.rivals import TRAINED_AT, configuration, middle_rate
from randbasis.compare.sources import digest_of
from randbasis.compare.starts import Start, started
from randbasis.compare.study import WHOLE, Data, Job, PointSpec, Row, Study, fingerprint
from randbasis.errors import NonFiniteLossError
from randbasis.methods.bound import Delta
from randbasis.train import CausalLanguage, FitResult, LoopSettings, Task, fit
from randbasis.train.model_reading import width_of
from randbasis.train.threads import torch_threads
from randbasis.train.trained_parameters import save_parameters
from randbasis.tuner.layer import RandbasisLinear

PACKAGES = ("randbasis", "torch", "transformers", "peft")
AS_TRAINED = PointSpec()


@dataclass(frozen=True)
class Surroundings:
    """What all runs on a data set share.

    Attributes:
        shapes: the adapted matrices.
        header: bytes of the header of a packed file for them.
        width: of the hidden states of the base.
        sources: digest of its files.
    """

    shapes: tuple[Shape, ...]
    header: int
    width: int | None
    sources: str


@lru_cache(maxsize=8)
def surroundings(data: Data) -> Surroundings:
    """Read the model of a data set and look at it."""
    task = read_cell(data, 0).task
    model = task.load_model(data.base.model, dtype="float32", seed=0)
    head, width = task.head_modules(model), width_of(getattr(model, "config", None))
    shapes = adapted_shapes(model, data.targets, head)
    again = task.load_model(data.base.model, dtype="float32", seed=0)
    return Surroundings(tuple(shapes), header_bytes(again, data.targets, head), width, digest_of(data))


def middle_of(data: Data, row: Row) -> float:
    """The learning rate in the middle of those that a row tries on a data set."""
    return row.rate or middle_rate(row.method, data.base.task, surroundings(data).width)


@dataclass
class _Measures:
    """What is measured while a run trains."""

    forwards: list[float] = field(default_factory=list[float])

    def watch(self, model: nn.Module) -> None:
        def note(module: nn.Module, inputs: Any) -> None:
            self.forwards.append(time.perf_counter())

        model.register_forward_pre_hook(note)

    @property
    def step(self) -> float:
        """Seconds from one pass to the next, in the middle."""
        gaps = [b - a for a, b in zip(self.forwards, self.forwards[1:], strict=False)]
        return statistics.median(gaps) if gaps else 0.0


def run_job(study: Study, job: Job) -> Record:
    """Train and score.

    Args:
        study: what the job is of.
        job: the run.

    Returns:
        Its record; without points when the loss stopped being finite.
    """
    data, row = study.data_named(job.data), study.row_named(job.row)
    cell, around = read_cell(data, job.seed % data.sample_sets), surroundings(data)
    options = sized(row, around.shapes)

    def load() -> nn.Module:
        return cell.task.load_model(data.base.model, dtype="float32", seed=job.seed)

    model = load()
    head = cell.task.head_modules(model)
    config = configuration(
        row.method, options, around.shapes, targets=data.targets, seed=job.seed,
        task_type=cell.task.peft_task_type, head=head,
    )  # fmt: skip
    measures, before = _Measures(), None
    with torch_threads(1):
        forgets = data.forgetting if job.phase == "final" else None
        tokenizer = getattr(cell.task, "tokenizer", None)
        if forgets is not None:
            before = perplexity(model, tokenizer, forgets)
        memory, began = _reset_peak(), time.process_time()
        result, points = None, ()
        try:
            if config is not None or head or row.method == WHOLE:
                loop = _loop(data, job)
                with started(row, config, cell, data, loop, load) as start:
                    result = _trained(model, start, cell, loop, row, measures)
                model = result.model
            seconds, peak = time.process_time() - began, _peak(memory)
            saved = _saved_bytes(model) if result else 0
            points = tuple(
                _point(model, cell, data, job, spec, saved, result, forgets) for spec in _specs(row, job.phase)
            )
        except NonFiniteLossError:
            seconds, peak = time.process_time() - began, 0
    return Record(
        study=study.name, data=data.name, row=row.name, curve=row.curve, method=row.method, phase=job.phase,
        rate=job.rate, head_rate=job.head_rate, seed=job.seed, fingerprint=fingerprint(study, data, row),
        configuration=options, coefficients=result.coefficients if result else 0,
        head_parameters=result.head_parameters if result else 0, points=points, seconds=round(seconds, 2),
        step_seconds=round(measures.step, 5), peak_bytes=peak, expand_seconds=_expansion(model),
        base_perplexity=before, date=datetime.now(UTC).strftime("%Y-%m-%d"),
        versions={package: version(package) for package in PACKAGES},
        machine=f"{platform.machine()}, {os.cpu_count()} cores, one thread", sources=around.sources,
    )  # fmt: skip


def _specs(row: Row, phase: str) -> tuple[PointSpec, ...]:
    if phase == "trial" or not row.adapted:
        return (AS_TRAINED,)
    specs = list(row.points)
    bits = dict(row.options).get(TRAINED_AT)
    if bits is not None and PointSpec(bits) not in specs:  # what it was trained for
        specs.append(PointSpec(bits))
    return (AS_TRAINED, *(spec for spec in specs if spec != AS_TRAINED))


def _trained(
    model: nn.Module, start: Start, cell: Cell, loop: LoopSettings, row: Row, measures: _Measures
) -> FitResult:
    """``fit`` scores before and after training; one batch does for that, because the whole set is scored afterwards."""
    bits = dict(row.options).get(TRAINED_AT) if row.method == "lora" else None

    def prepare(adapted: nn.Module) -> None:
        measures.watch(adapted)
        if bits is not None:
            train_at_bits(adapted, bits)

    with tempfile.TemporaryDirectory(prefix="randbasis-compare-") as folder:
        result = fit(
            model,
            start.config,
            cell.task,
            train=cell.train,
            eval=cell.dev[: loop.batch_size],
            loop=loop,
            checkpoints=folder,
            prepare=prepare,
            whole=row.method == WHOLE,
            origin=start.origin,
        )
    settle(result.model)
    return result


def _loop(data: Data, job: Job) -> LoopSettings:
    """One evaluation at the end, and the last parameters kept: no run chooses its own best step."""
    steps = data.trial_steps if job.phase == "trial" else data.steps
    return replace(
        data.base.loop,
        max_steps=steps,
        learning_rate=job.rate,
        head_learning_rate=job.head_rate,
        train_seed=job.seed,
        eval_every=steps,
        keep="last",
    )


def _point(
    model: nn.Module, cell: Cell, data: Data, job: Job, spec: PointSpec, saved: int, result: FitResult | None,
    forgets: str | None,
) -> Point:  # fmt: skip
    rows = cell.dev if job.phase == "trial" else cell.test
    around, head = surroundings(data), result.head_parameters if result else 0
    stored = bytes_of(model, spec, head, around.header, saved)
    with as_stored(model, spec):
        with _generating(cell.task, job.phase == "final"):
            scores = cell.task.score(model, rows, data.base.loop.eval_batch_size or 64)
        left = None if forgets is None else perplexity(model, getattr(cell.task, "tokenizer", None), forgets)
    name = "as trained" if spec == AS_TRAINED else spec.name
    return Point(name, spec.bits, spec.rank, stored.total, stored.head, scores, left)


@contextmanager
def _generating(task: Task, wanted: bool) -> Generator[None]:
    """A language model is scored by the texts that it writes, too."""
    if not (wanted and isinstance(task, CausalLanguage)):
        yield
        return
    task.with_generation = True
    try:
        yield
    finally:
        task.with_generation = False


def _saved_bytes(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory(prefix="randbasis-compare-") as folder:
        save_parameters(model, Path(folder))
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


@torch.no_grad()
def _expansion(model: nn.Module) -> float | None:
    """Seconds in which the factors of all matrices are made once from seed and coefficients, nothing kept."""
    deltas = [
        Delta(one.bound, layer.coefficients("default", one))
        for layer in model.modules()
        if isinstance(layer, RandbasisLinear)
        for one in layer.matrices("default")
    ]
    if not deltas or deltas[0].bound.method.needs_base:
        return None
    fresh = [replace(one.bound.method, basis_storage="recompute").bind(one.bound.site) for one in deltas]
    fresh[0].factors(deltas[0].coefficients)  # what a process compiles once is not the method's time
    began = time.perf_counter()
    for one, bound in zip(deltas, fresh, strict=True):
        bound.factors(one.coefficients)
    return round(time.perf_counter() - began, 5)


# --- memory ---


def _reset_peak() -> int:
    """Let Linux count the peak of this process anew; the bytes that it holds now.

    What earlier runs have freed goes back first, else the run grows into it and seems to need nothing.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library, whose freed memory nobody can tell apart
        return 0
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return 0


def _peak(before: int) -> int:
    """Bytes by which the process has grown at its largest since :func:`_reset_peak`; 0 where nobody counts."""
    return max(0, _status("VmHWM") - before) if before else 0


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0

"""One run: a job to a record. All that depends on the job, so that it comes out alike in any process."""

import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from randbasis.errors import NonFiniteLossError
from randbasis.train import AdapterSettings, CausalLanguage, LoopSettings, fit, peft_config
from randbasis.train.threads import torch_threads
from randbasis.train.trained_parameters import save_parameters
from randbasis.train.trainer import parameter_groups
from studies.budgets import Shape, adapted_shapes, configure
from studies.cells import Cell, read_cell
from studies.precision import quantize_lora, quantized, settle_lora
from studies.study import Job, Record, Row, Setting, Study, fingerprint

PACKAGES = ("randbasis", "torch", "transformers", "peft")


def run_job(study: Study, job: Job) -> Record:
    """Train and score.

    Args:
        study: what the job is of.
        job: the run.

    Returns:
        Its record; without scores when the loss stopped being finite.
    """
    setting, row = study.setting(job.setting), study.row(job.row)
    cell = read_cell(setting, job.seed % setting.sample_sets)
    adapter = replace(adapter_of(setting, row), seed=job.seed)
    rows = cell.dev if job.phase == "sweep" else cell.test
    model = cell.task.load_model(setting.base.model, dtype="float32", seed=job.seed)
    began = time.process_time()
    scores: dict[str, float] = {}
    afterwards: dict[str, dict[str, float]] = {}
    coefficients = head = 0
    with torch_threads(setting.base.loop.threads):
        try:
            if row.adapted or setting.has_head:
                model, coefficients, head = _trained(model, adapter, cell, _loop(setting, job), row.bits)
            seconds = time.process_time() - began
            batch_size = setting.base.loop.eval_batch_size or 64
            with _generating(cell, job.phase == "final"):
                scores = cell.task.score(model, rows, batch_size)
                for bits in row.afterwards if job.phase == "final" else ():
                    with quantized(model, bits):
                        afterwards[str(bits)] = cell.task.score(model, rows, batch_size)
        except NonFiniteLossError:
            seconds = time.process_time() - began
    return Record(
        job=job,
        fingerprint=fingerprint(setting, row),
        scores=scores,
        configuration=_shown(adapter),
        coefficients=coefficients,
        head_parameters=head,
        file_bytes=_file_bytes(model) if coefficients + head else 0,
        seconds=round(seconds, 2),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        versions={package: version(package) for package in PACKAGES},
        vectors=len(parameter_groups(model)["adapter"]) if row.adapted else 0,
        afterwards=afterwards,
    )


def _trained(
    model: nn.Module, adapter: AdapterSettings, cell: Cell, loop: LoopSettings, bits: int | None
) -> tuple[nn.Module, int, int]:
    """The trained model, the coefficients of its adapter, the parameters of its head.

    ``fit`` scores before and after training; one batch does for that, because the whole set is scored afterwards.
    """
    config = peft_config(adapter, task_type=cell.task.peft_task_type, head=cell.task.head_modules(model))
    prepare = partial(quantize_lora, bits=bits) if bits and adapter.method == "lora" else None
    with tempfile.TemporaryDirectory(prefix="randbasis-compare-") as folder:
        result = fit(
            model,
            config,
            cell.task,
            train=cell.train,
            eval=cell.dev[: loop.batch_size],
            loop=loop,
            checkpoints=folder,
            prepare=prepare,
        )
    if prepare is not None:
        settle_lora(result.model)
    return result.model, result.coefficients, result.head_parameters


def _loop(setting: Setting, job: Job) -> LoopSettings:
    """One evaluation at the end, and the last parameters kept: no run chooses its own best step."""
    loop = setting.base.loop
    steps = setting.sweep_steps if job.phase == "sweep" else loop.max_steps
    return replace(
        loop,
        max_steps=steps,
        learning_rate=job.rate,
        head_learning_rate=job.head_rate,
        train_seed=job.seed,
        eval_every=steps,
        keep="last",
        device="cpu",
    )


def adapter_of(setting: Setting, row: Row) -> AdapterSettings:
    """The adapter that a row's budget means in a setting, without its seed; reads the model."""
    return configure(row, _shapes(setting), setting.targets)


@lru_cache(maxsize=8)
def _shapes(setting: Setting) -> list[Shape]:
    task = read_cell(setting, 0).task
    model = task.load_model(setting.base.model, dtype="float32", seed=0)
    return adapted_shapes(model, setting.targets, task.head_modules(model))


@contextmanager
def _generating(cell: Cell, wanted: bool) -> Generator[None]:
    """A language model is scored by the texts it writes, too."""
    if not (wanted and isinstance(cell.task, CausalLanguage)):
        yield
        return
    cell.task.with_generation = True
    try:
        yield
    finally:
        cell.task.with_generation = False


def _file_bytes(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory(prefix="randbasis-compare-") as folder:
        save_parameters(model, Path(folder))
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _shown(adapter: AdapterSettings) -> dict[str, Any]:
    """The hyper-parameters that were set, without the seed, which the job has."""
    standard = asdict(AdapterSettings())
    values = asdict(adapter)
    return {k: v for k, v in values.items() if k == "method" or (k != "seed" and v != standard[k])}

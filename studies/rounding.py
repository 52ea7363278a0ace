"""``W0 + ΔW`` rounded to half precision in training, against the exact product: the runs that its default rests on.

A cell is one method on one set with one seed. It is trained four times on a base in bfloat16, alike but for the
product, and always evaluated exactly: ``exact`` (a product of ΔW's own), ``token order`` (as exact, in another order:
how far runs part by nothing but the last bits), ``nearest`` and ``stochastic`` (one matrix, rounded). The four rows of
a cell are written together, since the distances are to its exact run; a rerun makes the cells that are missing.
"""

import csv
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.machine import revision
from randbasis.compare.cells import Cell, read_cell
from randbasis.compare.study import Data
from randbasis.train import AdapterSettings, fit, peft_config
from randbasis.train.default_choices import HEAD_RATES, METHODS
from randbasis.train.loop import FitResult
from randbasis.tuner.config import RandbasisConfig
from randbasis.tuner.layer import RandbasisLinear
from studies.sweep import HEAD_RATE, default_rate, sweep_setting, task_of
from studies.sweep_rows import read_rows

ROUNDING = "rounding.csv"
"""The rows, in the folder of results."""
COLUMNS = ("set", "method", "seed", "product", "steps", "rate", "metric", "score", "eval_loss", "train_loss",
           "distance", "seconds", "date", "revision")  # fmt: skip
KEY = COLUMNS[:3]
STEPS: Mapping[str, int] = {"sst2": 120, "e2e": 120}
TARGETS: Mapping[str, tuple[str, ...]] = {"sst2": ("query", "value"), "e2e": ("all-linear",)}
BATCH = 8
TRAINED = ("randlora", "nola", "vera")
PRODUCTS: Mapping[str, tuple[str, str]] = {
    "exact": ("weight", "none"),
    "token order": ("token", "none"),
    "nearest": ("weight", "nearest"),
    "stochastic": ("weight", "stochastic"),
}
"""Name → ``contraction`` and ``fuse_rounding``."""
LAST = 25
"""Steps at the end whose mean loss is a row's ``train_loss``."""


@dataclass(frozen=True)
class RoundingCell:
    """Four runs that differ in their product alone."""

    set: str
    method: str
    seed: int

    def key(self) -> tuple[str, ...]:
        """What tells the cell from others, as the csv has it."""
        return self.set, self.method, str(self.seed)


def cells(seeds: int) -> Iterator[RoundingCell]:
    """All of them, a seed after the other, so that what a shorter time allows is whole."""
    for seed in range(seeds):
        for name in STEPS:
            yield from (RoundingCell(name, method, seed) for method in TRAINED)


def run_cells(
    data: Path, path: Path, *, seeds: int = 3, seconds: float | None = None, console: Console | None = None
) -> None:
    """Make the cells that a csv lacks, one after another, until the time is up.

    Args:
        data: folder of data sets and models.
        path: the csv.
        seeds: of each method on each set.
        seconds: no cell is begun after that many; ``None`` for all.
        console: where to tell of each row, ``None`` for nowhere.
    """
    began = time.monotonic()
    for cell in cells(seeds):
        if cell.key() in {tuple(row[name] for name in KEY) for row in read_rows(path)}:
            continue
        if seconds is not None and time.monotonic() - began > seconds:
            return
        rows = run_cell(cell, data)
        new = not path.exists()
        with path.open("a", encoding="utf-8", newline="") as file:
            writer: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)
        for row in rows if console else ():
            cast("Console", console).print(*(row[name] for name in COLUMNS[:-2]), highlight=False)


def run_cell(cell: RoundingCell, data: Path, steps: int | None = None) -> list[dict[str, str]]:
    """The rows of a cell, that of the exact run first.

    Args:
        cell: which.
        data: folder of data sets and models.
        steps: of each run; those of :data:`STEPS` if None.
    """
    setting, rows = sweep_setting(cell.set, data), _rows(cell.set, data)
    found: list[dict[str, str]] = []
    exact: list[Tensor] = []
    for product in PRODUCTS:
        began = time.process_time()
        result = _fit(cell, product, setting, rows, steps or STEPS[cell.set])
        scores = rows.task.score(result.model, rows.dev, 64)
        changes = _changes(result.model)
        exact = exact or changes
        losses = [float(one["loss"]) for one in result.history if "loss" in one]
        values = dict(zip(KEY, cell.key(), strict=True)) | {
            "product": product,
            "steps": f"{result.steps}",
            "rate": f"{default_rate(cell.set, cell.method):g}",
            "metric": rows.task.metric,
            "score": f"{scores[rows.task.metric]:.4f}",
            "eval_loss": f"{scores['loss']:.5f}",
            "train_loss": f"{sum(losses[-LAST:]) / len(losses[-LAST:]):.5f}",
            "distance": f"{_distance(changes, exact):.4f}",
            "seconds": f"{time.process_time() - began:.1f}",
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "revision": revision(),
        }
        found.append({name: values[name] for name in COLUMNS})
    return found


def _fit(cell: RoundingCell, product: str, setting: Data, rows: Cell, steps: int) -> FitResult:
    task = task_of(cell.set)
    loop = replace(
        setting.base.loop,
        dtype="bfloat16",
        batch_size=BATCH,
        max_steps=steps,
        eval_every=steps,
        logging_steps=1,
        learning_rate=default_rate(cell.set, cell.method),
        head_learning_rate=HEAD_RATE if task in HEAD_RATES else None,
        train_seed=cell.seed,
    )
    model = rows.task.load_model(setting.base.model, dtype="bfloat16", seed=cell.seed)
    basis = METHODS[cell.method].basis_for.get(task)
    adapter = AdapterSettings(method=cell.method, basis=basis, seed=cell.seed, targets=TARGETS[cell.set])
    config = peft_config(adapter, task_type=rows.task.peft_task_type, head=rows.task.head_modules(model))
    assert isinstance(config, RandbasisConfig)
    config.contraction, config.fuse_rounding = PRODUCTS[product]
    with tempfile.TemporaryDirectory(prefix="randbasis-rounding-") as folder:
        few = rows.dev[:BATCH]  # fit scores before and after; all of them are scored once, below
        return fit(model, config, rows.task, train=rows.train, eval=few, loop=loop, checkpoints=folder)


@torch.no_grad()
def _changes(model: nn.Module) -> list[Tensor]:
    """ΔW of each layer as it is evaluated, before it is rounded to the dtype of the base."""
    layers = [module for module in model.modules() if isinstance(module, RandbasisLinear)]
    return [
        torch.cat([one.bound.matrix(layer.coefficients("default", one)) for one in layer.matrices("default")])
        for layer in layers
    ]


def _distance(changes: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Of all layers together, relative to the exact ones."""
    apart = sum(float((one - other).double().square().sum()) for one, other in zip(changes, exact, strict=True))
    return (apart / sum(float(one.double().square().sum()) for one in exact)) ** 0.5


@lru_cache(maxsize=2)
def _rows(name: str, data: Path) -> Cell:
    return read_cell(sweep_setting(name, data), 0)

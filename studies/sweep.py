"""The sweep that default learning rates are chosen from: methods at their default size, rates half a decade apart.

Every run is one row of a csv, written when it ends; a rerun makes what is missing. The rows to train on are few, so
that a run lasts seconds on one core.
"""

import csv
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from rich.console import Console

from benchmarks.machine import revision
from randbasis.compare.cells import Cell, read_cell
from randbasis.compare.study import LANGUAGE, Data
from randbasis.errors import NonFiniteLossError
from randbasis.train import AdapterSettings, DataSettings, LoopSettings, TrainSettings, fit, peft_config
from randbasis.train.default_choices import HEAD_RATES, METHODS, SWEPT, choose
from randbasis.train.loop import FitResult
from studies.sweep_rows import Points, Row, points_of, read_rows

COLUMNS = ("set", "method", "rank", "basis", "alpha", "rate", "head_rate", "seed", "steps", "coefficients", "metric",
           "before", "after", "loss_before", "loss_after", "seconds", "date", "revision")  # fmt: skip
KEY = COLUMNS[: COLUMNS.index("seed") + 1]
DEFAULTS = "defaults.csv"
"""The rows, in the folder of results."""
SETS = ("sst2", "e2e", "flowers12", "stsb", "rte", "sst2-long", "rte-long")
CONTROLS = ("sst2-long", "rte-long")
"""Sets where the defaults alone are run: whether they last longer, and whether RTE is learned in three epochs."""
AGAIN = (1, 2)
"""Further seeds of the default and of its best rival: with one seed two points are noise."""
HALF_DECADES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
HEAD_RATE = 3e-3


@dataclass(frozen=True)
class SweepCell:
    """One run of the sweep.

    Args:
        set: name of the data, one of :data:`SETS`.
        adapter: method, rank, basis, alpha, seed.
        rate: learning rate of the adapter.
        head_rate: learning rate of the head; ``None`` where there is no head.
    """

    set: str
    adapter: AdapterSettings
    rate: float
    head_rate: float | None

    def key(self) -> tuple[str, ...]:
        """What tells the run from others, as the csv has it."""
        one = self.adapter
        values = (self.set, one.method, one.rank, one.basis, one.alpha, self.rate, self.head_rate, one.seed)
        return tuple("" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
                     for value in values)  # fmt: skip


def grid(sets: Iterable[str] = SETS, reach: int = 2) -> Iterator[SweepCell]:
    """The defaults of every set first, then what is half a decade away from them, and so on.

    Args:
        sets: names.
        reach: half decades to either side.
    """
    for away in range(reach + 1):
        for name in sets:
            for method in METHODS if not (away and name in CONTROLS) else ():
                taken = default_rate(name, method)
                ladder = sorted({*HALF_DECADES, taken})
                at = ladder.index(taken)
                for place in sorted({at - away, at + away}):
                    if 0 <= place < len(ladder):
                        yield _cell(name, method, ladder[place])


def rivals(rows: Iterable[Row]) -> Iterator[SweepCell]:
    """The default and the best other rate of each method on each set, with the further seeds."""
    for (name, method), points in grid_points(rows).items():
        taken = default_rate(name, method)
        others = [rate for rate in points if rate != taken]
        best = {max(others, key=lambda rate: points[rate].worth)} if others else set[float]()
        for seed in AGAIN:
            yield from (_cell(name, method, rate, seed) for rate in sorted({taken} | best))


def grid_points(rows: Iterable[Row]) -> Points:
    """The rows of the default size with the head of the grid, taken together."""

    def is_of_grid(row: Row) -> bool:
        own = dict(zip(KEY, _cell(row["set"], row["method"], 0.0).key(), strict=True))
        return all(row[name] == own[name] for name in ("rank", "basis", "alpha", "head_rate"))

    return points_of(filter(is_of_grid, rows))


def _cell(name: str, method: str, rate: float, seed: int = 0) -> SweepCell:
    basis = METHODS[method].basis_for.get(task_of(name))
    adapter = AdapterSettings(method=method, basis=basis, seed=seed)
    return SweepCell(name, adapter, rate, HEAD_RATE if task_of(name) in HEAD_RATES else None)


def task_of(name: str) -> str:
    """The task of a set."""
    return sweep_setting(name, Path()).base.task


def default_rate(name: str, method: str) -> float:
    """The learning rate that a run on a set takes where none is given."""
    task = task_of(name)
    return float(choose(method, task, SWEPT[task][1])["learning_rate"].value)


def sweep_setting(name: str, data: Path) -> Data:
    """The rows and the length of the runs of one set."""
    if name == "flowers12":
        return _images(data)
    return _pairs(data / "e2e", data) if name == "e2e" else _glue(name, data)


def _images(data: Path) -> Data:
    rows = DataSettings(train=data / "flowers12" / "flowers12_224.zip", shots=10)
    loop = LoopSettings(batch_size=16, max_steps=40)
    model = str(data / "vit_tiny_patch16_224")
    return _setting(TrainSettings("image-classification", model, rows, "", loop=loop, image_size=64), dev_rows=20)


def _pairs(folder: Path, data: Path) -> Data:
    rows = DataSettings(
        train=folder / "trainset.csv.gz",
        eval=folder / "testset_w_refs.csv.gz",
        prompt_column="mr",
        target_column="ref",
        limit=1600,
    )
    loop, model = LoopSettings(batch_size=16, max_steps=100), str(data / "llama_stories260k")
    base = TrainSettings(LANGUAGE, model, rows, "", loop=loop, max_length=160, end_token="</s>")
    return _setting(base, dev_rows=32, dev=str(folder / "devset.csv.gz"))


def _glue(name: str, data: Path) -> Data:
    text, pair, label, limit, length, epochs = {
        "sst2": ("sentence", None, "label", 2000, 64, 1),
        "sst2-long": ("sentence", None, "label", 6000, 64, 1),
        "rte": ("sentence1", "sentence2", "label", 1000, 96, 1),
        "rte-long": ("sentence1", "sentence2", "label", 1600, 96, 3),
        "stsb": ("5", "6", "4", 1500, 64, 1),
    }[name]
    train, dev = ("sts-train.csv.gz", "sts-dev.csv.gz") if name == "stsb" else ("train.tsv.gz", "dev.tsv.gz")
    folder = data / "glue" / name.partition("-")[0]
    rows = DataSettings(
        train=folder / train,
        eval=folder / dev,
        kind="tsv",
        text_column=text,
        text_pair_column=pair,
        label_column=label,
        limit=limit,
    )
    loop, model = LoopSettings(batch_size=16, max_steps=epochs * limit // 16), str(data / "minilm_l6_h384")
    base = TrainSettings("sequence-classification", model, rows, "", loop=loop, max_length=length)
    return _setting(base, dev_rows=400, dev_words=8 if folder.name == "sst2" else 1)


def _setting(base: TrainSettings, *, dev_rows: int, dev: str | None = None, dev_words: int = 1) -> Data:
    base = replace(base, loop=replace(base.loop, threads=1, eval_batch_size=64, keep="last", device="cpu"))
    steps = base.loop.max_steps or 0
    return Data("", base, targets=("all-linear",), steps=steps, trial_steps=steps, dev_rows=dev_rows, metric="loss",
                dev=dev, dev_words=dev_words)  # fmt: skip


def run_sweep(
    cells: Iterable[SweepCell], data: Path, path: Path, *, seconds: float | None = None, console: Console | None = None
) -> None:
    """Make the runs that a csv lacks, one after another, until the time is up.

    Args:
        cells: the runs, in their order.
        data: folder of data sets and models.
        path: the csv.
        seconds: no run is begun after that many; ``None`` for all.
        console: where to tell of each, ``None`` for nowhere.
    """
    began = time.monotonic()
    for cell in cells:
        if cell.key() in {tuple(row[name] for name in KEY) for row in read_rows(path)}:
            continue
        if seconds is not None and time.monotonic() - began > seconds:
            return
        row = run_cell(cell, data)
        new = not path.exists()
        with path.open("a", encoding="utf-8", newline="") as file:
            writer: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        if console:
            told = ("method", "rank", "basis", "alpha", "rate", "head_rate", "metric", "after", "loss_after", "seconds")
            console.print(cell.set, *(row[name] for name in told), highlight=False)


def run_cell(cell: SweepCell, data: Path) -> dict[str, str]:
    """One run as a row; without scores when the loss stopped being finite."""
    setting = sweep_setting(cell.set, data)
    rows = _rows(cell.set, data)
    loop = replace(setting.base.loop, learning_rate=cell.rate, head_learning_rate=cell.head_rate,
                   train_seed=cell.adapter.seed, eval_every=setting.base.loop.max_steps)  # fmt: skip
    began = time.process_time()
    try:
        result = _fit(cell, setting, rows, loop)
    except NonFiniteLossError:
        result = None
    values: dict[str, object] = dict(zip(KEY, cell.key(), strict=True))
    values |= {"steps": loop.max_steps, "metric": rows.task.metric, "date": datetime.now(UTC).strftime("%Y-%m-%d")}
    values["revision"] = revision()
    values["seconds"] = f"{time.process_time() - began:.1f}"
    if result is not None:
        values["coefficients"] = result.coefficients
        for when, scores in (("before", result.before), ("after", result.after)):
            values |= {when: f"{scores[rows.task.metric]:.4f}", f"loss_{when}": f"{scores['loss']:.4f}"}
    return {name: str(values.get(name, "")) for name in COLUMNS}


def _fit(cell: SweepCell, setting: Data, rows: Cell, loop: LoopSettings) -> FitResult:
    model = rows.task.load_model(setting.base.model, dtype="float32", seed=loop.train_seed)
    adapter = replace(cell.adapter, targets=setting.targets)
    config = peft_config(adapter, task_type=rows.task.peft_task_type, head=rows.task.head_modules(model))
    with tempfile.TemporaryDirectory(prefix="randbasis-sweep-") as folder:
        return fit(model, config, rows.task, train=rows.train, eval=rows.dev, loop=loop, checkpoints=folder)


@lru_cache(maxsize=1)
def _rows(name: str, data: Path) -> Cell:
    return read_cell(sweep_setting(name, data), 0)

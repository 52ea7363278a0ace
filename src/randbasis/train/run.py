"""A whole run: settings to a folder with an adapter, its task, a summary and a plot."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from torch import nn

from randbasis.errors import CheckpointError, EmptyDataError, SettingError
from randbasis.files.locations import local_output
from randbasis.files.output_checks import check_output_folder
from randbasis.files.output_set import put_back, replaced_set, set_aside
from randbasis.files.whole_file import write
from randbasis.train.causal_lm import CausalLanguage
from randbasis.train.images import EVAL_SPLITS, ImageClassification, read_images
from randbasis.train.loop import FitResult, fit
from randbasis.train.loss_plot import plot_losses
from randbasis.train.machine import Quantized, check_machine, runs_on_cpu
from randbasis.train.method_table import peft_config
from randbasis.train.packing import check_kept_apart, pack
from randbasis.train.ranks import Ranks, joined
from randbasis.train.row_choice import choose_rows
from randbasis.train.run_config import CONFIG_FILE, config_text
from randbasis.train.settings import TrainSettings
from randbasis.train.sources import files_of, is_on_hub, read_sources
from randbasis.train.tabular import Table
from randbasis.train.task import Example, Task, count_cut, warn_of_cut
from randbasis.train.task_table import TASK_CLASSES
from randbasis.train.trained_parameters import save_parameters
from randbasis.train.trainer import checkpoint_to_resume, last_checkpoint
from randbasis.tuner.saved_files import BASE_BITS, HEAD_FILE, TASK_FILE, WEIGHTS_FILE

CHECKPOINTS = "checkpoints"
EARLIER = ".checkpoints-before"
"""Where those of a run lie that is about to be replaced."""
SUMMARY_FILE = "summary.json"
HISTORY_FILE = "history.jsonl"
PLOT_FILE = "loss.png"
SETTINGS_FILE = "settings.json"
#: What a resumed run may have otherwise than the run that it goes on with.
FREE_TO_CHANGE = (
    "output",
    "overwrite",
    "resume",
    "keep_checkpoints",
    "threads",
    "device",
    "eval_batch_size",
    "report_to",
    "logging_steps",
    "save_steps",
)


@dataclass(frozen=True)
class Prepared:
    """A task with its examples: everything of a run that is read before anything is written.

    Args:
        task: the task.
        train: examples to learn from.
        eval: held-out examples.
        packs: sequences of several of ``train``, where they were asked for.
        trained_on: which rows those of ``train`` are, in words.
        evaluated_on: which those of ``eval`` are.
    """

    task: Task
    train: Sequence[Example]
    eval: Sequence[Example]
    packs: Sequence[Example] | None = None
    trained_on: str = ""
    evaluated_on: str = ""

    def load_model(self, settings: TrainSettings) -> nn.Module:
        """The frozen base with a fresh head drawn from the seed of the run."""
        loop = settings.loop
        quantized = Quantized.of(loop.bits, loop.device)
        return self.task.load_model(settings.model, dtype=loop.dtype, seed=loop.train_seed, quantized=quantized)


@dataclass(frozen=True)
class TrainOutcome:
    """What a run left.

    Args:
        output: its folder.
        model: the trained model.
        task: the task, whose ``score`` says what the model is worth on rows.
        summary: what ``summary.json`` holds.
        first: whether this process wrote it; of several processes, the one that prints.
    """

    output: Path
    model: nn.Module
    task: Task
    summary: dict[str, Any]
    first: bool = True


def train(
    settings: TrainSettings, *, console: Console | None = None, check: Callable[[], None] | None = None
) -> TrainOutcome:
    """Fine-tune a base model on a file of rows.

    Everything that can be refused is refused before the output folder is made; an adapter that is there already is
    replaced only when the new one is complete. Where torchrun started several processes, each takes ``batch_size``
    rows of every step, the coefficients are those of one process with all of these rows, and the first process writes.

    Args:
        settings: the run.
        console: where to show progress, ``None`` for nowhere.
        check: what else to refuse before anything is read.

    Returns:
        The trained model and where it was saved.

    Raises:
        RandbasisError: one class per broken rule; see :mod:`randbasis.errors`.
    """
    with joined(on_cpu=runs_on_cpu(settings.loop)) as ranks:
        ranks.agreed(settings.check)
        ranks.agreed(lambda: check_machine(settings.loop, processes=ranks.count))
        if check is not None:
            ranks.agreed(check)
        return _train(settings, ranks, console if ranks.first else None)


def _train(settings: TrainSettings, ranks: Ranks, console: Console | None) -> TrainOutcome:
    output = Path(ranks.by_first(lambda: str(_check_output(settings, ranks.count))))
    checkpoints = output / CHECKPOINTS
    prepared = ranks.agreed(lambda: prepare(settings))
    model = ranks.agreed(lambda: prepared.load_model(settings))
    config = ranks.agreed(
        lambda: peft_config(
            settings.adapter, task_type=prepared.task.peft_task_type, head=prepared.task.head_modules(model)
        )
    )
    if prepared.packs is not None:
        ranks.agreed(lambda: check_kept_apart(model, prepared.train))
    if not settings.resume:
        ranks.by_first(lambda: _begin(settings, checkpoints, ranks.count))
    try:
        result = fit(
            model,
            config,
            prepared.task,
            train=prepared.train if prepared.packs is None else prepared.packs,
            eval=prepared.eval,
            loop=settings.loop,
            checkpoints=checkpoints,
            resume=settings.resume,
            console=console,
            ranks=ranks,
        )
    except BaseException:
        if ranks.first and last_checkpoint(checkpoints) is None:
            put_back(checkpoints, checkpoints.with_name(EARLIER))
        raise
    summary = ranks.by_first(lambda: _save(settings, prepared, result, ranks.count))
    if not settings.keep_checkpoints:
        ranks.by_first(lambda: shutil.rmtree(checkpoints))
    return TrainOutcome(output, result.model, prepared.task, summary, ranks.first)


def prepare(settings: TrainSettings) -> Prepared:
    """Read the rows, split them and make examples of them; the model's weights are not read."""
    if settings.packing and settings.task != CausalLanguage.name:
        raise SettingError(f"packing is for {CausalLanguage.name}, got task {settings.task!r}; leave it out")
    train_table, eval_table = _tables(settings)
    task = TASK_CLASSES[settings.task].prepare(settings, train_table)
    learned, judged = choose_rows(settings, task, train_table, eval_table)
    prepared = Prepared(
        task,
        task.encode(learned.table, training=True),
        task.encode(judged.table, training=False) if judged.table.rows else [],
        trained_on=learned.told,
        evaluated_on=judged.told,
    )
    if not prepared.train or (judged.table.rows and not prepared.eval):
        raise EmptyDataError(f"{train_table.source} leaves nothing to train on or to evaluate on")
    warn_of_cut(task, prepared.train, f"rows of {learned.table.source}")
    warn_of_cut(task, prepared.eval, f"rows of {judged.table.source} (held out)")
    if settings.packing:
        prepared = replace(prepared, packs=pack(prepared.train, cast(CausalLanguage, task).max_length))
    return prepared


def _tables(settings: TrainSettings) -> tuple[Table, Table | None]:
    """The rows to train on and, where they come from elsewhere, the rows to evaluate on."""
    data = settings.data
    if settings.task != ImageClassification.name:
        first = read_sources(data.train_sources, kind=data.kind, wanted=data.columns)
        others = data.eval_sources
        return first, read_sources(others, kind=data.kind, wanted=data.columns) if others else None
    splits = read_images(_one_of_images(data.train))
    train_name = next((name for name in splits if name not in EVAL_SPLITS), None)
    if train_name is None:
        raise EmptyDataError(f"{data.train} holds only {', '.join(splits)}; a split named train is needed")
    if data.eval is not None:
        others = read_images(_one_of_images(data.eval))
        return splits[train_name], others[next((name for name in EVAL_SPLITS if name in others), next(iter(others)))]
    return splits[train_name], next((splits[name] for name in EVAL_SPLITS if name in splits), None)


def _one_of_images(source: Any) -> str | Path:
    if isinstance(source, tuple):
        raise SettingError(f"data of images must be one folder or zip, got {len(cast(tuple[Any, ...], source))}")
    return source


def _check_output(settings: TrainSettings, processes: int) -> Path:
    """The folder to write; raises before anything is read what of it can be refused."""
    rows = [one for one in (*settings.data.train_sources, *settings.data.eval_sources) if not is_on_hub(one)]
    sources = (settings.model, *(file for one in rows for file in files_of(one)))
    output = check_output_folder(settings.output, sources, overwrite=settings.overwrite or settings.resume)
    if settings.resume:
        checkpoint_to_resume(output / CHECKPOINTS)
        _check_same(_kept_settings(settings, processes), output / CHECKPOINTS / SETTINGS_FILE)
    return output


def _begin(settings: TrainSettings, checkpoints: Path, processes: int) -> None:
    """Make the folder of the checkpoints, which says what it is of; those of an earlier run lie aside until its end."""
    set_aside(checkpoints, checkpoints.with_name(EARLIER))
    write(checkpoints / SETTINGS_FILE, json.dumps(_kept_settings(settings, processes)).encode())


def _kept_settings(settings: TrainSettings, processes: int) -> dict[str, Any]:
    """What a resumed run must have in common with its beginning; several processes make larger batches."""
    return {**settings.as_json(), **({"processes": processes} if processes > 1 else {})}


def _check_same(settings: dict[str, Any], kept: Path) -> None:
    """Raises SettingError when a run would go on with other settings than it began with."""
    try:
        before, now = _flat(json.loads(kept.read_text(encoding="utf-8"))), _flat(settings)
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{kept} does not tell the settings of the run ({error}); start it again") from error
    names = now.keys() | ({"processes"} & before.keys())
    changed = [
        name
        for name in sorted(names)
        if name.split(".")[-1] not in FREE_TO_CHANGE and before.get(name) != now.get(name)
    ]
    if changed:
        told = ", ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in changed)
        raise SettingError(
            f"a resumed run must have the settings that it began with: {told}; start another run for those"
        )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = cast(dict[str, Any], value) if isinstance(value, dict) else None
        flat |= {f"{name}.{key}": item for key, item in inner.items()} if inner is not None else {name: value}
    return flat


def _save(settings: TrainSettings, prepared: Prepared, result: FitResult, processes: int) -> dict[str, Any]:
    with replaced_set(local_output(settings.output), kept=(CHECKPOINTS,)) as stage:
        save_parameters(result.model, stage)
        weights = next(stage / name for name in (WEIGHTS_FILE, HEAD_FILE) if (stage / name).exists())
        summary = _summary(settings, prepared, result) | {"adapter_bytes": weights.stat().st_size}
        if processes > 1:
            summary["processes"] = processes
        task = prepared.task.description() | ({BASE_BITS: settings.loop.bits} if settings.loop.bits else {})
        about = {"base_model": settings.model, "method": settings.adapter.method, "task": task}
        (stage / TASK_FILE).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (stage / SUMMARY_FILE).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (stage / CONFIG_FILE).write_text(config_text(settings), encoding="utf-8")
        lines = [json.dumps(entry) for entry in result.history]
        (stage / HISTORY_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
        plot_losses(
            result.history, prepared.task.metric, stage / PLOT_FILE, f"{settings.adapter.method}: {prepared.task.name}"
        )
    return summary


def _summary(settings: TrainSettings, prepared: Prepared, result: FitResult) -> dict[str, Any]:
    return {
        "task": settings.task,
        "method": settings.adapter.method,
        "model": settings.model,
        "loaded_by": prepared.task.loaded_by(),
        "metric": prepared.task.metric,
        "before": result.before,
        "after": result.after,
        "coefficients": result.coefficients,
        "head_parameters": result.head_parameters,
        "steps": result.steps,
        "best_step": result.best_step,
        "seconds": round(result.seconds, 2),
        "train_rows": len(prepared.train),
        "eval_rows": len(prepared.eval),
        "trained_on": prepared.trained_on,
        "evaluated_on": prepared.evaluated_on,
        **({} if prepared.packs is None else {"packed_into": len(prepared.packs)}),
        "train_cut": count_cut(prepared.train),
        "eval_cut": count_cut(prepared.eval),
        "settings": settings.as_json(),
    }

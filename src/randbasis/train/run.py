"""A whole run: settings to a folder with an adapter, its task, a summary and a plot."""

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig
from rich.console import Console
from torch import nn

from randbasis.adapters.base_model import read_config
from randbasis.adapters.saved import SavedAdapter, open_folder, paths_of, write_task
from randbasis.errors import EmptyDataError, SettingError
from randbasis.files.locations import local_output
from randbasis.files.output_checks import check_output_folder
from randbasis.files.output_set import put_back, replaced_set, set_aside
from randbasis.files.whole_file import write
from randbasis.train.causal_lm import CausalLanguage
from randbasis.train.class_weights import class_weights
from randbasis.train.decisions import Rows, check_seeded, decide, note, noted
from randbasis.train.default_choices import filled
from randbasis.train.images import ImageClassification, image_tables
from randbasis.train.judgement import compared_size, doubts
from randbasis.train.loop import TRACKED, FitResult, fit
from randbasis.train.loss_plot import plot_losses
from randbasis.train.machine import Quantized, check_machine, runs_on_cpu
from randbasis.train.method_table import peft_config
from randbasis.train.model_reading import width_of
from randbasis.train.origin import decided, open_origin, task_of
from randbasis.train.packing import check_kept_apart, pack
from randbasis.train.projection import Projection, check_projection, projected, scores_of
from randbasis.train.ranks import Ranks, joined
from randbasis.train.resuming import (
    CHECKPOINTS,
    FINISHED,
    SETTINGS_FILE,
    SUMMARY_FILE,
    Start,
    find_start,
    kept_settings,
)
from randbasis.train.row_choice import choose_rows
from randbasis.train.run_config import CONFIG_FILE, config_text
from randbasis.train.settings import TrainSettings
from randbasis.train.sources import files_of, is_on_hub, read_sources
from randbasis.train.tabular import Table
from randbasis.train.task import Example, Task, count_cut, warn_of_cut
from randbasis.train.task_table import TASK_CLASSES
from randbasis.train.trained_parameters import load_adapter, save_parameters
from randbasis.train.trainer import last_checkpoint
from randbasis.tuner.saved_files import BASE_BITS, HEAD_FILE, WEIGHTS_FILE

EARLIER = ".checkpoints-before"
"""Where those of a run lie that is about to be replaced."""
HISTORY_FILE = "history.jsonl"
PLOT_FILE = "loss.png"


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

    def load_model(self, settings: TrainSettings, origin: SavedAdapter | None = None) -> nn.Module:
        """The frozen base with a fresh head drawn from the seed of the run."""
        return _base_of(settings, self.task, origin)


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
        origin = ranks.agreed(lambda: open_origin(settings))
        if origin is not None:
            settings = ranks.agreed(lambda: decided(settings, origin))
            if settings.project:
                ranks.agreed(lambda: check_projection(settings, origin))
        if settings.loop.try_seeds is not None:
            ranks.agreed(lambda: check_seeded(settings.adapter.method))
        return _train(settings, origin, ranks, console if ranks.first else None)


def _train(settings: TrainSettings, origin: SavedAdapter | None, ranks: Ranks, console: Console | None) -> TrainOutcome:
    settings, chosen = ranks.agreed(partial(_filled, settings))
    output = Path(ranks.by_first(lambda: str(_check_output(settings))))
    checkpoints = output / CHECKPOINTS
    start = Start(**ranks.by_first(lambda: asdict(find_start(settings, ranks.count)))) if settings.resume else None
    if start is not None and console:
        console.print(start.told, highlight=False, soft_wrap=True)
    if start is not None and start.complete is not None:
        return ranks.agreed(lambda: _finished(settings, output, start.complete or {}, ranks))
    resumed = start is not None and start.resumed
    if ranks.count > 1 and TASK_CLASSES[settings.task].of_whole_batches:
        raise SettingError(f"{settings.task} compares the rows of a batch, which processes cannot share; start one")
    prepared = ranks.agreed(lambda: prepare(settings, origin))
    with ExitStack() as stack:
        projection = None
        if origin is not None and settings.project:
            block = projected(settings, origin, prepared.task)
            projection = ranks.agreed(lambda: stack.enter_context(block))
        result, told = _fitted(settings, origin, projection, prepared, ranks, console, resumed=resumed)
    told = {"chosen": chosen, **told}
    summary = ranks.by_first(lambda: _save(settings, prepared, result, ranks.count, told))
    for doubt in summary.get("doubts", ()) if console else ():
        cast(Console, console).print(f"warning: {doubt}", style="yellow", highlight=False, soft_wrap=True)
    if settings.keep_checkpoints:
        ranks.by_first(lambda: _note_settings(settings, checkpoints, ranks.count, finished=True))
    else:
        ranks.by_first(lambda: shutil.rmtree(checkpoints))
    return TrainOutcome(output, result.model, prepared.task, summary, ranks.first)


def _fitted(
    settings: TrainSettings,
    origin: SavedAdapter | None,
    projection: Projection | None,
    prepared: Prepared,
    ranks: Ranks,
    console: Console | None,
    *,
    resumed: bool,
) -> tuple[FitResult, dict[str, Any]]:
    """The trained model, and what the summary says of its beginning."""
    checkpoints = Path(local_output(settings.output)) / CHECKPOINTS
    load = partial(prepared.load_model, settings, origin)
    told: dict[str, Any] = {} if origin is None else {"from": origin.where}
    if origin is not None and projection is not None:
        told["projection"] = projection.as_json()
        if prepared.eval:
            scores = ranks.agreed(lambda: scores_of(load(), origin, prepared.task, prepared.eval, settings.loop))
            told["projection"]["before"] = ranks.of_first(scores)
            if console:
                console.print(f"source: {_shown(told['projection']['before'])}", soft_wrap=True)
    model = ranks.agreed(load)
    config = ranks.agreed(lambda: None if origin is not None else _config(settings, prepared.task, model))
    if prepared.packs is not None:
        ranks.agreed(lambda: check_kept_apart(model, prepared.train))
    if resumed:
        ranks.by_first(lambda: _note_settings(settings, checkpoints, ranks.count))
    else:
        ranks.by_first(lambda: _begin(settings, checkpoints, ranks.count))
    try:
        if resumed:
            decisions = noted(checkpoints)
        else:
            rows = Rows(prepared.task, prepared.train, packed=prepared.packs is not None)
            decisions = decide(config, model, load, rows, settings, ranks=ranks, console=console)
            ranks.by_first(lambda: note(decisions, checkpoints))
        result = fit(
            model,
            decisions.applied(config),
            prepared.task,
            train=prepared.train if prepared.packs is None else prepared.packs,
            eval=prepared.eval,
            loop=settings.loop,
            checkpoints=checkpoints,
            resume=resumed,
            console=console,
            ranks=ranks,
            origin=projection.start if projection else origin,
        )
    except BaseException:
        if ranks.first and last_checkpoint(checkpoints) is None:
            put_back(checkpoints, checkpoints.with_name(EARLIER))
        raise
    return result, told | decisions.as_json()


def _shown(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def _base_of(settings: TrainSettings, task: Task, origin: SavedAdapter | None = None) -> nn.Module:
    loop = settings.loop
    quantized = Quantized.of(loop.bits, loop.device)
    with nullcontext() if origin is None else origin.on(settings.model):
        return task.load_model(settings.model, dtype=loop.dtype, seed=loop.train_seed, quantized=quantized)


def _filled(settings: TrainSettings) -> tuple[TrainSettings, dict[str, str]]:
    """The settings with what was left open chosen for this base, of which the configuration alone is read."""
    return filled(settings, width_of(read_config(settings.model)))


def _config(settings: TrainSettings, task: Task, model: nn.Module) -> PeftConfig | None:
    head, unused = task.head_modules(model), task.unused_modules(model)
    return peft_config(settings.adapter, task_type=task.peft_task_type, head=head, unused=unused)


def prepare(settings: TrainSettings, origin: SavedAdapter | None = None) -> Prepared:
    """Read the rows, split them and make examples of them; the model's weights are not read.

    Args:
        settings: the run; where it starts from an adapter, as :func:`randbasis.train.origin.decided` gives them.
        origin: that adapter.
    """
    if settings.packing and settings.task != CausalLanguage.name:
        raise SettingError(f"packing is for {CausalLanguage.name}, got task {settings.task!r}; leave it out")
    train_table, eval_table = _tables(settings)
    if origin is not None and origin.task:
        task = task_of(origin, settings)
    else:
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
    if settings.loop.class_weights is not None:
        labels = getattr(task, "labels", None)
        rows = cast("list[int]", [example.get("label") for example in prepared.train])
        task.class_weights = class_weights(settings.loop.class_weights, labels, rows)
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
    return image_tables(data.train, data.eval)


def _check_output(settings: TrainSettings) -> Path:
    """The folder to write; raises before anything is read what of it can be refused."""
    rows = [one for one in (*settings.data.train_sources, *settings.data.eval_sources) if not is_on_hub(one)]
    sources = (settings.model, *(file for one in rows for file in files_of(one)))
    if settings.from_adapter is not None:
        sources += (*paths_of(settings.from_adapter),)
    output = local_output(settings.output)
    begun = settings.resume and output.is_dir() and _is_of_a_run(output)
    return check_output_folder(output, sources, overwrite=settings.overwrite or begun)


def _is_of_a_run(output: Path) -> bool:
    """Whether a folder holds a run that ended or has a checkpoint, or one that left nothing that counts."""
    begun = {one.name for one in output.iterdir()} <= {CHECKPOINTS, EARLIER, TRACKED}
    return begun or (output / SUMMARY_FILE).is_file() or last_checkpoint(output / CHECKPOINTS) is not None


def _begin(settings: TrainSettings, checkpoints: Path, processes: int) -> None:
    """Make the folder of the checkpoints, which says what it is of; those of an earlier run lie aside until its end."""
    set_aside(checkpoints, checkpoints.with_name(EARLIER))
    _note_settings(settings, checkpoints, processes)


def _note_settings(settings: TrainSettings, checkpoints: Path, processes: int, *, finished: bool = False) -> None:
    """What the checkpoints are of, beside them."""
    noted = kept_settings(settings, processes) | ({FINISHED: True} if finished else {})
    write(checkpoints / SETTINGS_FILE, json.dumps(noted).encode(), overwrite=True)


def _finished(settings: TrainSettings, output: Path, summary: dict[str, Any], ranks: Ranks) -> TrainOutcome:
    """What a run left that has come to its end; nothing is written."""
    saved = open_folder(output)
    task = TASK_CLASSES[settings.task].from_description(saved.task, settings.model)
    return TrainOutcome(output, load_adapter(_base_of(settings, task), saved), task, summary, ranks.first)


def _save(
    settings: TrainSettings, prepared: Prepared, result: FitResult, processes: int, told: dict[str, Any]
) -> dict[str, Any]:
    with replaced_set(local_output(settings.output), kept=(CHECKPOINTS,)) as stage:
        save_parameters(result.model, stage)
        weights = next(stage / name for name in (WEIGHTS_FILE, HEAD_FILE) if (stage / name).exists())
        summary = _summary(settings, prepared, result) | {"adapter_bytes": weights.stat().st_size, **told}
        if processes > 1:
            summary["processes"] = processes
        task = prepared.task.description() | ({BASE_BITS: settings.loop.bits} if settings.loop.bits else {})
        write_task(stage, settings.model, settings.adapter.method, task)
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
        **({} if (lora := compared_size(result.model)) is None else {"lora_rank_1": lora}),
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
        **({"doubts": said} if (said := doubts(prepared.task.metric, result.before, result.after)) else {}),
        "settings": settings.as_json(),
    }

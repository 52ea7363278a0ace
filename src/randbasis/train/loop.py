"""A model, a PEFT configuration and examples to trained coefficients: the part that any configuration can use."""

import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig, get_peft_model
from rich.console import Console
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.utils import logging

from randbasis.adapters.saved import SavedAdapter
from randbasis.errors import EmptyDataError, RandbasisError, SettingError, TargetError
from randbasis.train.default_choices import choose, filled_loop
from randbasis.train.loop_settings import LoopSettings
from randbasis.train.machine import OneDevice, check_machine, runs_on_cpu, torch_device
from randbasis.train.method_table import METHOD_NAMES, is_of_targets, method_of, size_of
from randbasis.train.model_reading import width_of
from randbasis.train.origin import put_on
from randbasis.train.progress import ProgressReport
from randbasis.train.randomness import confined_randomness
from randbasis.train.ranks import Ranks
from randbasis.train.task import Example, Task
from randbasis.train.threads import torch_threads
from randbasis.train.trainer import HEAD_OF_WHOLE, AdapterTrainer, checkpoint_to_resume, parameter_groups

TRACKED = "trackers"
"""Folder of what trackers write, beside that of the checkpoints."""


@dataclass(frozen=True)
class FitResult:
    """What training did.

    Args:
        model: the trained model, with the best or the last parameters.
        before: metrics of the untrained model.
        after: metrics of ``model``.
        history: what was logged, one dictionary an entry, with ``step``.
        steps: optimiser steps made.
        best_step: the step that ``model`` is of.
        coefficients: trained numbers of the adapter.
        head_parameters: trained numbers of the head.
        seconds: of training and its evaluations.
    """

    model: nn.Module
    before: dict[str, float]
    after: dict[str, float]
    history: list[dict[str, Any]]
    steps: int
    best_step: int
    coefficients: int
    head_parameters: int
    seconds: float


def fit(
    model: nn.Module,
    config: PeftConfig | None,
    task: Task,
    *,
    train: Sequence[Example],
    eval: Sequence[Example],
    loop: LoopSettings,
    checkpoints: str | Path,
    resume: bool = False,
    console: Console | None = None,
    prepare: Callable[[nn.Module], object] | None = None,
    ranks: Ranks | None = None,
    origin: SavedAdapter | None = None,
    stop_after: int | None = None,
    whole: bool = False,
) -> FitResult:
    """Train an adapter and a head.

    Args:
        model: the base with its head, as ``task.load_model`` gives it; it is adapted in place, as PEFT does.
        config: any PEFT configuration, or ``None`` to train the head alone.
        task: makes batches and scores.
        train: examples to learn from.
        eval: examples to choose the best checkpoint by; without any, the last parameters are kept.
        loop: how to optimise; what it leaves open is chosen, as ``train`` does.
        checkpoints: folder for the checkpoints (adapter, head and optimiser only).
        resume: go on from the last checkpoint there; the run ends as it would have without the interruption.
        console: where to show progress, ``None`` for nowhere.
        prepare: called with the adapted model before an optimizer is made for it.
        ranks: the processes of the run; ``None`` for this one alone.
        origin: an adapter to start from, which takes the place of ``config``.
        stop_after: end after so many steps, evaluated and not saved, at the learning rates that they have in the run.
        whole: train every parameter of the base at the adapter's rate, and no adapter: to compare with.

    Returns:
        The trained model and its metrics before and after.

    Raises:
        SettingError: a setting is out of range, or there is nothing to train.
        TargetError: PEFT's own method found no target.
        EmptyDataError: there is nothing to train on.
        NonFiniteLossError: the loss or a parameter stopped being finite; the last good checkpoint is kept.
        CheckpointError: there is nothing to resume from.
        SaveError: a checkpoint could not be written; earlier ones are kept.
    """
    loop.check()
    if not train:
        raise EmptyDataError("there are no rows to train on")
    if loop.early_stop is not None and not eval:
        raise SettingError("early_stop needs rows to evaluate on, and there are none; leave it out")
    folder = Path(checkpoints)
    ranks = ranks or Ranks()
    check_machine(loop, processes=ranks.count)
    loop = _filled(loop, origin.method if origin else method_of(config), task.name, model, size_of(config))
    start = ranks.agreed(lambda: checkpoint_to_resume(folder)) if resume else None
    with torch_threads(loop.threads), _quiet_logging(), confined_randomness(loop.train_seed):
        adapted = ranks.agreed(lambda: adapt(model, config, task.head_modules(model), origin, whole=whole))
        if prepare is not None:
            prepare(adapted)
        arguments = training_arguments(loop, len(train), folder, task, processes=ranks.count, evaluated=len(eval) > 0)
        report = ProgressReport(task, console) if console else None
        trainer = AdapterTrainer(
            adapted,
            task,
            arguments,
            train=train,
            eval=eval,
            lengths=task.lengths(train) if loop.group_by_length else None,
            head_learning_rate=cast(
                float, loop.learning_rate if loop.head_learning_rate is None else loop.head_learning_rate
            ),
            ranks=ranks,
            callbacks=_callbacks(loop, report, stop_after, evaluated=len(eval) > 0),
        )
        trainer.pop_callback(PrinterCallback)
        _keep_tracked(trainer, folder.parent / TRACKED)
        before = ranks.of_first(task.score(adapted, eval, arguments.eval_batch_size)) if eval else {}
        if console and before:
            console.print(
                "before: " + ", ".join(f"{name} {value:.4f}" for name, value in before.items()), soft_wrap=True
            )
        began = time.perf_counter()
        try:
            trainer.train(resume_from_checkpoint=str(start) if start else None)
        finally:
            if report:
                report.stop()
        return _result(trainer, task, before, time.perf_counter() - began)


def _filled(loop: LoopSettings, method: str, task: str, model: nn.Module, size: int | None) -> LoopSettings:
    """The settings with what they leave open; of a method of PEFT's that was not swept the rate must be given."""
    if method not in METHOD_NAMES and loop.learning_rate is not None:
        method = "none"
    return filled_loop(loop, choose(method, task, width_of(getattr(model, "config", None)), size))[0]


def adapt(
    model: nn.Module,
    config: PeftConfig | None,
    head: Sequence[str],
    origin: SavedAdapter | None = None,
    *,
    whole: bool = False,
) -> nn.Module:
    """Put the adapter in, a new one or that of ``origin``; without one, freeze all but the head, or nothing.

    Raises:
        SettingError: no adapter and no head, so nothing to train.
        TargetError: PEFT's own method found no target.
    """
    for name in head:
        model.get_submodule(name).float()
    if whole:
        setattr(model.requires_grad_(True), HEAD_OF_WHOLE, tuple(head))
        return model
    if origin is not None and not origin.is_head:
        return put_on(model, origin, head)
    if config is None:
        if not head:
            raise SettingError("method 'none' trains only a head, and this task has none; choose an adapter")
        model.requires_grad_(False)
        for name in head:
            model.get_submodule(name).requires_grad_(True)
        return model if origin is None else put_on(model, origin, head)
    try:
        return cast(nn.Module, get_peft_model(cast(Any, model), config))
    except RandbasisError:
        raise
    except ValueError as error:
        if not is_of_targets(error):
            raise
        raise TargetError(f"targets {config.to_dict().get('target_modules')!r}: {error}") from error


def count_trained(model: nn.Module) -> tuple[int, int]:
    """Trained numbers of the adapter and of the head."""
    groups = parameter_groups(model)
    adapter, matrices, vectors = (sum(p.numel() for p in group.values()) for group in groups.values())
    return adapter, matrices + vectors


def steps_of(loop: LoopSettings, rows: int, *, processes: int = 1) -> int:
    """Optimiser steps of a run."""
    return loop.max_steps or math.ceil(loop.epochs * _steps_an_epoch(loop, rows, processes))


def _steps_an_epoch(loop: LoopSettings, rows: int, processes: int) -> int:
    return math.ceil(math.ceil(rows / (loop.batch_size * processes)) / loop.accumulate)


def training_arguments(
    loop: LoopSettings, rows: int, folder: Path, task: Task, *, processes: int = 1, evaluated: bool = True
) -> TrainingArguments:
    """The arguments of transformers' Trainer, of settings with every value; ``batch_size`` is that of one process,
    ``evaluated`` whether there are rows to evaluate on.
    """
    total = steps_of(loop, rows, processes=processes)
    every = loop.eval_every or (math.ceil(total / 5) if loop.max_steps else _steps_an_epoch(loop, rows, processes))
    on_cpu = runs_on_cpu(loop)
    if loop.dtype == "float16" and on_cpu:
        raise SettingError("dtype float16 can only be trained with on a GPU; take bfloat16 or float32")
    arguments = OneDevice(
        torch_device(loop.device),
        output_dir=str(folder),
        per_device_train_batch_size=loop.batch_size,
        per_device_eval_batch_size=loop.eval_batch_size or 4 * loop.batch_size,
        max_steps=total,
        learning_rate=cast(float, loop.head_learning_rate if loop.learning_rate is None else loop.learning_rate),
        lr_scheduler_type=cast(str, loop.schedule),
        warmup_steps=loop.warmup or 0.0,
        weight_decay=loop.weight_decay,
        max_grad_norm=loop.max_grad_norm,
        gradient_accumulation_steps=loop.accumulate,
        label_smoothing_factor=loop.label_smoothing,
        seed=loop.train_seed,
        use_cpu=on_cpu,
        bf16=loop.dtype == "bfloat16",
        fp16=loop.dtype == "float16",
        eval_strategy="steps" if evaluated else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=loop.keep == "best" and evaluated,
        metric_for_best_model=task.metric,
        greater_is_better=task.greater_is_better,
        restore_callback_states_from_checkpoint=True,
        logging_steps=loop.logging_steps or max(1, total // 100),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=list(loop.trackers) or "none",
        run_name=folder.parent.name,
        optim=loop.optimizer,
        **_checkpointing(loop),
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    arguments.save_steps = loop.save_steps or every  # afterwards: Trainer wants a multiple, as it would miss a best
    return arguments


def _checkpointing(loop: LoopSettings) -> dict[str, Any]:
    """By the name that this release of transformers has for it; the older one is to go, and warns."""
    if not loop.gradient_checkpointing:
        return {}
    named = {one.name for one in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in named else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _keep_tracked(trainer: AdapterTrainer, folder: Path) -> None:
    """TensorBoard's files lie beside the checkpoints, which go after the run."""
    for callback in cast("list[Any]", trainer.callback_handler.callbacks):
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder / time.strftime("%Y%m%d-%H%M%S"))


class _LastEvaluation(TrainerCallback):
    """The last step is evaluated too, whether or not it is a multiple of the interval."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


class _SaveBest(TrainerCallback):
    """A new best is saved, whether or not its step is one of ``save_steps``."""

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        value, best = (metrics or {})[f"eval_{args.metric_for_best_model}"], state.best_metric
        if best is None or (value > best if args.greater_is_better else value < best):
            control.should_save = True


class _StopAfter(TrainerCallback):
    """The run ends here, whatever its length."""

    def __init__(self, steps: int, *, evaluated: bool) -> None:
        self.steps, self.evaluated = steps, evaluated

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= self.steps:
            control.should_training_stop = True
            control.should_evaluate = self.evaluated


def _callbacks(
    loop: LoopSettings, report: ProgressReport | None, stop_after: int | None, *, evaluated: bool
) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [_LastEvaluation()] if evaluated else []
    if stop_after is not None:
        callbacks.append(_StopAfter(stop_after, evaluated=evaluated))
    if loop.save_steps is not None and loop.keep == "best":
        callbacks.append(_SaveBest())
    if loop.early_stop is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=loop.early_stop))
    return callbacks + ([report] if report else [])


def _result(trainer: AdapterTrainer, task: Task, before: dict[str, float], seconds: float) -> FitResult:
    state = trainer.state
    history = cast(list[dict[str, Any]], state.log_history)
    best = (
        state.best_global_step if trainer.args.load_best_model_at_end and state.best_global_step else state.global_step
    )
    evaluations = {entry["step"]: entry for entry in history if f"eval_{task.metric}" in entry}
    after = {name: evaluations[best][f"eval_{name}"] for name in before}
    model = cast(nn.Module, trainer.model)
    coefficients, head = count_trained(model)
    return FitResult(model, before, after, history, state.global_step, best, coefficients, head, seconds)


@contextmanager
def _quiet_logging() -> Generator[None]:
    verbosity = logging.get_verbosity()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)

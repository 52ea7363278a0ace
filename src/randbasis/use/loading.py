"""ADAPTER → READY OBJECT: base, adapter, head and task in one step, from wherever the adapter lies.

reviews = load("reviews.safetensors")
reviews.predict(["a good film"])
"""

import threading
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from randbasis.adapters.saved import AdapterLocation, open_adapter
from randbasis.errors import SettingError, near
from randbasis.train.causal_lm import CausalLanguage
from randbasis.train.chat import conversation
from randbasis.train.images import ImageClassification
from randbasis.train.settings import GenerationSettings
from randbasis.train.task import warn_of_cut
from randbasis.train.task_table import TrainedTask
from randbasis.use.evaluation import find, to_answer, to_generate, to_score
from randbasis.use.rows import read_rows, table_of
from randbasis.use.settings import UseSettings

_LOADING = threading.Lock()
"""transformers keeps what it shows in process-wide settings, which two loads at once would put back wrongly."""


class LoadedAdapter:
    """A trained adapter on its base, ready to answer; :func:`load` makes one.

    Threads may share it: one call runs at a time, the others wait. The answers are those of the commands ``predict``,
    ``evaluate`` and ``generate``.

    Args:
        task: what it was trained for.
        model: base, adapter and head, in evaluation mode.
        where: what it was read from.

    Attributes:
        task: its labels, columns, lengths.
        model: a ``PeftModel``, or the base with its head where there is no adapter.
        where: what it was read from.
    """

    def __init__(self, task: TrainedTask, model: nn.Module, where: str) -> None:
        self.task = task
        self.model = model
        self.where = where
        self._one_call = threading.RLock()  # a tokenizer that two threads use at once cuts the texts of both

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.where!r}: {self.task.name}>"

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; None where the task is of images."""
        return None if isinstance(self.task, ImageClassification) else self.task.tokenizer

    @property
    def image_processor(self) -> Any:
        """The image processor; None where the task is of texts."""
        return self.task.processor if isinstance(self.task, ImageClassification) else None

    def predict(
        self, rows: Iterable[object], *, batch_size: int = 32, probabilities: bool = False, **generation: Any
    ) -> list[dict[str, Any]]:
        """Answer rows.

        Args:
            rows: texts or prompts, pairs of texts, conversations (lists of messages), or images (paths, or images of
                PIL), as the task takes them; or mappings with the columns of the task; or a data frame. Answers in them
                are not looked at.
            batch_size: rows at a time.
            probabilities: those of every class, too.
            generation: how texts are chosen, where the task writes them; see :meth:`generate`.

        Returns:
            For each row ``{"prediction"}``, a class, a number or a text; for classes with ``"probability"``, and on
            request ``"probabilities"``, class → probability.

        Raises:
            DataFormatError: a row is none of the task.
            ColumnError: a mapping lacks a column, or has nothing in it.
            SettingError: the task has no classes, no prompts, or no texts to choose.
        """
        with self._one_call:
            task = self._own_task(generation)
            table = table_of(rows, task)
            if not table.rows:
                return []
            examples = to_answer(task, table)
            return task.predict(self.model, examples, batch_size, probabilities=probabilities)

    def generate(
        self, prompts: Sequence[str | list[dict[str, Any]]], *, batch_size: int = 32, **generation: Any
    ) -> list[str]:
        """Continue prompts.

        Args:
            prompts: texts as a person writes them: what the adapter was trained with around a prompt is added, such as
                a separator or a chat template; or conversations, lists of messages, where it was trained on some.
            batch_size: prompts at a time.
            generation: how a text is chosen: ``max_new_tokens``, ``beams``, ``length_penalty``, ``sample``,
                ``temperature``, ``top_k``, ``top_p``, ``repetition_penalty``, ``seed``; greedy by default. See
                :class:`randbasis.train.GenerationSettings`.

        Returns:
            The text of each, without its prompt.

        Raises:
            SettingError: the task writes no texts, or an option is unknown or out of range.
        """
        if isinstance(prompts, str):
            raise SettingError("prompts must be a list of texts, got one text; put brackets around it")
        with self._one_call:
            task = to_generate(self._own_task(generation))
            wanted = [
                task.prompt_of(one) if isinstance(one, str) else task.prompt_of_messages(conversation(one))
                for one in prompts
            ]
            warn_of_cut(task, task.prompt_examples(wanted), "prompts")
            return task.answers(self.model, wanted, batch_size) if wanted else []

    def evaluate(
        self, data: str | Path | Iterable[object], *, batch_size: int = 32, texts: bool | None = None
    ) -> dict[str, Any]:
        """Score rows whose answers are known.

        Args:
            data: a file of rows, a folder or zip of images, or mappings with the columns of the task.
            batch_size: rows at a time.
            texts: generate texts for BLEU and chrF; None: where the task has prompts and targets.

        Returns:
            ``{"task", "rows", "cut", "metrics"}``; ``cut`` counts the rows that are longer than the task takes.

        Raises:
            EmptyDataError: there are no rows, or no answers in them.
            RandbasisError: the data cannot be read; each rule has its class.
        """
        with self._one_call:
            task = copy(self.task)
            at_hand = not isinstance(data, str | Path)
            table = table_of(data, task) if at_hand else read_rows(UseSettings(data=data), task)
            examples, told = to_score(task, table, texts)
            return told | {"metrics": task.score(self.model, examples, batch_size)}

    def _own_task(self, generation: dict[str, Any]) -> TrainedTask:
        """The task for one call, which may change it."""
        task = copy(self.task)
        if generation and not isinstance(task, CausalLanguage):
            raise SettingError(f"{next(iter(generation))} is of texts that are generated, the task is {task.name}")
        known = [field.name for field in fields(GenerationSettings)]
        for name in generation.keys() - {*known}:
            raise SettingError(f"there is no option {name!r} of generation; {near(name, known)}")
        if isinstance(task, CausalLanguage):
            task.generation = GenerationSettings(**generation)
        return task


def load(
    where: AdapterLocation,
    model: str | None = None,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "float32",
    columns: dict[str, str] | None = None,
) -> LoadedAdapter:
    """A trained adapter on its base, with its task: everything that is needed to use it.

    Args:
        where: folder of a training run; a packed file, by path, URL or bytes; ``store:NAME@VERSION``; or an adapter at
            hand. See :func:`randbasis.open_adapter`.
        model: folder or hub name of the base; None takes the one that the adapter names. A packed file names a base on
            the machine that made it by the last part of its path.
        device: ``"auto"`` (a GPU where there is one), or one of torch, such as ``"cpu"`` or ``"cuda:1"``.
        dtype: of the base, ``"float32"``, ``"bfloat16"`` or ``"float16"``; coefficients and head stay float32.
        columns: other names for columns of the task: ``{"text": "review"}``.

    Raises:
        AdapterMissingError: there is no adapter.
        AdapterFilesError: nobody described its task, and the base is no language model, so that labels are not known;
            or the task is of a newer version.
        BaseMismatchError: the base is not the one that it was made for.
        DataMissingError: the base cannot be found.
        SettingError: no base is named; or device, dtype or a column is unknown.
        RandbasisError: the adapter cannot be read; each rule has its class.
    """
    found = open_adapter(where)
    named = str(dtype).removeprefix("torch.")
    settings = UseSettings(found, model, device=device, dtype=named, columns=columns or {})
    with _LOADING:
        ready = find(settings)
        return LoadedAdapter(ready.task, ready.load(settings), found.where)

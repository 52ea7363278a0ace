"""Using what a run left: scores, answers and texts from a saved adapter."""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from randbasis.adapters.base_model import read_config
from randbasis.adapters.saved import SavedAdapter, open_adapter
from randbasis.errors import AdapterFilesError, DataMissingError, EmptyDataError, SettingError, near
from randbasis.progress import Track
from randbasis.train.causal_lm import CausalLanguage, end_token_id
from randbasis.train.chat import Chat, conversation
from randbasis.train.classification import TextClassification, allowed_length
from randbasis.train.images import ImageClassification
from randbasis.train.machine import Quantized, torch_device
from randbasis.train.model_reading import read_tokenizer
from randbasis.train.row_format import RowFormat
from randbasis.train.settings import TrainSettings, check_distinct
from randbasis.train.tabular import Row, Table
from randbasis.train.task import Example, warn_of_cut
from randbasis.train.task_table import TrainedTask, described_task
from randbasis.train.threads import torch_threads
from randbasis.train.trained_parameters import load_adapter
from randbasis.use.rows import read_rows, without_answers
from randbasis.use.settings import UseSettings


@dataclass(frozen=True)
class Found:
    """What is to be used, before any weights are read.

    Args:
        task: what the adapter was trained for.
        base: folder or hub name of the base.
        adapter: the adapter, ``None`` for the base alone.
    """

    task: TrainedTask
    base: str
    adapter: SavedAdapter | None

    def load(self, settings: UseSettings) -> nn.Module:
        """Base and adapter, ready to answer.

        Raises:
            AdapterFilesError: the files of the adapter cannot be read.
            BaseMismatchError: the adapter was made for another base.
        """
        quantized = Quantized.of(self.adapter.base_bits if self.adapter else None, settings.device)
        with nullcontext() if self.adapter is None else self.adapter.on(self.base):
            model = self.task.load_model(self.base, dtype=settings.dtype, seed=0, quantized=quantized)
            if self.adapter is not None:
                model = load_adapter(model, self.adapter)
        return (model if quantized else model.to(torch_device(settings.device))).eval()


def find(settings: UseSettings, track: Track = iter) -> Found:
    """Look at the adapter and the base's tokenizer.

    Args:
        settings: which adapter.
        track: shows how far the answers of the task have come.

    Raises:
        AdapterFilesError: the adapter lacks what is needed, or its task is not described.
        SettingError: no base is named, or a column is given that the task has not.
        DataMissingError: the base is not there.
    """
    settings.check()
    torch_device(settings.device)
    saved = None if settings.adapter is None else open_adapter(settings.adapter)
    base = settings.model or (saved.base_model if saved else "")
    if not base:
        raise SettingError(f"the adapter {saved.where if saved else None!r} does not name its base; give model")
    try:
        task = described_task(saved, base) if saved and saved.task else _language_task(saved, base, settings)
    except DataMissingError as error:
        if saved is None:
            raise
        if settings.model is not None:
            raise DataMissingError(f"{saved.where} was made for {saved.base_model!r}: {error}") from error
        raise DataMissingError(
            f"{saved.where} names {base!r} as its base; where it lies elsewhere, give model: {error}"
        ) from error
    task.track = track
    _rename_columns(task, settings.columns)
    if isinstance(task, CausalLanguage):
        task.generation = settings.generation
    return Found(task, base, saved)


def evaluate(settings: UseSettings, *, texts: bool | None = None, track: Track = iter) -> dict[str, Any]:
    """Score an adapter on a file of rows.

    Args:
        settings: which adapter and rows.
        texts: as for :func:`to_score`.
        track: shows the progress over the batches.

    Returns:
        ``{"task", "rows", "cut", "metrics"}``; ``cut`` counts the rows, and the whole targets, above the length.

    Raises:
        RandbasisError: one class per broken rule; see :mod:`randbasis.errors`.
    """
    found = find(settings, track)
    table = read_rows(settings, found.task)
    examples, told = to_score(found.task, table, texts)
    with torch_threads(settings.threads):
        return told | {"metrics": found.task.score(found.load(settings), examples, settings.batch_size)}


def to_score(task: TrainedTask, table: Table, texts: bool | None) -> tuple[Sequence[Example], dict[str, Any]]:
    """Examples with their answers, and what is told of them: ``task``, ``rows`` and ``cut``.

    Args:
        task: which is told whether it generates texts.
        table: the rows.
        texts: generate texts for BLEU and chrF; ``None``: where the task has prompts and targets. Rows of the same
            prompt are references of one text.

    Raises:
        EmptyDataError: there are no rows, or no answers in them.
        SettingError: texts are asked for where there are no prompts.
    """
    if isinstance(task, CausalLanguage):
        if texts and not task.prompted:
            raise SettingError("BLEU and chrF need a prompt column and a target column")
        task.with_generation = task.prompted if texts is None else texts
    examples = task.encode(table, training=False)
    cut = warn_of_cut(task, examples, f"rows of {table.source}")
    if task.needs_answers and not {"label", "labels"} & set(examples[0]):
        raise EmptyDataError(f"{table.source} has no column of answers; its columns are {', '.join(table.columns)}")
    return examples, {"task": task.name, "rows": len(table.rows), "cut": cut}


def predict(settings: UseSettings, *, track: Track = iter) -> list[Row]:
    """Answer a file of rows.

    Args:
        settings: which adapter and rows.
        track: shows the progress over the batches.

    Returns:
        The rows with ``prediction`` added, for classes ``probability``, and with ``settings.probabilities`` those of
        every class by its name.

    Raises:
        RandbasisError: one class per broken rule; see :mod:`randbasis.errors`.
    """
    found = find(settings, track)
    table = read_rows(settings, found.task, answered=False)
    examples = to_answer(found.task, table)
    with torch_threads(settings.threads):
        model = found.load(settings)
        answers = found.task.predict(model, examples, settings.batch_size, probabilities=settings.probabilities)
    replaced = {*answers[0]} & {*table.columns}
    if replaced:
        warnings.warn(
            f"{table.source} has the columns {', '.join(sorted(replaced))} already; the answers take their place",
            stacklevel=2,
        )
    return [{**row, **answer} for row, answer in zip(table.rows, answers, strict=True)]


def to_answer(task: TrainedTask, table: Table) -> Sequence[Example]:
    """Examples without their answers, which the rows need not have.

    Raises:
        SettingError: the rows of the task are plain text, which asks for no answer.
        RandbasisError: a column is missing, or a cell holds no text or image.
    """
    if isinstance(task, CausalLanguage) and not task.prompted:
        raise SettingError("predict needs the column of the prompts (prompt_column); generate takes prompts themselves")
    examples = task.encode(without_answers(table, task), training=False)
    warn_of_cut(task, examples, f"rows of {table.source}")
    return examples


def generate(
    settings: UseSettings,
    prompts: Sequence[str] = (),
    *,
    messages: Sequence[Sequence[dict[str, Any]]] = (),
    track: Track = iter,
) -> list[Row]:
    """Texts from prompts, given or in the rows.

    Args:
        settings: which adapter, and which rows where nothing else is given.
        prompts: what to ask, as a person writes it: what the adapter was trained with around it is added, such as a
            chat template with the prompt as the first message.
        messages: conversations to go on with, for an adapter that was trained on some.
        track: shows the progress over the batches.

    Returns:
        ``{"prompt", "text"}`` for each, or ``{"messages", "text"}``.

    Raises:
        RandbasisError: one class per broken rule; see :mod:`randbasis.errors`.
    """
    found = find(settings, track)
    task = to_generate(found.task)
    talks = [conversation([*one]) for one in messages]
    wanted = [*map(task.prompt_of, prompts), *map(task.prompt_of_messages, talks)]
    given: list[Row] = [*({"prompt": one} for one in prompts), *({"messages": one} for one in talks)]
    if not wanted:
        if settings.data is None or not task.prompted:
            raise SettingError("there is nothing to generate from; give a prompt, or data and its prompt column")
        wanted = task.prompts(read_rows(settings, task))
        given = [{"prompt": one} for one in wanted]
    warn_of_cut(task, task.prompt_examples(wanted), "prompts")
    with torch_threads(settings.threads):
        texts = task.answers(found.load(settings), wanted, settings.batch_size)
    return [{**one, "text": text} for one, text in zip(given, texts, strict=True)]


def to_generate(task: TrainedTask) -> CausalLanguage:
    """The task, if it is one that writes texts.

    Raises:
        SettingError: it is another.
    """
    if not isinstance(task, CausalLanguage):
        raise SettingError(f"the adapter was trained for {task.name}; only causal-lm generates texts, use predict")
    return task


def _language_task(saved: SavedAdapter | None, name: str, settings: UseSettings) -> CausalLanguage:
    """The task of a base language model, or of an adapter for one that has no description of its task."""
    config = read_config(name)
    architectures: list[str] = config.architectures or []
    if not any(architecture.endswith("ForCausalLM") for architecture in architectures):
        raise AdapterFilesError(
            f"{_undescribed(saved)}the base {name!r} is not a causal language model, so labels and columns are not "
            "known; give the folder of a training run, or a file that was packed from it; else put the adapter on a "
            "model of your own (peft.PeftModel, or randbasis.load_packed) and use that"
        )
    tokenizer = read_tokenizer(name)
    columns: dict[str, str | None] = {key: settings.columns.get(key) for key in ("prompt", "target", "text")}
    format = RowFormat(TrainSettings.separator if columns["target"] else "")
    end_id = None
    if "messages" in settings.columns:
        columns = {"messages": settings.columns["messages"]}
        end_id = Chat(tokenizer, None).end_id
    limit = allowed_length(tokenizer, config)
    return CausalLanguage(
        tokenizer, columns, limit, format, end_token_id(tokenizer, None) if end_id is None else end_id
    )


def _undescribed(saved: SavedAdapter | None) -> str:
    if saved is None:
        return ""
    where = "no task.json beside it" if saved.whole is None else "none was packed with it"
    return f"nothing describes the task of {saved.where} ({where}), and "


def _meaningless(task: TrainedTask, key: str) -> str | None:
    """Why the rows of a task have no such column, whatever it is called; None where they have."""
    if isinstance(task, TextClassification) and key == "text_pair" and task.columns[key] is None:
        return "the adapter was trained on single texts"
    made = {"prompt": task.format.prompt, "target": task.format.target} if isinstance(task, CausalLanguage) else {}
    template = made.get(key)
    return f"the adapter has a template for it, of {', '.join(map(repr, template.fields))}" if template else None


def _rename_columns(task: TrainedTask, names: dict[str, str]) -> None:
    if not names:
        return
    known = {} if isinstance(task, ImageClassification) else task.columns
    if isinstance(task, CausalLanguage) and not task.prompted:
        task.format = replace(task.format, separator="")  # trained on plain text: nothing stands behind a prompt
    for key, value in names.items():
        if reason := _meaningless(task, key):
            raise SettingError(f"{key}_column has no meaning here, got {value!r}: {reason}; leave it out")
        if key not in known:
            raise SettingError(f"{task.name} has no {key}_column; {near(key, known)}")
        known[key] = value
    check_distinct({f"{key}_column": name for key, name in known.items()})

"""Rows to be scored or answered: of a file, or at hand."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

from randbasis.errors import DataFormatError, EmptyDataError, SettingError, near
from randbasis.train.causal_lm import CausalLanguage
from randbasis.train.classification import TextClassification
from randbasis.train.embedding import Embedding
from randbasis.train.images import EVAL_SPLITS, ImageClassification, read_images, read_unsorted
from randbasis.train.sources import read_sources
from randbasis.train.splits import sample
from randbasis.train.tabular import Row, Table
from randbasis.train.task_table import TrainedTask
from randbasis.use.settings import UseSettings

AT_HAND = "the rows given"


def read_rows(settings: UseSettings, task: TrainedTask, *, answered: bool = True) -> Table:
    """The rows that the settings name, as many as they ask for.

    Args:
        settings: which rows.
        task: which says the columns.
        answered: whether the rows need answers; images that have none may lie in any folder, or be one file.

    Raises:
        SettingError: no data were named.
        EmptyDataError: an archive has no such split.
    """
    if settings.data is None:
        raise SettingError("data is needed: a file of rows, or a folder or zip of images")
    if isinstance(task, ImageClassification) and not answered and (unsorted := read_unsorted(settings.data)):
        if settings.split is not None:
            raise EmptyDataError(f"{settings.data} has no split {settings.split!r}, and no folders of classes")
        table = unsorted
    elif isinstance(task, ImageClassification):
        splits = read_images(settings.data)
        name = settings.split or next((split for split in EVAL_SPLITS if split in splits), next(iter(splits)))
        if name not in splits:
            raise EmptyDataError(f"{settings.data} has no split {name!r}; {near(name, splits)}")
        table = splits[name]
    else:
        wanted = [name for name in task.columns.values() if name is not None]
        if isinstance(task, CausalLanguage):
            wanted += task.format.fields
        table = read_sources((settings.data,), kind=settings.kind, wanted=wanted)
    return table if settings.limit is None else table.subset(sample(len(table.rows), settings.limit, 0))


def table_of(rows: Iterable[object], task: TrainedTask) -> Table:
    """Rows at hand as a table.

    Args:
        rows: texts, pairs of texts, conversations (lists of messages), or images (paths, or images of PIL), as the task
            takes them; or mappings with its columns, by name; or a data frame. What else a mapping holds is left alone.
        task: which says the columns.

    Raises:
        DataFormatError: a row is none of the task, or there is one row and no list.
        SettingError: a text is given, and nobody described the columns of the task.
    """
    if isinstance(rows, str | bytes | Mapping):
        raise DataFormatError(
            f"rows must be a list, got one {type(cast(object, rows)).__name__}; put brackets around it"
        )
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # a frame of pandas, which iterates over its columns
        rows = cast("Iterable[object]", cast(Any, rows).to_dict("records"))
    made = [_row(value, number, task) for number, value in enumerate(rows, 1)]
    return Table(tuple(dict.fromkeys(name for row in made for name in row)), made, AT_HAND)


def _row(value: object, number: int, task: TrainedTask) -> Row:
    if isinstance(value, Mapping):
        return dict(cast("Mapping[str, Any]", value))
    if isinstance(task, ImageClassification):
        return {"image": value}
    chat = task.columns.get("messages")
    if chat is not None:
        return {chat: [{"role": "user", "content": value}] if isinstance(value, str) else value}
    names = _read_columns(task)
    parts = cast("list[object]", [*value] if isinstance(value, list | tuple) else [value])
    if isinstance(task, Embedding) and len(parts) == 1:
        names = names[:1]  # one text has an embedding, two have a cosine
    if len(parts) != len(names) or not all(isinstance(part, str) for part in parts):
        wanted = {1: "a text", 2: "a pair of texts"}.get(len(names), f"{len(names)} texts")
        raise DataFormatError(
            f"row {number} of {AT_HAND} must be {wanted}, or a mapping with {' and '.join(map(repr, names))}, got "
            f"{value!r:.80}"
        )
    return dict(zip(names, parts, strict=True))


def _read_columns(task: CausalLanguage | TextClassification | Embedding) -> list[str]:
    """The columns that are read for an answer."""
    if isinstance(task, CausalLanguage) and task.format.prompt is not None:
        return list(task.format.prompt.fields)
    names = [name for role in ("text", "text_pair", "prompt") if (name := task.columns.get(role)) is not None]
    if not names:
        raise SettingError("the columns of the task are not known; name them (columns), or give mappings")
    return names


def without_answers(table: Table, task: TrainedTask) -> Table:
    """The table without the column of answers, whose values need not be known labels."""
    answer = {"causal-lm": "target", "sequence-classification": "label"}.get(task.name)
    names = {"label"} if isinstance(task, ImageClassification) else {task.columns.get(answer or "label")}
    if isinstance(task, CausalLanguage) and task.format.target is not None:
        names = {*task.format.target.fields} - {*(task.format.prompt.fields if task.format.prompt else ())}
    return replace(table, columns=tuple(column for column in table.columns if column not in names))

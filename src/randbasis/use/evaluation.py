"""Using what a run left: scores, answers and texts from a saved adapter."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from randbasis.adapters.base_model import read_config
from randbasis.adapters.saved import SavedAdapter, open_adapter
from randbasis.errors import AdapterFilesError, EmptyDataError, SettingError, near
from randbasis.files.locations import Location
from randbasis.files.whole_file import whole_file
from randbasis.train.causal_lm import CausalLanguage, end_token_id
from randbasis.train.chat import Chat, conversation
from randbasis.train.classification import TextClassification, allowed_length
from randbasis.train.images import EVAL_SPLITS, ImageClassification, read_images
from randbasis.train.loop import torch_threads
from randbasis.train.model_reading import read_tokenizer
from randbasis.train.row_format import RowFormat
from randbasis.train.run import TASK_CLASSES
from randbasis.train.settings import TrainSettings, check_distinct
from randbasis.train.sources import read_sources
from randbasis.train.splits import sample
from randbasis.train.tabular import Row, Table
from randbasis.train.task import Task, warn_of_cut
from randbasis.train.trained_parameters import load_adapter
from randbasis.use.settings import UseSettings

TrainedTask = CausalLanguage | TextClassification | ImageClassification


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
        model = self.task.load_model(self.base, dtype=settings.dtype, seed=0)
        if self.adapter is not None:
            model = load_adapter(model, self.adapter)
        use_gpu = settings.device == "auto" and torch.cuda.is_available()
        return model.to("cuda" if use_gpu else "cpu").eval()


def find(settings: UseSettings) -> Found:
    """Look at the adapter and the base's tokenizer.

    Raises:
        AdapterFilesError: the adapter lacks what is needed, or its task is not described.
        SettingError: no base is named, or a column is given that the task has not.
    """
    settings.check()
    saved = None if settings.adapter is None else open_adapter(settings.adapter)
    base = settings.model or (saved.base_model if saved else "")
    if not base:
        raise SettingError(f"the adapter {saved.where if saved else None!r} does not name its base; give model")
    task = _described(saved.task, base) if saved and saved.task else _language_task(saved, base, settings)
    _rename_columns(task, settings.columns)
    if isinstance(task, CausalLanguage):
        task.generation = settings.generation
    return Found(task, base, saved)


def evaluate(settings: UseSettings, *, texts: bool | None = None) -> dict[str, Any]:
    """Score an adapter on a file of rows.

    Args:
        settings: which adapter and rows.
        texts: generate texts for BLEU and chrF; ``None``: where the task has prompts and targets. Rows of the same
            prompt are references of one text.

    Returns:
        ``{"task", "rows", "cut", "metrics"}``; ``cut`` counts the rows, and the whole targets, above the length.

    Raises:
        RandbasisError: one class per broken rule; see :mod:`randbasis.errors`.
    """
    found = find(settings)
    table = read_rows(settings, found.task)
    if isinstance(found.task, CausalLanguage):
        if texts and not found.task.prompted:
            raise SettingError("BLEU and chrF need a prompt column and a target column")
        found.task.with_generation = found.task.prompted if texts is None else texts
    examples = found.task.encode(table, training=False)
    cut = warn_of_cut(found.task, examples, f"rows of {table.source}")
    if not {"label", "labels"} & set(examples[0]):
        raise EmptyDataError(f"{table.source} has no column of answers; its columns are {', '.join(table.columns)}")
    with torch_threads(settings.threads):
        metrics = found.task.score(found.load(settings), examples, settings.batch_size)
    return {"task": found.task.name, "rows": len(table.rows), "cut": cut, "metrics": metrics}


def predict(settings: UseSettings) -> list[Row]:
    """Answer a file of rows.

    Returns:
        The rows with ``prediction`` added, and ``probability`` for classes.

    Raises:
        RandbasisError: one class per broken rule; see :mod:`randbasis.errors`.
    """
    found = find(settings)
    if isinstance(found.task, CausalLanguage) and not found.task.prompted:
        raise SettingError("predict needs the column of the prompts (prompt_column); generate takes prompts themselves")
    table = read_rows(settings, found.task)
    examples = found.task.encode(_without_answers(table, found.task), training=False)
    warn_of_cut(found.task, examples, f"rows of {table.source}")
    with torch_threads(settings.threads):
        answers = found.task.predict(found.load(settings), examples, settings.batch_size)
    return [{**row, **answer} for row, answer in zip(table.rows, answers, strict=True)]


def generate(
    settings: UseSettings, prompts: Sequence[str] = (), *, messages: Sequence[Sequence[dict[str, Any]]] = ()
) -> list[Row]:
    """Texts from prompts, given or in the rows.

    Args:
        settings: which adapter, and which rows where nothing else is given.
        prompts: what to ask, as a person writes it: what the adapter was trained with around it is added, such as a
            chat template with the prompt as the first message.
        messages: conversations to go on with, for an adapter that was trained on some.

    Returns:
        ``{"prompt", "text"}`` for each, or ``{"messages", "text"}``.

    Raises:
        RandbasisError: one class per broken rule; see :mod:`randbasis.errors`.
    """
    found = find(settings)
    task = found.task
    if not isinstance(task, CausalLanguage):
        raise SettingError(f"the adapter was trained for {task.name}; only causal-lm generates texts, use predict")
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


def read_rows(settings: UseSettings, task: Task) -> Table:
    """The rows that the settings name, as many as they ask for.

    Raises:
        SettingError: no data were named.
        EmptyDataError: an archive has no such split.
    """
    if settings.data is None:
        raise SettingError("data is needed: a file of rows, or a folder or zip of images")
    if isinstance(task, ImageClassification):
        splits = read_images(settings.data)
        name = settings.split or next((split for split in EVAL_SPLITS if split in splits), next(iter(splits)))
        if name not in splits:
            raise EmptyDataError(f"{settings.data} has no split {name!r}; {near(name, splits)}")
        table = splits[name]
    else:
        assert isinstance(task, CausalLanguage | TextClassification)
        wanted = [name for name in task.columns.values() if name is not None]
        if isinstance(task, CausalLanguage):
            wanted += task.format.fields
        table = read_sources((settings.data,), kind=settings.kind, wanted=wanted)
    return table if settings.limit is None else table.subset(sample(len(table.rows), settings.limit, 0))


def write_lines(rows: Sequence[Row], path: Location, *, overwrite: bool = False) -> None:
    """Write rows as JSON lines, complete or not at all.

    Raises:
        OutputExistsError: the file exists and ``overwrite`` was not given.
        SaveError: the operating system refused.
    """
    with whole_file(path, overwrite=overwrite) as temporary:
        temporary.write_text("".join(json_line(row) + "\n" for row in rows), encoding="utf-8")


def json_line(row: Row) -> str:
    """A row as one line of JSON; what JSON has no form for, such as an image, is written as text."""
    return json.dumps(row, ensure_ascii=False, default=str)


def _described(description: dict[str, Any], name: str) -> TrainedTask:
    kind = TASK_CLASSES.get(description.get("task", ""))
    if kind is None:
        raise AdapterFilesError(f"task {description.get('task')!r} of the adapter is unknown; {near('', TASK_CLASSES)}")
    try:
        return kind.from_description(description, name)
    except KeyError as error:
        if error.args and error.args[0] in description:
            raise
        raise AdapterFilesError(f"the task.json of the adapter lacks {error}; was it edited?") from error


def _language_task(saved: SavedAdapter | None, name: str, settings: UseSettings) -> CausalLanguage:
    """The task of a base language model, or of an adapter for one that has no description of its task."""
    config = read_config(name)
    architectures: list[str] = config.architectures or []
    if not any(architecture.endswith("ForCausalLM") for architecture in architectures):
        raise AdapterFilesError(
            f"{_undescribed(saved)}the base {name!r} is not a causal language model, so labels and columns are not "
            "known; give the output folder of a training run"
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
    if saved.whole is None:
        return "the adapter has no task.json, and "
    return f"{saved.where} is a packed adapter, which holds no description of its task (task.json of a folder), and "


def _rename_columns(task: TrainedTask, names: dict[str, str]) -> None:
    if not names:
        return
    known = {} if isinstance(task, ImageClassification) else task.columns
    for key, value in names.items():
        if key not in known:
            raise SettingError(f"{task.name} has no {key}_column; {near(key, known)}")
        known[key] = value
    check_distinct({f"{key}_column": name for key, name in known.items()})


def _without_answers(table: Table, task: TrainedTask) -> Table:
    """The table without the column of answers, whose values need not be known labels."""
    answer = {"causal-lm": "target", "sequence-classification": "label"}.get(task.name)
    names = {"label"} if isinstance(task, ImageClassification) else {task.columns.get(answer or "label")}
    if isinstance(task, CausalLanguage) and task.format.target is not None:
        names = {*task.format.target.fields} - {*(task.format.prompt.fields if task.format.prompt else ())}
    return replace(table, columns=tuple(column for column in table.columns if column not in names))

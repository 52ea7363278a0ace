"""The rows that runs on a data set train on, choose learning rates by, and are tested on."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from randbasis.compare.study import LANGUAGE, Data
from randbasis.errors import EmptyDataError
from randbasis.train import CausalLanguage, ImageClassification, Table, Task, TextClassification
from randbasis.train.images import EVAL_SPLITS, held_images, image_tables
from randbasis.train.settings import DataSettings
from randbasis.train.sources import read_sources
from randbasis.train.splits import few_shot, sample
from randbasis.train.task import Example

SPLIT_SEED = 20_000
"""Of every draw of rows that does not depend on the run."""
TEST_SPLITS = tuple(sorted(EVAL_SPLITS))
"""Of an archive the first of these is tested on: the order in which an archive has them."""


@dataclass(frozen=True)
class Cell:
    """A data set with its rows read.

    Args:
        task: the task, shared by all runs.
        train: examples to learn from.
        dev: held-out examples, for the sweep.
        test: examples that final runs are scored on.
    """

    task: Task
    train: Sequence[Example]
    dev: Sequence[Example]
    test: Sequence[Example]


@lru_cache(maxsize=4)
def read_cell(data_set: Data, sample_set: int) -> Cell:
    """Read the rows of a data set; the same ones in every process.

    Args:
        data_set: which.
        sample_set: which draw of the training rows.

    Raises:
        EmptyDataError: there are fewer rows than the study asks for.
    """
    if data_set.base.task == LANGUAGE:
        return _language(data_set, sample_set)
    if data_set.base.task == ImageClassification.name:
        return _images(data_set, sample_set)
    return _text(data_set, sample_set)


def _text(data_set: Data, sample_set: int) -> Cell:
    """Whole held-out texts, and training texts of which none is a part of one of them, nor the other way round."""
    data = data_set.base.data
    table = read_sources(data.train_sources, kind=data.kind, wanted=data.columns)
    held = table if data_set.dev is None else _rows(data_set, data_set.dev)
    held_texts = _texts(held, data)
    long_enough = [i for i, text in enumerate(held_texts) if len(text.split()) >= data_set.dev_words]
    what = f"texts of {data_set.dev_words} words or more"
    dev = _held_out(held, long_enough, data_set, what, "lower dev_rows or dev_words")
    apart = apart_from([held_texts[i] for i in dev], _texts(table, data))
    train = _trained(table, apart, data_set, sample_set, "training rows")
    task = TextClassification.prepare(data_set.base, table)
    return Cell(
        task,
        task.encode(table.subset(train), training=True),
        task.encode(held.subset(dev), training=False),
        task.encode(_limited(_rows(data_set, *data.eval_sources), data.eval_limit), training=False),
    )


def _texts(table: Table, data: DataSettings) -> list[str]:
    columns = [table.column(name) for name in (data.text_column, data.text_pair_column) if name is not None]
    return [" ".join(str(text) for text in row) for row in zip(*columns, strict=True)]


def _held_out(table: Table, rows: Sequence[int], data_set: Data, what: str, way_out: str) -> list[int]:
    """``dev_rows`` of some rows."""
    if len(rows) < data_set.dev_rows:
        raise _too_few(f"{table.source} has {len(rows)} {what}", f"dev_rows = {data_set.dev_rows}", way_out)
    return _chosen(table, rows, data_set, data_set.dev_rows, SPLIT_SEED)


def _trained(table: Table, rows: Sequence[int], data_set: Data, sample_set: int, what: str) -> list[int]:
    """A draw of those that are left to train on."""
    data = data_set.base.data
    if len(rows) < (data.limit or 1):
        left = f"{table.source} leaves {len(rows)} {what} beside the held-out ones"
        raise _too_few(left, f"limit = {data.limit or 1}", "lower limit or dev_rows")
    return _chosen(table, rows, data_set, data.shots or data.limit or len(rows), SPLIT_SEED + sample_set)


def _chosen(table: Table, rows: Sequence[int], data_set: Data, count: int, seed: int) -> list[int]:
    """``count`` of some rows, of each class where the study counts shots."""
    data = data_set.base.data
    if data.shots:
        labels = table.column(data.label_column or "label")
        places = few_shot([str(labels[i]) for i in rows], count, seed)
    else:
        places = sample(len(rows), count, seed)
    return [rows[i] for i in places]


def apart_from(held: Sequence[str], texts: Sequence[str]) -> list[int]:
    """Places of the texts that neither contain a held-out text nor are contained in one."""
    held = [text.strip() for text in held]
    joined = "\n".join(held)
    rest = [i for i, text in enumerate(texts) if text.strip() not in joined]
    whole = "\n".join(texts[i] for i in rest)
    within = [text for text in held if text in whole]
    return [i for i in rest if not any(text in texts[i] for text in within)]


def _images(data_set: Data, sample_set: int) -> Cell:
    """Images to train on, others held out, and those of ``eval``, else of the test split of the archive."""
    data = data_set.base.data
    table, test = image_tables(data.train, data.eval, TEST_SPLITS)
    if test is None:
        raise EmptyDataError(
            f"{Path(str(data.train)).name} has images of train alone, none to test on; name them as eval"
        )
    held = table if data_set.dev is None else held_images(data_set.dev, TEST_SPLITS)
    dev = _held_out(held, range(len(held.rows)), data_set, "images", "lower dev_rows")
    rest = sorted(set(range(len(table.rows))) - set(dev if held is table else ()))
    train = _trained(table, rest, data_set, sample_set, "images")
    task = ImageClassification.prepare(data_set.base, table)
    return Cell(
        task,
        task.encode(table.subset(train), training=True),
        task.encode(held.subset(dev), training=False),
        task.encode(_limited(test, data.eval_limit), training=False),
    )


def _language(data_set: Data, sample_set: int) -> Cell:
    """Pairs that fit into ``max_length`` whole; held-out and test prompts with all their references.

    Where no file of held-out rows is named, whole prompts of the training rows are held out.
    """
    data = data_set.base.data
    table = read_sources(data.train_sources, kind=data.kind, wanted=data.columns)
    task = CausalLanguage.prepare(data_set.base, table)
    if data_set.dev is None:
        prompts = task.prompts(table)
        distinct = list(dict.fromkeys(prompts))
        if len(distinct) <= data_set.dev_rows:
            raise _too_few(
                f"{table.source} has {len(distinct)} prompts to train on and to hold out",
                f"dev_rows = {data_set.dev_rows}",
                "lower dev_rows, or name a file of held-out rows, dev",
            )
        held = {distinct[i] for i in sample(len(distinct), data_set.dev_rows, SPLIT_SEED)}
        dev = _references(task, table.subset([i for i, one in enumerate(prompts) if one in held]), None)
        table = table.subset([i for i, one in enumerate(prompts) if one not in held])
    else:
        dev = _references(task, _rows(data_set, data_set.dev), data_set.dev_rows)
    train = _drawn(task, table, data.limit, SPLIT_SEED + sample_set)
    task.answer_length = max(sum(label != -100 for label in example["labels"]) for example in train)
    return Cell(task, train, dev, _references(task, _rows(data_set, *data.eval_sources), data.eval_limit))


def _rows(data_set: Data, *paths: str | Path) -> Table:
    return read_sources(paths, kind=data_set.base.data.kind, wanted=data_set.base.data.columns)


def _references(task: CausalLanguage, table: Table, limit: int | None) -> list[Example]:
    """Examples of ``limit`` prompts, one for each reference, of the prompts whose references all fit."""
    examples = task.encode(table, training=False)
    fitting = {id(example) for example in _fitting(task, examples)}
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example["prompt"], []).append(example)
    whole = [group for group in groups.values() if all(id(example) in fitting for example in group)]
    if len(whole) < (limit or 1):
        raise _too_few(
            f"{len(whole)} of {len(groups)} prompts of {table.source} fit into {task.max_length} tokens with all their "
            "references",
            f"{limit or 1}",
            "raise max_length, or lower dev_rows or eval_limit",
        )
    chosen = sample(len(whole), limit or len(whole), SPLIT_SEED)
    return [example for i in chosen for example in whole[i]]


def _fitting(task: CausalLanguage, examples: list[Example]) -> list[Example]:
    """Examples that were not cut; one as long as ``max_length`` may have been."""
    return [example for example in examples if len(example["input_ids"]) < task.max_length]


def _too_few(found: str, wanted: str, way_out: str) -> EmptyDataError:
    """Rows are not made up for in silence: the report tells how many there were."""
    return EmptyDataError(f"{found}, but the study asks for {wanted}; {way_out}")


def _drawn(task: CausalLanguage, table: Table, limit: int | None, seed: int) -> list[Example]:
    """The first ``limit`` pairs that fit, in the order of a draw, of which no more are encoded than need be."""
    rows = len(table.rows)
    order = [int(i) for i in np.random.default_rng(seed).permutation(rows)]
    step, found = 2 * (limit or rows or 1), list[Example]()
    for at in range(0, rows, step):
        found += _fitting(task, task.encode(table.subset(order[at : at + step]), training=True))
        if limit is not None and len(found) >= limit:
            break
    if len(found) < (limit or 1):
        raise _too_few(
            f"{len(found)} of {rows} training pairs of {table.source} fit into {task.max_length} tokens",
            f"limit = {limit or 1}",
            "raise max_length or lower limit",
        )
    return found[:limit]


def _limited(table: Table, limit: int | None) -> Table:
    return table if limit is None else table.subset(sample(len(table.rows), limit, SPLIT_SEED))

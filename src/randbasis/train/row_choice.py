"""Which of the rows a run learns from and which it is judged by, with the words that tell it."""

from dataclasses import dataclass

from randbasis.errors import EmptyDataError, SettingError
from randbasis.train.images import ImageClassification
from randbasis.train.settings import DataSettings, TrainSettings
from randbasis.train.splits import few_shot, hold_out, sample
from randbasis.train.tabular import Table
from randbasis.train.task import Task


@dataclass(frozen=True)
class Chosen:
    """Rows of a run.

    Args:
        table: the rows.
        told: how many of which these are, and what drew them.
    """

    table: Table
    told: str

    def taken(self, places: list[int], how: str) -> "Chosen":
        """Some of these rows."""
        told = f"{len(places)} of {self.told.removeprefix('all ')}, {how}"
        return Chosen(self.table.subset(places), told)


def choose_rows(settings: TrainSettings, task: Task, train: Table, eval: Table | None) -> tuple[Chosen, Chosen]:
    """Hold rows out where no others were given, then keep as many as were asked for; every draw is by ``train_seed``.

    Raises:
        SettingError: a share is to be held out where rows are held out already.
        EmptyDataError: there are too few rows, or too few of a label.
    """
    data, seed = settings.data, settings.loop.train_seed
    drawn = f"drawn by train_seed {seed}"
    learned = _all(train)
    if eval is not None:
        if data.eval_fraction != DataSettings.eval_fraction:
            raise SettingError(
                f"eval_fraction {data.eval_fraction} has no meaning where {eval.source} is held out already; leave it "
                "out"
            )
        judged = _all(eval)
    elif data.eval_fraction == 0:
        judged = Chosen(train.subset([]), "no rows; the last parameters are kept")
    else:
        kept, held = hold_out(task.groups(train), data.eval_fraction, seed)
        judged = learned.taken(held, f"held out by train_seed {seed}")
        learned = learned.taken(kept, "the others are held out")
    if data.shots is not None:
        label = "label" if settings.task == ImageClassification.name else data.label_column
        if label is None:
            raise EmptyDataError("shots are counted by label, and this task has none")
        places = few_shot(learned.table.column(label), data.shots, seed)
        learned = learned.taken(places, f"{data.shots} of each class {drawn}")
    bound = data.limit if data.eval_limit is None else data.eval_limit
    return _bounded(learned, data.limit, seed), _bounded(judged, bound, seed)


def _all(table: Table) -> Chosen:
    return Chosen(table, f"all {len(table.rows)} rows of {table.source}")


def _bounded(rows: Chosen, limit: int | None, seed: int) -> Chosen:
    if limit is None:
        return rows
    places = sample(len(rows.table.rows), limit, seed)
    return rows if len(places) == len(rows.table.rows) else rows.taken(places, f"drawn by train_seed {seed}")

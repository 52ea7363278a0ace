"""What is compared with what, on which data, as plain values; nothing here reads a file or a model.

A study is a list of rows, each a method at a budget, on one or more data sets. A row on a data set is one learning rate
chosen from trials, and a final run a seed.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, cast

from randbasis.compare.record import Phase, Record
from randbasis.errors import StudyError, near
from randbasis.train.settings import TrainSettings

NO_ADAPTER = "none"
WHOLE = "full"
LANGUAGE = "causal-lm"
STARTS = ("allot", "try_seeds", "try_steps", "project")
"""What a row may say of where training starts: see :mod:`randbasis.compare.starts`; ``project`` is a LoRA's rank."""
RATE_STEP = 10**0.5
"""From one learning rate that is tried to the next."""


@dataclass(frozen=True)
class PointSpec:
    """A way to store a trained run: bits of a coefficient, and of a LoRA the rank that it is truncated to."""

    bits: int = 32
    rank: int | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.bits} bits" if self.rank is None else f"rank {self.rank}, {self.bits} bits"


@dataclass(frozen=True)
class Budget:
    """What a row may have: coefficients, or bytes of coefficients and scales at a precision.

    Attributes:
        amount: how many.
        unit: ``"coefficients"`` or ``"bytes"``.
        bits: at which bytes are counted.
    """

    amount: int
    unit: str
    bits: int = 16


@dataclass(frozen=True)
class Row:
    """A method at a budget.

    Attributes:
        name: of the row.
        curve: of the line in the picture that the row is a point of.
        method: one of the command's, ``none`` for a trained head alone, ``full`` for all weights, or one of
            :data:`randbasis.compare.rivals.RIVALS`.
        options: of the method's configuration, as pairs.
        budget: None where the options say all.
        points: how each trained run is stored; the first of a record is always the run as trained.
        rate: in the middle of the learning rates that are tried; None takes that of ``train``.
        data: names of the data sets that the row is run on; empty for all.
        start: where training starts, as pairs of :data:`STARTS`; empty for the method's own start.
    """

    name: str
    curve: str
    method: str
    options: tuple[tuple[str, Any], ...] = ()
    budget: Budget | None = None
    points: tuple[PointSpec, ...] = ()
    rate: float | None = None
    data: tuple[str, ...] = ()
    start: tuple[tuple[str, Any], ...] = ()

    @property
    def adapted(self) -> bool:
        """Whether there is an adapter."""
        return self.method not in (NO_ADAPTER, WHOLE)


@dataclass(frozen=True)
class Data:
    """One data set with the model that is tuned on it, and how long a run lasts.

    Attributes:
        name: of the table.
        base: model, files, columns and loop of every run. Of ``base.data``, ``train`` and ``eval`` are the training and
            the test rows, ``limit`` or ``shots`` how many are trained on, ``eval_limit`` how many are tested on.
        targets: modules that every adapter is put on.
        steps: of a final run.
        trial_steps: of a trial.
        dev_rows: held-out rows that learning rates are chosen by, of each class where ``shots`` is given.
        dev: file of those rows; None draws them from the training rows.
        dev_words: the fewest words of a held-out text, for training rows that are mostly fragments of sentences.
        sample_sets: different draws of the training rows; run ``i`` is given draw ``i mod sample_sets``.
        metric: the one that is plotted.
        forgetting: file of text whose perplexity is measured before and after; None for none.
        folder: where files of the study lie; a run does not depend on it.
    """

    name: str
    base: TrainSettings
    targets: tuple[str, ...]
    steps: int
    trial_steps: int
    dev_rows: int
    metric: str
    dev: str | None = None
    dev_words: int = 1
    sample_sets: int = 1
    forgetting: str | None = None
    folder: str = ""

    @property
    def stem(self) -> str:
        """Its name as that of a file: letters, digits and dashes."""
        words = "".join(letter if letter.isalnum() else " " for letter in self.name.lower()).split()
        return "-".join(words) or "data"

    @property
    def has_head(self) -> bool:
        """Whether a fresh head is trained."""
        return self.base.task != LANGUAGE


@dataclass(frozen=True)
class Study:
    """Rows on data sets.

    Attributes:
        name: of the study and of its file of results.
        title: for people.
        claim: of a paper, that the study bears on.
        seeds: final runs of each row, numbered from 0.
        trials: learning rates that every row tries.
        rows: the first is the untouched base, or its head alone, which chooses the head's rate for all.
        data: the data sets.
        anchor: the curve that others are compared with.
        gain_of: the row whose gain over the first is the whole of what is to be had.
    """

    name: str
    title: str
    claim: str
    seeds: int
    trials: int
    rows: tuple[Row, ...]
    data: tuple[Data, ...]
    anchor: str | None = None
    gain_of: str | None = None

    def rows_on(self, data: Data) -> tuple[Row, ...]:
        """The rows that are run on a data set."""
        return tuple(row for row in self.rows if not row.data or data.name in row.data)

    def limited(self, data: Sequence[str] = (), rows: Sequence[str] = ()) -> "Study":
        """The part of the study on some data sets, or with the rows whose names match a pattern; the first row stays.

        Raises:
            StudyError: nothing is left.
        """
        for name in data:
            self.data_named(name)
        kept = tuple(one for one in self.data if not data or one.name in data)
        found = [row for row in self.rows if not rows or any(fnmatchcase(row.name, one) for one in rows)]
        if not found:
            raise StudyError(f"rows {list(rows)} match none; there are: {', '.join(row.name for row in self.rows)}")
        return replace(self, data=kept, rows=tuple(dict.fromkeys((self.rows[0], *found))))

    def data_named(self, name: str) -> Data:
        """The data set of that name."""
        return _named(self.data, name, "data set")

    def row_named(self, name: str) -> Row:
        """The row of that name."""
        return _named(self.rows, name, "row")


@dataclass(frozen=True)
class Job:
    """One run to be made.

    Attributes:
        data: name.
        row: name.
        phase: ``trial`` or ``final``.
        rate: learning rate of the adapter, or of the head where there is no adapter.
        head_rate: learning rate of the head; None where there is no head.
        seed: of the run.
    """

    data: str
    row: str
    phase: Phase
    rate: float
    head_rate: float | None
    seed: int


def job_of(record: Record) -> Job:
    """The job that a record is of."""
    return Job(record.data, record.row, record.phase, record.rate, record.head_rate, record.seed)


def trial_rates(middle: float, trials: int) -> tuple[float, ...]:
    """``trials`` learning rates, half a decade apart, around one; of an even number one more lies above it."""
    below = (trials - 1) // 2
    return tuple(float(f"{middle * RATE_STEP ** (i - below):.3g}") for i in range(trials))


def fingerprint(study: Study, data: Data, row: Row) -> str:
    """Twelve hex digits that change with anything that a run depends on, but not with where the folder of files lies.

    What the files hold is told apart by :func:`randbasis.compare.sources.digest_of`.
    """
    told = replace(data, metric="", folder="")
    values = [_told(told, data.folder), _told(replace(row, name="", curve="", rate=None, data=()), data.folder)]
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


def usable(study: Study, records: Sequence[Record]) -> list[Record]:
    """The records that belong to the study as it is now, of each run the first.

    Of each data set those of the files that its newest has read, and of each row those with the options of its newest:
    the files may have changed, and a budget may have meant another size, which the fingerprint does not tell.
    """
    prints = {(d.name, r.name): fingerprint(study, d, r) for d in study.data for r in study.rows_on(d)}
    found = [one for one in records if prints.get((one.data, one.row)) == one.fingerprint]
    sources = {one.data: one.sources for one in found}
    found = [one for one in found if one.sources == sources[one.data]]
    newest = {(one.data, one.row): one.options for one in found}
    jobs: dict[Job, Record] = {}
    for one in found:
        if one.options == newest[one.data, one.row]:
            jobs.setdefault(job_of(one), one)
    return [*jobs.values()]


@dataclass(frozen=True)
class Progress:
    """Where a study stands: what can run now and how many runs there are.

    Attributes:
        study: which.
        middles: ``(data, row)`` → the learning rate in the middle of those that are tried.
        records: usable ones.
    """

    study: Study
    middles: dict[tuple[str, str], float]
    records: Sequence[Record]

    def total(self) -> int:
        """How many runs the study has."""
        return sum(
            len(self._rates(data, row)) * (len(self._rates(data, row)) > 1) + self._final_runs(data, row)
            for data in self.study.data
            for row in self.study.rows_on(data)
        )

    def ready(self) -> list[Job]:
        """The runs that can start now: trials first, those of the head before all; finals seed by seed."""
        done = {job_of(record) for record in self.records}
        trials = [job for d in self.study.data for r in self.study.rows_on(d) for job in self._trials(d, r)]
        finals = [job for d in self.study.data for r in self.study.rows_on(d) for job in self._finals(d, r)]
        return [job for job in (*trials, *sorted(finals, key=lambda job: job.seed)) if job not in done]

    def chosen(self, data: Data, row: Row) -> float | None:
        """The learning rate with the lowest loss on the held-out rows; None while some lack, or if all diverged."""
        rates = self._rates(data, row)
        if len(rates) == 1:
            return rates[0]
        losses = self._losses(data, row)
        if not set(rates) <= losses.keys():
            return None
        best = min(rates, key=lambda rate: (losses[rate], rate))
        return best if losses[best] < float("inf") else None

    def diverged(self) -> list[str]:
        """A sentence for each row that has no final runs because the loss was not finite at any rate."""
        return [
            f"{data.name}: every learning rate of {row.name!r} diverged; give the row a smaller rate"
            for data in self.study.data
            for row in self.study.rows_on(data)
            if {*self._rates(data, row)} <= {r for r, loss in self._losses(data, row).items() if loss == float("inf")}
        ]

    def _losses(self, data: Data, row: Row) -> dict[float, float]:
        """Learning rate → loss of its trial on the held-out rows."""
        runs = [r for r in self.records if (r.data, r.row, r.phase) == (data.name, row.name, "trial")]
        return {run.rate: run.loss for run in runs}

    def _rates(self, data: Data, row: Row) -> tuple[float, ...]:
        if not row.adapted and row.method == NO_ADAPTER and not data.has_head:
            return (0.0,)
        return trial_rates(self.middles[data.name, row.name], self.study.trials)

    def _final_runs(self, data: Data, row: Row) -> int:
        return 1 if row.method == NO_ADAPTER and not data.has_head else self.study.seeds

    def _head_rate(self, data: Data, row: Row) -> tuple[bool, float | None]:
        """Whether the head's rate is known, and the rate: that of the first row, where it is not the row's own."""
        first = self.study.rows_on(data)[0]
        if not data.has_head or row == first:
            return True, None
        rate = self.chosen(data, first)
        return rate is not None, rate

    def _trials(self, data: Data, row: Row) -> list[Job]:
        known, head = self._head_rate(data, row)
        rates = self._rates(data, row)
        if not known or len(rates) == 1:
            return []
        return [Job(data.name, row.name, "trial", rate, self._head(data, row, rate, head), 0) for rate in rates]

    def _finals(self, data: Data, row: Row) -> list[Job]:
        known, head = self._head_rate(data, row)
        rate = self.chosen(data, row) if known else None
        if rate is None:
            return []
        runs = range(self._final_runs(data, row))
        return [Job(data.name, row.name, "final", rate, self._head(data, row, rate, head), seed) for seed in runs]

    @staticmethod
    def _head(data: Data, row: Row, rate: float, shared: float | None) -> float | None:
        if not data.has_head:
            return None
        return rate if row.method == NO_ADAPTER else shared


def _named(items: Sequence[Any], name: str, kind: str) -> Any:
    for item in items:
        if item.name == name:
            return item
    raise StudyError(f"{kind} {name!r} is unknown; {near(name, [item.name for item in items])}")


def _told(value: Any, folder: str) -> Any:
    """Plain values: of a record the fields that differ from their defaults, of a path the way from the folder."""
    if is_dataclass(value):
        return {
            one.name: _told(getattr(value, one.name), folder)
            for one in fields(value)
            if getattr(value, one.name) != one.default
        }
    if isinstance(value, (tuple, list)):
        return [_told(item, folder) for item in cast("Sequence[Any]", value)]
    return value.removeprefix(f"{folder}/") if folder and isinstance(value, str) else value

"""What is compared with what, on which data, as plain values: nothing here reads a file."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, cast

from randbasis.errors import SettingError, near
from randbasis.train.settings import TrainSettings

Phase = Literal["sweep", "final"]

LANGUAGE = "causal-lm"


@dataclass(frozen=True)
class Row:
    """One line of a table: a method at a budget.

    Args:
        name: of the line.
        method: ``nola``, ``vera``, ``randlora``, ``lora``, or ``none`` for a frozen base with a trained head.
        share: how many coefficients it may have, in units of what LoRA of rank 1 has on the same matrices.
        rates: learning rates to choose from: the adapter's, or the head's where there is no adapter. A single one is
            taken without a sweep.
        bits: of the coefficients that it is trained with, math (11); ``None`` for full precision.
        afterwards: bits that the trained coefficients are quantized to, to be scored at each.
    """

    name: str
    method: str
    share: float
    rates: tuple[float, ...] = ()
    bits: int | None = None
    afterwards: tuple[int, ...] = ()

    @property
    def adapted(self) -> bool:
        """Whether there is an adapter."""
        return self.method != "none"


@dataclass(frozen=True)
class Setting:
    """One table: a model, its data, and how long a run lasts.

    Args:
        name: of the table.
        base: model, files, columns and loop of every run. Of ``base.data``, ``train`` and ``eval`` are the training and
            the test rows, ``limit`` or ``shots`` how many are trained on, ``eval_limit`` how many are tested on.
        targets: modules that every adapter is put on.
        seeds: final runs of each row, numbered from 0.
        sweep_steps: steps of a run of the sweep.
        dev_rows: held-out rows that learning rates are chosen by, of each class where ``shots`` is given.
        dev: file of those rows; ``None`` draws them from the training rows.
        dev_words: the fewest words of a held-out text, for training rows that are mostly fragments of sentences.
        sample_sets: different draws of the training rows; run ``i`` is given draw ``i mod sample_sets``.
        rates_of: name of the setting whose learning rates are used here; ``None`` for a sweep of its own.
        rates: learning rates to choose from here, by name of the row, for rows that name none themselves.
    """

    name: str
    base: TrainSettings
    targets: tuple[str, ...]
    seeds: int
    sweep_steps: int
    dev_rows: int
    dev: str | None = None
    dev_words: int = 1
    sample_sets: int = 1
    rates_of: str | None = None
    rates: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def rates_for(self, row: Row) -> tuple[float, ...]:
        """The learning rates that a row chooses from in this setting."""
        return row.rates or dict(self.rates).get(row.name, ())

    @property
    def has_head(self) -> bool:
        """Whether a fresh head is trained."""
        return self.base.task != LANGUAGE


@dataclass(frozen=True)
class Study:
    """Settings that share their rows.

    Args:
        name: of the study, of its file of results, and of its target in the Makefile.
        title: for people.
        rows: the lines of every table, the frozen base first.
        settings: the tables.
        metrics: which metrics the tables show, the first that a setting has being the one that is plotted.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    settings: tuple[Setting, ...]
    metrics: tuple[str, ...]

    def __post_init__(self) -> None:
        for setting in self.settings:
            for bits in {row.bits for row in self.rows}:
                counts = {len(setting.rates_for(row)) for row in self.rows if row.adapted and row.bits == bits}
                if len(counts) > 1:
                    raise SettingError(
                        "every row must have as many learning rates to choose from as the others that are trained at "
                        f"its precision, got {sorted(counts)} in {setting.name}"
                    )
        if not self.rows or self.rows[0].adapted:
            raise SettingError("the first row must be the frozen base (method 'none'): it chooses the head's rate")

    def setting(self, name: str) -> Setting:
        """The setting of that name."""
        return _named(self.settings, name, "setting")

    def row(self, name: str) -> Row:
        """The row of that name."""
        return _named(self.rows, name, "row")


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        setting: name.
        row: name.
        phase: ``sweep`` is scored on the held-out rows, ``final`` on the test rows.
        rate: learning rate of the adapter, or of the head where there is no adapter.
        head_rate: learning rate of the head; ``None`` where there is no head.
        seed: of head, basis, order of the rows, and draw of the rows.
    """

    setting: str
    row: str
    phase: Phase
    rate: float
    head_rate: float | None
    seed: int


@dataclass(frozen=True)
class Record:
    """What one run left; a line of the file of results.

    Args:
        job: the run.
        fingerprint: of the setting and the row; a line of another one is not used.
        scores: metrics on the rows of its phase, none when the loss stopped being finite.
        configuration: hyper-parameters of the adapter.
        coefficients: trained numbers of the adapter.
        head_parameters: trained numbers of the head.
        file_bytes: of the saved adapter, its head included.
        seconds: of processor time that training took, on one thread.
        date: when it ended.
        versions: of the packages that matter.
        vectors: coefficient tensors of the adapter, each with one scale where it is quantized.
        afterwards: bits → metrics with the trained coefficients quantized to so many.
    """

    job: Job
    fingerprint: str
    scores: dict[str, float]
    configuration: dict[str, Any]
    coefficients: int
    head_parameters: int
    file_bytes: int
    seconds: float
    date: str
    versions: dict[str, str]
    vectors: int = 0
    afterwards: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])

    def line(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def of_line(cls, line: str) -> "Record":
        """What :meth:`line` wrote."""
        values = json.loads(line)
        return cls(**values | {"job": Job(**values["job"])})


def fingerprint(setting: Setting, row: Row) -> str:
    """Twelve hex digits that change with anything that a run depends on, but not with where the files lie."""
    precision = [row.bits, *row.afterwards] if row.bits or row.afterwards else []
    values = _told(setting) | {"row": [row.method, row.share, *precision]}
    for unused in ("seeds", "rates_of", "rates"):
        values.pop(unused, None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def all_jobs_count(study: Study) -> int:
    """How many runs a study has."""
    count = 0
    for setting in study.settings:
        for row in study.rows:
            sweeps = len(_swept(setting, row))
            count += sweeps + setting.seeds if row.adapted or setting.has_head else 1
    return count


def ready_jobs(study: Study, records: list[Record]) -> list[Job]:
    """The runs that can start now, given those that have ended.

    A sweep comes before the final runs of its row, and the sweep of the frozen base before all: the rate that it
    chooses for its head is the head's rate in every other row.
    """
    valid = usable(study, records)
    done = {record.job for record in valid}
    jobs = [job for setting in study.settings for job in _sweep_jobs(study, setting, valid)]
    finals = [job for setting in study.settings for job in _final_jobs(study, setting, valid)]
    jobs += sorted(finals, key=lambda job: job.seed)
    return [job for job in jobs if job not in done]


def usable(study: Study, records: list[Record]) -> list[Record]:
    """The records that belong to the study as it is now."""
    prints = {(s.name, r.name): fingerprint(s, r) for s in study.settings for r in study.rows}
    return [record for record in records if prints.get((record.job.setting, record.job.row)) == record.fingerprint]


def chosen_rate(study: Study, setting: Setting, row: Row, records: list[Record]) -> float | None:
    """The learning rate with the best metric on the held-out rows, the lower loss where metrics are equal.

    Args:
        records: usable ones.

    Returns:
        ``None`` while runs of the sweep are missing.
    """
    if setting.rates_of is not None:
        return chosen_rate(study, study.setting(setting.rates_of), row, records)
    rates = setting.rates_for(row)
    if len(rates) == 1:
        return rates[0]
    runs = [r for r in records if (r.job.setting, r.job.row, r.job.phase) == (setting.name, row.name, "sweep")]
    found = {record.job.rate: record.scores for record in runs}
    if not set(rates) <= found.keys():
        return None
    finite = [rate for rate in rates if found[rate]]
    if not finite:
        raise SettingError(f"{setting.name}: every learning rate of {row.name} diverged; give smaller ones")
    return min(finite, key=lambda rate: (-found[rate].get("accuracy", 0.0), found[rate]["loss"]))


def _sweep_jobs(study: Study, setting: Setting, records: list[Record]) -> Iterator[Job]:
    for row in study.rows:
        known, head = _head_rate(study, setting, row, records)
        if known and (row.adapted or setting.has_head):
            for rate in _swept(setting, row):
                yield Job(setting.name, row.name, "sweep", rate, head if row.adapted else rate, 0)


def _swept(setting: Setting, row: Row) -> tuple[float, ...]:
    """The learning rates that runs of a sweep are made for: none where there is no choice."""
    rates = setting.rates_for(row)
    return () if setting.rates_of is not None or len(rates) == 1 else rates


def _final_jobs(study: Study, setting: Setting, records: list[Record]) -> Iterator[Job]:
    for row in study.rows:
        if not row.adapted and not setting.has_head:
            yield Job(setting.name, row.name, "final", 0.0, None, 0)
            continue
        known, head = _head_rate(study, setting, row, records)
        rate = chosen_rate(study, setting, row, records)
        if known and rate is not None:
            for seed in range(setting.seeds):
                yield Job(setting.name, row.name, "final", rate, head if row.adapted else rate, seed)


def _head_rate(study: Study, setting: Setting, row: Row, records: list[Record]) -> tuple[bool, float | None]:
    """Whether the head's rate is known, and the rate."""
    if not setting.has_head or not row.adapted:
        return True, None
    rate = chosen_rate(study, setting, study.rows[0], records)
    return rate is not None, rate


def _named(items: tuple[Any, ...], name: str, kind: str) -> Any:
    for item in items:
        if item.name == name:
            return item
    raise SettingError(f"{kind} {name!r} is unknown; {near(name, [item.name for item in items])}")


def _told(value: Any) -> Any:
    """Plain values: of a record the fields that differ from their defaults, of a path the name of the file."""
    if is_dataclass(value):
        given = {field.name: (getattr(value, field.name), field.default) for field in fields(value)}
        return {name: _told(own) for name, (own, standard) in given.items() if own != standard}
    if isinstance(value, tuple):
        return [_told(item) for item in cast(tuple[Any, ...], value)]
    return Path(value).name if isinstance(value, Path) or (isinstance(value, str) and "/" in value) else value

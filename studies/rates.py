"""The trials of all comparisons, taken together: does one setting of the learning rate carry over?

A trial is a row of a study at one of four learning rates, scored by its loss on held-out rows. A rule gives each
row one rate. What it costs is how far the loss there is from the best of the row, as a share of the row's whole gain.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from randbasis.compare.record import Record, read_records
from randbasis.compare.study import NO_ADAPTER, Study, trial_rates, usable
from randbasis.compare.study_file import read_study
from randbasis.train.default_choices import METHODS, SIZED_BY, choose

DECIDES = 0.1
"""Of the loss without an adapter: rows that gain less of it in a trial have nothing to choose by."""


@dataclass(frozen=True)
class Trials:
    """What the rates of one row on one data set were worth.

    Args:
        study: its name.
        data: of the study.
        row: of the study.
        method: of the row.
        size: rank or number of basis matrices, whichever decides the coefficients.
        usual: ``train``'s rate for the usual size, in the middle of those that were tried.
        auto: its rate for this size.
        losses: rate → loss on held-out rows, infinite where it diverged.
        base: loss without an adapter.
        noise: standard deviation of the loss over the seeds of the final runs; None before there are two.
        steps: of a trial.
    """

    study: str
    data: str
    row: str
    method: str
    size: int
    usual: float
    auto: float
    losses: Mapping[float, float]
    base: float
    noise: float | None
    steps: int

    @cached_property
    def best(self) -> float:
        """The rate of the lowest loss."""
        return min(self.losses, key=lambda rate: (self.losses[rate], rate))

    @property
    def gain(self) -> float:
        """Of loss, at the best rate."""
        return self.base - self.losses[self.best]

    @property
    def at_edge(self) -> bool:
        """Whether the best may lie beyond what was tried."""
        return self.best in (min(self.losses), max(self.losses))

    def loss_at(self, rate: float) -> float:
        """Between two rates that were tried on a straight line over log rate, beyond them that of the last."""
        rates = sorted(self.losses)
        if rate <= rates[0] or rate >= rates[-1]:
            return self.losses[rates[0] if rate <= rates[0] else rates[-1]]
        above = next(i for i, one in enumerate(rates) if one >= rate)
        low, high = rates[above - 1], rates[above]
        share = math.log(rate / low) / math.log(high / low)
        ends = self.losses[low], self.losses[high]
        return ends[0] + share * (ends[1] - ends[0]) if share else ends[0]

    def cost(self, rate: float) -> float:
        """Share of the gain that a rate leaves behind."""
        return (self.loss_at(rate) - self.losses[self.best]) / self.gain if self.gain > 0 else math.inf

    @property
    def decides(self) -> bool:
        """Whether there is something to choose by."""
        return self.gain > DECIDES * self.base

    @property
    def noise_share(self) -> float | None:
        """Twice the noise, as a share of the gain."""
        return None if self.noise is None or self.gain <= 0 else 2 * self.noise / self.gain


def all_trials(studies: Path, results: Path) -> list[Trials]:
    """Every row of a method that ``train`` has a rate for, of which all trials are there.

    Runs that two studies share, alike to the last digit of each loss, count once.

    Args:
        studies: folder of study files.
        results: folder of their runs.
    """
    found: dict[tuple[str, tuple[tuple[float, float], ...]], Trials] = {}
    for path in sorted(studies.glob("*.toml")):
        study = read_study(path, must_exist=False)
        for one in of_study(study, usable(study, read_records(results / f"{study.name}.jsonl"))):
            found.setdefault((one.data, tuple(sorted(one.losses.items()))), one)
    return list(found.values())


def of_study(study: Study, records: Sequence[Record]) -> list[Trials]:
    """Those of one study; rows with an option of the size but other coefficients than its (``tie``) are left out."""
    found: list[Trials] = []
    for data in study.data:
        base = _base(study, records, data.name)
        for row in study.rows_on(data):
            own = [one for one in records if (one.data, one.row) == (data.name, row.name)]
            losses = {one.rate: one.loss for one in own if one.phase == "trial"}
            if base is None or row.method not in METHODS or len(losses) < study.trials:
                continue
            of_run = own[0].configuration
            if of_run.get("tie", "matrix") != "matrix" or row.start:
                continue
            usual = next((rate for rate in losses if {*trial_rates(rate, study.trials)} == {*losses}), None)
            if usual is None or not math.isfinite(min(losses.values())):
                continue
            size = int(of_run[SIZED_BY[row.method]])
            rule = [choose(row.method, data.base.task, None, one)["learning_rate"].value for one in (size, None)]
            finals = [one.loss for one in own if one.phase == "final" and math.isfinite(one.loss)]
            noise = statistics.stdev(finals) if len(finals) > 1 else None
            auto = usual * float(rule[0]) / float(rule[1])
            found.append(
                Trials(study.name, data.name, row.name, row.method, size, usual, auto, losses, base, noise,
                       data.trial_steps)
            )  # fmt: skip
    return found


def _base(study: Study, records: Iterable[Record], data: str) -> float | None:
    """The loss without an adapter: of the base alone, or of the best head on it."""
    first = next(row.name for row in study.rows if row.method == NO_ADAPTER)
    losses = [one.loss for one in records if (one.data, one.row) == (data, first)]
    return min(losses, default=None)

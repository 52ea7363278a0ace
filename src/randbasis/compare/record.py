"""What one run of a comparison left, as plain values: a line of the file of results."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from randbasis.errors import StudyError

Phase = Literal["trial", "final"]


@dataclass(frozen=True)
class Point:
    """One way to store what one run has trained.

    Attributes:
        name: such as ``"4 bits"`` or ``"rank 2, 4 bits"``.
        bits: of a coefficient; 32 as trained.
        rank: after truncation, of a LoRA; else None.
        bytes: of the whole file: header, coefficients with their scales, head.
        head_bytes: of these, the head's.
        scores: metrics on the rows of the run's phase.
        forgetting: perplexity of the base's own text; None where it is not asked for.
    """

    name: str
    bits: int
    rank: int | None
    bytes: int
    head_bytes: int
    scores: dict[str, float]
    forgetting: float | None = None


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        study: its name.
        data: name of the data set.
        row: name of the row.
        curve: the curve that the row is a point of.
        method: of the row.
        phase: ``trial`` is scored on the held-out rows, ``final`` on the test rows.
        rate: learning rate of the adapter, or of the head where there is none.
        head_rate: learning rate of the head; None where there is no head.
        seed: of head, basis, order of the rows, and draw of the rows.
        fingerprint: of all that the run depends on; a line of another one is not used.
        configuration: hyper-parameters of the adapter.
        coefficients: trained numbers of the adapter.
        head_parameters: trained numbers of the head.
        points: the first is the run as trained; none when the loss stopped being finite.
        seconds: of processor time that training took, on one thread.
        step_seconds: of wall time, of the step in the middle.
        peak_bytes: by which the memory of the process grew in training; 0 where the machine does not tell.
        expand_seconds: of making all factors of ΔW once from the seed; None for methods that have none to make.
        base_perplexity: of the base's own text before training.
        date: when it ended.
        versions: of the packages that matter.
        machine: cores and threads.
        sources: digest of the files that the run read; a line of other rows or another base is not used.
    """

    study: str
    data: str
    row: str
    curve: str
    method: str
    phase: Phase
    rate: float
    head_rate: float | None
    seed: int
    fingerprint: str
    configuration: dict[str, Any]
    coefficients: int
    head_parameters: int
    points: tuple[Point, ...]
    seconds: float
    step_seconds: float
    peak_bytes: int
    expand_seconds: float | None
    base_perplexity: float | None
    date: str
    versions: dict[str, str]
    machine: str
    sources: str = ""

    @property
    def loss(self) -> float:
        """As trained, on the rows of its phase; infinite where it is not finite or the run has no points."""
        loss = self.points[0].scores["loss"] if self.points else math.inf
        return loss if math.isfinite(loss) else math.inf

    @property
    def options(self) -> str:
        """The configuration as text, alike before and after it was on disk."""
        return options_text(self.configuration)

    def line(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def of_line(cls, line: str) -> "Record":
        """What :meth:`line` wrote."""
        values = json.loads(line)
        return cls(**values | {"points": tuple(Point(**point) for point in values["points"])})


def options_text(options: Mapping[str, Any]) -> str:
    """Options of a method as text that is equal where they are."""
    return json.dumps(options, sort_keys=True)


def read_records(path: Path) -> list[Record]:
    """The records of a file of results, none when it does not exist; a line cut by a crash is left out.

    Raises:
        StudyError: a whole line is something else.
    """
    if not path.exists():
        return []
    found: list[Record] = []
    for i, line in enumerate(path.read_bytes().split(b"\n")):  # a name may hold what else ends a line of text
        try:
            found.append(Record.of_line(line.decode()))
        except ValueError:  # no JSON: the line was cut
            continue
        except (TypeError, KeyError) as error:
            raise StudyError(
                f"{path}, line {i + 1}, is no run of a comparison ({error}); move the file away, or give other results"
            ) from error
    return found


def append_record(path: Path, record: Record) -> None:
    """Add one line to a file of results; a line that a crash has cut is ended first, so that the two do not join."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.seek(0, 2):
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(record.line().encode() + b"\n")
        file.flush()


def finals(records: Sequence[Record], data: str, row: str) -> list[Record]:
    """The final runs of a row on a data set, by seed."""
    found = [one for one in records if (one.data, one.row, one.phase) == (data, row, "final")]
    return sorted(found, key=lambda one: one.seed)

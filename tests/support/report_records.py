"""A study and its records made up, so that every number of a report is known beforehand."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from randbasis.compare.record import Phase, Point, Record
from randbasis.compare.study import Data, Row, Study
from randbasis.train.loop_settings import LoopSettings
from randbasis.train.settings import DataSettings, TrainSettings

RATES = (0.01, 0.0316, 0.1)


def data_of(name: str, metric: str = "accuracy", task: str = "sequence-classification") -> Data:
    rows = DataSettings(train="train.tsv", limit=4000, eval_limit=872)
    base = TrainSettings(data=rows, loop=LoopSettings(max_steps=200), output="", model="folder/tiny", task=task)
    return Data(name, base, ("query", "value"), steps=200, trial_steps=60, dev_rows=300, metric=metric)


def study_of(
    rows: Sequence[Row],
    data: Sequence[Data] | None = None,
    *,
    anchor: str | None = "LoRA",
    gain_of: str | None = "LoRA",
) -> Study:
    return Study("made-up", "A study made up", "Somebody (2024), table 2: `it` <holds> & more.", seeds=3, trials=3,
                 rows=tuple(rows), data=tuple(data or (data_of("words"),)), anchor=anchor, gain_of=gain_of)  # fmt: skip


ROWS = (
    Row("frozen + head", "frozen + head", "none"),
    Row("full fine-tuning", "full fine-tuning", "full"),
    Row("LoRA", "LoRA", "lora"),
    Row("NOLA 64 B", "NOLA", "nola"),
    Row("NOLA 256 B", "NOLA", "nola"),
)


def point(size: int, score: float, name: str = "as trained", metric: str = "accuracy", **more: Any) -> Point:
    values = {"bits": 32, "rank": None, "head_bytes": 40} | more
    return Point(name=name, bytes=size, scores={"loss": 0.5, metric: score}, **values)


def record(row: Row, points: Sequence[Point], seed: int = 0, phase: Phase = "final", **more: Any) -> Record:
    values: dict[str, Any] = {
        "study": "made-up", "data": "words", "rate": 0.0316, "head_rate": 0.01, "fingerprint": "0" * 12,
        "configuration": {"rank": 4, "alpha": 8.0}, "coefficients": 100, "head_parameters": 10, "seconds": 12.0,
        "step_seconds": 0.25, "peak_bytes": 3_000_000, "expand_seconds": None, "base_perplexity": None,
        "date": "2026-01-02", "versions": {"torch": "2.13.0", "peft": "0.21.2"}, "machine": "x86_64, 2 cores",
    }  # fmt: skip
    return Record(row=row.name, curve=row.curve, method=row.method, phase=phase, seed=seed, points=tuple(points),
                  **values | more)  # fmt: skip


def trials(row: Row, losses: Mapping[float, float | None], data: str = "words") -> list[Record]:
    """Trials at rates; None is one that diverged."""
    made = {rate: () if loss is None else (Point("as trained", 32, None, 9, 4, {"loss": loss}),)
            for rate, loss in losses.items()}  # fmt: skip
    return [record(row, points, phase="trial", rate=rate, data=data) for rate, points in made.items()]


def complete(study: Study) -> list[Record]:
    """All runs of the rows above on every data set; scores of a seed lie 0.01 × seed above those of seed 0."""
    found: list[Record] = []
    for data, row in ((data, row) for data in study.data for row in study.rows):
        found += trials(row, {0.01: 0.9, 0.0316: 0.5, 0.1: 0.7}, data.name)
        made = {
            "none": [(48, 0.50)], "full": [(90_000, 0.95)], "lora": [(10_000, 0.90), (1_000, 0.80), (100, 0.60)],
            "nola": [(500, 0.80), (50, 0.60)] if "64" in row.name else [(5_000, 0.90), (700, 0.79)],
        }[row.method]  # fmt: skip
        for seed in range(study.seeds):
            names = ("as trained", "4 bits", "2 bits")
            points = [
                point(size, score + 0.01 * seed, name, data.metric)
                for (size, score), name in zip(made, names, strict=False)
            ]
            found.append(record(row, points, seed, data=data.name, step_seconds=0.5 if row.method == "nola" else 0.25))
    return found


def shuffled(records: Sequence[Record]) -> list[Record]:
    return random.Random(7).sample(list(records), len(records))

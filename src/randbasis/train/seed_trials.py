"""The best of a few seeds of a basis, by the first steps of the run that each of them would have.

Every trial has the batches, the head and the schedule of the run. It learns from all training rows but a tenth, and the
loss on that tenth decides: rows that a run evaluates on, which may be a test set, are never looked at.
"""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from torch import nn

from randbasis.errors import NonFiniteLossError, SettingError
from randbasis.train.loop import fit, steps_of
from randbasis.train.loop_settings import LoopSettings
from randbasis.train.packing import pack
from randbasis.train.ranks import Ranks
from randbasis.train.task import Example, Task
from randbasis.train.trainer import permutation
from randbasis.tuner.config import RandbasisConfig

SHARE = 10
"""One of so many training rows decides."""
MOST_ROWS = 256
"""That decide."""


@dataclass(frozen=True)
class SeedTrials:
    """What a few seeds reached.

    Args:
        losses: seed → loss on the rows that decide; infinite where it was no number.
        steps: of each trial.
        rows: that decide.
        seconds: of all trials, with reading the base for each.
    """

    losses: dict[int, float]
    steps: int
    rows: int
    seconds: float

    @property
    def seed(self) -> int:
        """The one of the lowest loss."""
        return min(self.losses, key=lambda seed: self.losses[seed])

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "seed": self.seed,
            "losses": {str(seed): loss if math.isfinite(loss) else None for seed, loss in self.losses.items()},
            "steps": len(self.losses) * self.steps,
            "rows": self.rows,
            "seconds": self.seconds,
        }


def try_seeds(
    load: Callable[[], nn.Module],
    config: RandbasisConfig,
    task: Task,
    train: Sequence[Example],
    *,
    loop: LoopSettings,
    packed_to: int | None = None,
    ranks: Ranks | None = None,
    console: Console | None = None,
) -> SeedTrials:
    """Train with ``loop.try_seeds`` seeds, from that of the configuration on, for ``loop.try_steps`` steps each.

    Args:
        load: reads the base anew.
        config: of a method whose basis is drawn from a seed.
        task: with a loss among its scores.
        train: examples to learn from in the run.
        loop: of the run, with every value.
        packed_to: tokens of a sequence that several examples share, where the run packs them.
        ranks: the processes of the run.
        console: where to tell each loss.

    Raises:
        SettingError: no seeds are to be tried, a trial is as long as the run, or there are no rows to decide by.
        NonFiniteLossError: no seed has a finite loss.
    """
    ranks = ranks or Ranks()
    if loop.try_seeds is None:
        raise SettingError("try_seeds must be a number of seeds, got None; give 4, for example")
    learned, deciding = _apart(train, loop.train_seed)
    total = steps_of(loop, len(train), processes=ranks.count)
    if loop.try_steps >= total:
        raise SettingError(f"try_steps must be below the {total} steps of the run, got {loop.try_steps}; give fewer")
    trial = replace(
        loop, max_steps=total, eval_every=total, early_stop=None, keep="last", report_to=None, save_steps=None
    )
    rows = learned if packed_to is None else pack(learned, packed_to)
    losses: dict[int, float] = {}
    began = time.perf_counter()
    for place in range(loop.try_seeds):
        one = deepcopy(config)
        one.seed = (config.seed + place) % 2**64
        losses[one.seed] = _loss(load(), one, task, rows, deciding, trial, ranks)
        if console:
            console.print(f"seed {one.seed}: loss {losses[one.seed]:.4f} after {loop.try_steps} steps", highlight=False)
    if not any(map(math.isfinite, losses.values())):
        raise NonFiniteLossError(
            f"the loss of every seed must be finite after {loop.try_steps} steps, none of {list(losses)} is; a lower "
            "learning rate or a longer warmup may help"
        )
    return SeedTrials(losses, loop.try_steps, len(deciding), round(time.perf_counter() - began, 2))


def _apart(train: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """The rows to learn from and those that decide, drawn by the seed of the run."""
    count = min(MOST_ROWS, -(-len(train) // SHARE))
    if len(train) < 2:
        raise SettingError(f"try_seeds needs rows to learn from and rows to decide by, got {len(train)} in all")
    chosen = {*permutation(len(train), torch.Generator().manual_seed(seed))[:count]}
    parts: tuple[list[Example], list[Example]] = [], []
    for place, example in enumerate(train):
        parts[place in chosen].append(example)
    return parts


def _loss(
    model: nn.Module,
    config: RandbasisConfig,
    task: Task,
    rows: Sequence[Example],
    deciding: Sequence[Example],
    loop: LoopSettings,
    ranks: Ranks,
) -> float:
    with tempfile.TemporaryDirectory(prefix="randbasis-trial-") as own:
        folder = ranks.by_first(lambda: own)
        try:
            done = fit(
                model, config, task, train=rows, eval=deciding, loop=loop, checkpoints=f"{folder}/checkpoints",
                ranks=ranks, stop_after=loop.try_steps,
            )  # fmt: skip
        except NonFiniteLossError:
            return math.inf
    if "loss" not in done.after:
        raise SettingError(f"try_seeds compares losses, and {task.name} is scored by {', '.join(done.after)} here")
    loss = done.after["loss"]
    return loss if math.isfinite(loss) else math.inf

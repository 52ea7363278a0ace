"""What rows decide of an adapter before its first step: basis matrices by layer, and the seed.

Both are noted beside the checkpoints, so that a resumed run has the adapter that it began with.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig
from rich.console import Console
from torch import Tensor, nn

from randbasis.errors import SettingError
from randbasis.files.whole_file import write
from randbasis.train.allotment import PATTERN, allot, as_pattern
from randbasis.train.causal_lm import CausalLanguage
from randbasis.train.loop_settings import LoopSettings
from randbasis.train.machine import torch_device
from randbasis.train.method_table import method_words
from randbasis.train.ranks import Ranks
from randbasis.train.seed_trials import try_seeds
from randbasis.train.settings import TrainSettings
from randbasis.train.task import Batch, Example, Task
from randbasis.train.threads import torch_threads
from randbasis.train.trainer import permutation
from randbasis.tuner.config import RandbasisConfig

DECISIONS_FILE = "decisions.json"
BATCHES = 4
"""Of training rows, whose gradients allot the basis matrices."""


@dataclass(frozen=True)
class Rows:
    """What decides.

    Args:
        task: of the run.
        train: examples to learn from.
        packed: whether several of them share a sequence.
    """

    task: Task
    train: Sequence[Example]
    packed: bool


@dataclass(frozen=True)
class Decisions:
    """What was decided.

    Args:
        numbers: module → basis matrices; None where all have the same number.
        trials: what the trials of seeds told; None where there were none.
    """

    numbers: dict[str, int] | None = None
    trials: dict[str, Any] | None = None

    def applied(self, config: PeftConfig | None) -> PeftConfig | None:
        """The configuration that the run has."""
        if self.numbers is None and self.trials is None:
            return config
        chosen: Any = deepcopy(config)
        if self.numbers is not None:
            setattr(chosen, PATTERN, as_pattern(self.numbers))
        if self.trials is not None:
            chosen.seed = self.trials["seed"]
        return cast(PeftConfig, chosen)

    def as_json(self) -> dict[str, Any]:
        """What there is, as plain values."""
        found = {"allotted": self.numbers, "tried_seeds": self.trials}
        return {name: value for name, value in found.items() if value is not None}


def check_seeded(method: str) -> None:
    """Refuse to try seeds of a method that has none.

    Raises:
        SettingError: it has none.
    """
    if "seed" not in method_words().get(method, {"seed"}):
        raise SettingError(f"try_seeds needs a method whose basis has a seed, got {method!r}; leave it out")


def decide(
    config: PeftConfig | None,
    model: nn.Module,
    load: Callable[[], nn.Module],
    rows: Rows,
    settings: TrainSettings,
    *,
    ranks: Ranks,
    console: Console | None = None,
) -> Decisions:
    """Look at rows, where the settings of a run ask for it.

    Args:
        config: of the adapter, with a seed and one number of basis matrices.
        model: the base, which stays as it is.
        load: reads it anew, for each seed that is tried.
        rows: that decide.
        settings: of the run, with every value.
        ranks: the processes of the run.
        console: where to tell of the trials.
    """
    decided, loop = Decisions(), settings.loop
    if settings.adapter.allot is not None:
        numbers = _numbers(model, cast(RandbasisConfig, config), rows, loop)
        decided = Decisions(numbers=ranks.of_first(numbers))
    if loop.try_seeds is not None:
        own = cast(RandbasisConfig, decided.applied(config))
        packed_to = cast(CausalLanguage, rows.task).max_length if rows.packed else None
        trials = try_seeds(
            load, own, rows.task, rows.train, loop=loop, packed_to=packed_to, ranks=ranks, console=console
        )
        decided = Decisions(decided.numbers, trials.as_json())
    return decided


def noted(checkpoints: Path) -> Decisions:
    """What the run decided whose checkpoints these are."""
    file = checkpoints / DECISIONS_FILE
    told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return Decisions(told.get("allotted"), told.get("tried_seeds"))


def note(decided: Decisions, checkpoints: Path) -> None:
    """Write what was decided beside the checkpoints, if anything was."""
    if told := decided.as_json():
        write(checkpoints / DECISIONS_FILE, json.dumps(told).encode(), overwrite=True)


def _numbers(model: nn.Module, config: RandbasisConfig, rows: Rows, loop: LoopSettings) -> dict[str, int]:
    """By the gradients of :data:`BATCHES` batches, drawn by the seed of the run."""
    if loop.bits is None:
        model.to(torch_device(loop.device))
    order = permutation(len(rows.train), torch.Generator().manual_seed(loop.train_seed))
    examples = [rows.train[place] for place in order[: BATCHES * loop.batch_size]]
    half = {p.dtype for p in model.parameters()} & {torch.bfloat16, torch.float16}
    device = next(model.parameters()).device.type

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        own = rows.task.loss(model, batch)
        return cast(Tensor, model(**batch).loss) if own is None else own

    with torch_threads(loop.threads), torch.autocast(device, dtype=half.pop()) if half else nullcontext():
        batches = (batch for _, batch in rows.task.batches(model, examples, loop.batch_size))
        return allot(model, config, batches, loss=loss)

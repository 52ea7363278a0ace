"""ROW → WHERE ITS TRAINING STARTS: basis matrices by layer, the best of a few seeds, or a LoRA that is projected.

Each is what ``train`` does with ``--allot``, ``--try-seeds`` and ``--from LORA --project``, on the rows of the run.
"""

import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig
from torch import nn

from randbasis.adapters.saved import SavedAdapter, open_folder
from randbasis.compare.cells import Cell
from randbasis.compare.rivals import configuration, middle_rate
from randbasis.compare.study import Data, Row
from randbasis.importing import import_as_nearest
from randbasis.train import LoopSettings, fit
from randbasis.train.decisions import Rows, decide
from randbasis.train.model_reading import width_of
from randbasis.train.ranks import Ranks
from randbasis.train.settings import AdapterSettings
from randbasis.tuner.config import RandbasisConfig


@dataclass(frozen=True)
class Start:
    """What a run is begun with.

    Attributes:
        config: of the adapter; None where there is none, or where ``origin`` has it.
        origin: an adapter to start from.
    """

    config: PeftConfig | None
    origin: SavedAdapter | None = None


@contextmanager
def started(
    row: Row, config: PeftConfig | None, cell: Cell, data: Data, loop: LoopSettings, load: Callable[[], nn.Module]
) -> Generator[Start]:
    """The start of a run; what it needs on disk lasts as long as the block.

    Args:
        row: tells the start.
        config: of the adapter.
        cell: rows to decide by and to learn from.
        data: what they are of.
        loop: of the run.
        load: reads the base anew.
    """
    asked: Mapping[str, Any] = dict(row.start)
    if "project" in asked:
        with tempfile.TemporaryDirectory(prefix="randbasis-compare-") as folder:
            source = _lora(asked["project"], cell, data, loop, load, folder)
            nearest = Path(folder, "nearest")
            import_as_nearest(source, nearest, cast("RandbasisConfig", config))
            yield Start(None, open_folder(nearest))
    elif asked:
        settings = replace(
            data.base,
            adapter=AdapterSettings(method=row.method, allot=asked.get("allot")),
            loop=replace(loop, **{key: value for key, value in asked.items() if key != "allot"}),
        )
        decided = decide(config, load(), load, Rows(cell.task, cell.train, False), settings, ranks=Ranks())
        yield Start(decided.applied(config))
    else:
        yield Start(config)


def _lora(rank: int, cell: Cell, data: Data, loop: LoopSettings, load: Callable[[], nn.Module], folder: str) -> Path:
    """A LoRA trained as long as the run itself, at ``train``'s own learning rate, and saved."""
    model = load()
    config = configuration(
        "lora", {"rank": rank}, (), targets=data.targets, seed=0, task_type=cell.task.peft_task_type,
        head=cell.task.head_modules(model),
    )  # fmt: skip
    rate = middle_rate("lora", data.base.task, width_of(getattr(model, "config", None)))
    done = fit(
        model, config, cell.task, train=cell.train, eval=cell.dev[: loop.batch_size],
        loop=replace(loop, learning_rate=rate), checkpoints=f"{folder}/checkpoints",
    )  # fmt: skip
    place = Path(folder, "lora")
    cast("Any", done.model).save_pretrained(str(place))
    return place

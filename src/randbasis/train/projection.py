"""LoRA → BASIS → TRAINING: an adapter of PEFT projected onto a method of ours, and trained further there.

Train large, project, refine: what a LoRA has found is looked for in the span of a random basis, by the least squares of
:mod:`randbasis.importing`, and trained on from the nearest point. A head that the adapter has comes along.
"""

import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from randbasis.adapters.saved import SavedAdapter, open_folder
from randbasis.defaults import REFINE_STEPS
from randbasis.errors import SettingError
from randbasis.files.locations import Location
from randbasis.importing import ImportedAdapter, import_as_nearest, read_peft_adapter
from randbasis.importing.least_squares import NEAREST
from randbasis.train.loop_settings import LoopSettings
from randbasis.train.machine import torch_device
from randbasis.train.method_table import peft_config
from randbasis.train.settings import AdapterSettings, TrainSettings
from randbasis.train.task import Example, Task
from randbasis.train.threads import torch_threads
from randbasis.train.trained_parameters import load_adapter
from randbasis.tuner.config import RandbasisConfig


@dataclass(frozen=True)
class Projection:
    """An adapter in the span of a basis.

    Args:
        start: as it was written, in a folder that lasts as long as the block.
        found: how far it is from its source.
    """

    start: SavedAdapter
    found: ImportedAdapter

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        told = self.found.as_json()
        names = ("source", "source_parameters", "coefficients", "residual", "worst_residual", "worst_matrix")
        return {name: told[name] for name in names}


def check_projection(settings: TrainSettings, origin: SavedAdapter) -> None:
    """Refuse what cannot be projected, before anything is read but the files of the adapter.

    Raises:
        SettingError: the method is none to project onto.
        RandbasisError: as :func:`randbasis.importing.read_peft_adapter`.
    """
    if settings.adapter.method not in NEAREST:
        raise SettingError(
            f"project is onto a basis of {', '.join(NEAREST)}, got method {settings.adapter.method!r}; choose one"
        )
    read_peft_adapter(origin, _base_of(settings, origin))


@contextmanager
def projected(settings: TrainSettings, origin: SavedAdapter, task: Task) -> Generator[Projection]:
    """The nearest adapter of the settings to another.

    Args:
        settings: with every option of the adapter.
        origin: LoRA, VeRA or RandLoRA of PEFT, which was checked.
        task: of the run.
    """
    config = cast(RandbasisConfig, peft_config(settings.adapter, task_type=task.peft_task_type, head=[]))
    with tempfile.TemporaryDirectory(prefix="randbasis-projection-") as folder:
        place = Path(folder, "projection")
        found = import_as_nearest(cast(Path, origin.folder), place, config, model=_base_of(settings, origin))
        yield Projection(open_folder(place), found)


def scores_of(
    model: nn.Module, origin: SavedAdapter, task: Task, examples: Sequence[Example], loop: LoopSettings
) -> dict[str, float]:
    """What an adapter is worth on rows, before anything is done to it.

    Args:
        model: the base with its head, which the adapter is put on.
        origin: the adapter.
        task: scores.
        examples: held-out rows.
        loop: device, threads and batch size.
    """
    adapted = load_adapter(model, origin)
    if loop.bits is None:
        adapted.to(torch_device(loop.device))
    with torch_threads(loop.threads):
        return task.score(adapted, examples, loop.eval_batch_size or 4 * loop.batch_size)


def refinement(
    run: TrainSettings,
    source: Location,
    adapter: AdapterSettings,
    output: str | Path,
    *,
    steps: int = REFINE_STEPS,
    overwrite: bool = False,
) -> TrainSettings:
    """The run that projects an adapter and trains it for some steps on the rows of another run.

    Task, rows and loop are those of the other run; its learning rates only where it was of the same method, since one
    of LoRA says nothing of a basis, nor does its length, nor how often it was evaluated.

    Args:
        run: on these rows, perhaps the one that trained the source.
        source: LoRA, VeRA or RandLoRA of PEFT.
        adapter: method and options to project onto; of what is None a run's defaults are taken.
        output: folder to write.
        steps: of training.
        overwrite: replace the output.
    """
    same = run.adapter.method == adapter.method
    loop = replace(
        run.loop,
        max_steps=steps,
        learning_rate=run.loop.learning_rate if same else None,
        eval_every=None,
        save_steps=None,
        logging_steps=None,
        try_seeds=None,
    )
    return replace(
        run, from_adapter=source, project=True, adapter=replace(adapter, allot=None), loop=loop, output=output,
        overwrite=overwrite, resume=False, keep_checkpoints=False,
    )  # fmt: skip


def _base_of(settings: TrainSettings, origin: SavedAdapter) -> str | None:
    """The base whose shapes are asked for; the files of LoRA tell their own, also under a head of ours."""
    return None if origin.kind == "LORA" else settings.model

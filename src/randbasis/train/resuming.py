"""What a run finds in its output folder when it is to be gone on with: nothing, checkpoints, or its own end."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from randbasis.errors import CheckpointError, SettingError
from randbasis.train.settings import TrainSettings
from randbasis.train.trainer import last_checkpoint

CHECKPOINTS = "checkpoints"
SUMMARY_FILE = "summary.json"
SETTINGS_FILE = "settings.json"
FINISHED = "finished"
"""Key in the settings of checkpoints that were kept: the run came to its end."""
#: What a resumed run may have otherwise than the run that it goes on with.
FREE_TO_CHANGE = (
    *("output", "overwrite", "resume", "keep_checkpoints", "threads", "device", "eval_batch_size"),
    *("report_to", "logging_steps", "save_steps"),
)
LENGTHS = ("loop.epochs", "loop.max_steps")


@dataclass(frozen=True)
class Start:
    """How a run that is to be resumed begins.

    Args:
        resumed: whether there is a checkpoint to go on from.
        complete: what the run said of itself at its end, where nothing is left to do.
        told: the same in one line.
    """

    resumed: bool
    complete: dict[str, Any] | None
    told: str


def find_start(settings: TrainSettings, processes: int) -> Start:
    """Look at what is there; nothing is written.

    Raises:
        SettingError: the run there was begun with other settings, or its checkpoints are gone and it is to be longer.
        CheckpointError: it does not tell its settings.
    """
    output = Path(settings.output)
    checkpoint = last_checkpoint(output / CHECKPOINTS)
    summary = output / SUMMARY_FILE
    now = kept_settings(settings, processes)
    if checkpoint is None and not summary.is_file():
        return Start(False, None, f"there is nothing to resume in {output}: the run starts anew")
    if checkpoint is None:
        document = _read(summary)
        before = {**document["settings"], **({"processes": document["processes"]} if "processes" in document else {})}
        longer = _changed(before, now, finished=True)
        if longer:
            raise SettingError(
                f"the run in {output} is complete and its checkpoints are gone, so that it cannot become longer "
                f"({longer}); give keep_checkpoints to runs that may, or start another run"
            )
        return Start(False, document, f"the run in {output} is complete: nothing is left to do")
    before = _read(output / CHECKPOINTS / SETTINGS_FILE)
    finished = bool(before.pop(FINISHED, False))
    longer = _changed(before, now, finished=finished)
    if finished and not longer and summary.is_file():
        return Start(False, _read(summary), f"the run in {output} is complete: nothing is left to do")
    said = f"; it becomes longer ({longer}), and the learning rate goes on as in a run of that length" if longer else ""
    return Start(True, None, f"goes on from {checkpoint}{said}")


def kept_settings(settings: TrainSettings, processes: int) -> dict[str, Any]:
    """What a resumed run must have in common with its beginning; several processes make larger batches."""
    return {**settings.as_json(), **({"processes": processes} if processes > 1 else {})}


def _changed(before: dict[str, Any], now: dict[str, Any], *, finished: bool) -> str:
    """What makes a finished run longer, in words; empty where all is the same.

    Raises:
        SettingError: anything else is otherwise.
    """
    then, this = _flat(before), _flat(now)
    names = this.keys() | ({"processes"} & then.keys())
    changed = [
        name for name in sorted(names) if name.split(".")[-1] not in FREE_TO_CHANGE and then.get(name) != this.get(name)
    ]
    told = ", ".join(f"{name} was {then.get(name)!r} and is {this.get(name)!r}" for name in changed)
    longer = [name for name in changed if name in LENGTHS and (then.get(name) or 0) < (this.get(name) or 0)]
    if changed and not (finished and longer == changed):
        raise SettingError(
            f"a resumed run must have the settings that it began with: {told}; start another run for those"
        )
    return told


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = cast(dict[str, Any], value) if isinstance(value, dict) else None
        flat |= {f"{name}.{key}": item for key, item in inner.items()} if inner is not None else {name: value}
    return flat


def _read(path: Path) -> dict[str, Any]:
    try:
        return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} does not tell the settings of the run ({error}); start it again") from error

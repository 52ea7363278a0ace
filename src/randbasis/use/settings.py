"""What using an adapter is told, as plain values.

The command takes its defaults from here, so nothing heavy is imported.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from randbasis.errors import SettingError, near
from randbasis.train.loop_settings import DTYPES
from randbasis.train.settings import GenerationSettings

if TYPE_CHECKING:
    from randbasis.adapters.saved import AdapterLocation
    from randbasis.files.locations import Location

_DEVICE = re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d+)?")
COLUMN_KEYS = ("text", "text_pair", "label", "prompt", "target", "messages")


@dataclass(frozen=True)
class UseSettings:
    """How a trained adapter is used.

    Args:
        adapter: where it is: see :func:`randbasis.adapters.saved.open_adapter`. One whose task nobody described must
            be of a causal language model; ``None`` for the base alone, which must be such a model.
        model: folder or hub name of the base; ``None`` for the one that the adapter names.
        data: rows, or images; not needed to generate from prompts.
        kind: kind of the file when its name does not tell.
        split: which split of an archive of images; ``None``: the first that is not for training.
        columns: other names for the columns of the task (``text``, ``text_pair``, ``label``, ``prompt``, ``target``,
            ``messages``).
        limit: use that many rows, drawn by seed 0.
        batch_size: rows at a time.
        dtype: of the base.
        device: ``"auto"``, or one of torch: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.
        threads: threads of torch; ``None`` leaves them.
        probabilities: answer with those of every class.
        generation: how texts are generated.
    """

    adapter: "AdapterLocation | None" = None
    model: str | None = None
    data: str | Path | None = None
    kind: str | None = None
    split: str | None = None
    columns: dict[str, str] = field(default_factory=dict[str, str])
    limit: int | None = None
    batch_size: int = 32
    dtype: str = "float32"
    device: str = "auto"
    threads: int | None = None
    probabilities: bool = False
    generation: GenerationSettings = field(default_factory=GenerationSettings)

    def check(self) -> None:
        """Refuse what cannot be used.

        Raises:
            SettingError: a value is out of range; the message names it.
        """
        if self.adapter is None and self.model is None:
            raise SettingError("neither an adapter nor a model was given; name at least one")
        for name, number in (("batch_size", self.batch_size), ("limit", self.limit), ("threads", self.threads)):
            if number is not None and number < 1:
                raise SettingError(f"{name} must be at least 1, got {number}")
        if self.dtype not in DTYPES:
            raise SettingError(f"dtype {self.dtype!r} is unknown; {near(self.dtype, DTYPES)}")
        if not _DEVICE.fullmatch(self.device):
            raise SettingError(f"device must be auto, cpu, mps, cuda or one such as cuda:1, got {self.device!r}")
        self.generation.check()

    def sources(self) -> "list[Location | None]":
        """What is read, over which no output must be written."""
        from randbasis.adapters.saved import paths_of

        return [self.data, self.model, *([] if self.adapter is None else paths_of(self.adapter))]

    def opened(self) -> "UseSettings":
        """The same with the adapter at hand, so that whoever asks next does not read it again.

        Raises:
            SettingError: a value is out of range.
            RandbasisError: as :func:`randbasis.adapters.saved.open_adapter`.
        """
        from randbasis.adapters.saved import open_adapter

        self.check()
        return self if self.adapter is None else replace(self, adapter=open_adapter(self.adapter))

    def facts(self) -> dict[str, Any]:
        """What is known before any weights are read.

        Returns:
            ``task`` of the adapter, whether its rows have prompts (``prompted``), and whether it answers with classes
            (``classes``).

        Raises:
            AdapterFilesError: the adapter lacks what is needed.
        """
        from randbasis.adapters.saved import open_adapter
        from randbasis.train.causal_lm import CausalLanguage

        task = {} if self.adapter is None else open_adapter(self.adapter).task
        columns: dict[str, str | None] = {**(task.get("columns") or {}), **self.columns}
        prompted = any(columns.get(key) is not None for key in ("prompt", "messages")) or "prompt_template" in task
        return {
            "task": task.get("task", CausalLanguage.name),
            "prompted": prompted,
            "classes": bool(task.get("labels")),
        }


def use_from_words(words: Mapping[str, Any]) -> UseSettings:
    """The settings from one flat mapping, as the command gives them; words that mean nothing here are left out."""
    columns = {key: words[f"{key}_column"] for key in COLUMN_KEYS if words.get(f"{key}_column") is not None}
    generation = {part.name: words[part.name] for part in fields(GenerationSettings) if part.name in words}
    own = {part.name: words[part.name] for part in fields(UseSettings) if part.name in words}
    return UseSettings(**own, columns=columns, generation=GenerationSettings(**generation))

"""What using an adapter is told, as plain values.

The command takes its defaults from here, so nothing heavy is imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from randbasis.errors import SettingError, near
from randbasis.train.loop_settings import DTYPES
from randbasis.train.settings import GenerationSettings

if TYPE_CHECKING:
    from randbasis.adapters.saved import AdapterLocation

COLUMN_KEYS = ("text", "text_pair", "label", "prompt", "target", "messages")


@dataclass(frozen=True)
class UseSettings:
    """How a trained adapter is used.

    Args:
        adapter: folder of a run, or any other adapter of a causal language model: see
            :func:`randbasis.adapters.saved.open_adapter`; ``None`` for the base alone, which must be such a model.
        model: folder or hub name of the base; ``None`` for the one that the adapter names.
        data: rows, or images; not needed to generate from prompts.
        kind: kind of the file when its name does not tell.
        split: which split of an archive of images; ``None``: the first that is not for training.
        columns: other names for the columns of the task (``text``, ``text_pair``, ``label``, ``prompt``, ``target``,
            ``messages``).
        limit: use that many rows, drawn by seed 0.
        batch_size: rows at a time.
        dtype: of the base.
        device: ``"auto"`` or ``"cpu"``.
        threads: threads of torch; ``None`` leaves them.
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
        for name, value, known in (("dtype", self.dtype, DTYPES), ("device", self.device, ("auto", "cpu"))):
            if value not in known:
                raise SettingError(f"{name} {value!r} is unknown; {near(value, known)}")
        self.generation.check()

    def facts(self) -> dict[str, Any]:
        """``task`` of the adapter and whether its rows have prompts (``prompted``), before any weights are read.

        Raises:
            SettingError: a value is out of range.
            AdapterFilesError: the adapter lacks what is needed.
        """
        from randbasis.adapters.saved import open_adapter
        from randbasis.train.causal_lm import CausalLanguage

        self.check()
        task = {} if self.adapter is None else open_adapter(self.adapter).task
        columns: dict[str, str | None] = {**(task.get("columns") or {}), **self.columns}
        prompted = any(columns.get(key) is not None for key in ("prompt", "messages")) or "prompt_template" in task
        return {"task": task.get("task", CausalLanguage.name), "prompted": prompted}


def use_from_words(words: Mapping[str, Any]) -> UseSettings:
    """The settings from one flat mapping, as the command gives them; words that mean nothing here are left out."""
    columns = {key: words[f"{key}_column"] for key in COLUMN_KEYS if words.get(f"{key}_column") is not None}
    generation = {part.name: words[part.name] for part in fields(GenerationSettings) if part.name in words}
    own = {part.name: words[part.name] for part in fields(UseSettings) if part.name in words}
    return UseSettings(**own, columns=columns, generation=GenerationSettings(**generation))

"""How a row becomes a text: what is beside the columns, as it is told in a run's settings and beside its adapter."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from randbasis.errors import ColumnError, DataMissingError, SettingError
from randbasis.files.text_files import read_text
from randbasis.train.settings import TrainSettings
from randbasis.train.tabular import Table
from randbasis.train.templates import Template


@dataclass(frozen=True)
class RowFormat:
    """What stands around and between the cells of a row.

    Args:
        separator: between a prompt and its target.
        prompt_template: of the prompt, see :class:`randbasis.train.templates.Template`.
        target_template: of the target.
        chat_template: Jinja template of conversations; ``None``: the tokenizer's own.
        loss_on: ``"answer"`` or ``"all"``.
    """

    separator: str = ""
    prompt_template: str | None = None
    target_template: str | None = None
    chat_template: str | None = None
    loss_on: str = "answer"

    @classmethod
    def of(cls, settings: TrainSettings) -> "RowFormat":
        """The format of a run; its file with a chat template is read.

        Raises:
            DataMissingError: there is no such file.
            DataFormatError: it is no text in UTF-8.
        """
        chat = None if settings.chat_template is None else Path(settings.chat_template)
        if chat is not None and not chat.is_file():
            raise DataMissingError(f"chat_template {str(chat)!r} is not a file; give the path of a Jinja template")
        own = settings.prompt_template is not None or settings.data.messages_column is not None
        return cls(
            "" if own else settings.separator,
            settings.prompt_template,
            settings.target_template,
            None if chat is None else read_text(chat),
            settings.loss_on,
        )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "RowFormat":
        """What :meth:`record` told."""
        known = {one.name for one in fields(cls)}
        return cls(**{"separator": record["separator"], **{k: v for k, v in record.items() if k in known}})

    def record(self) -> dict[str, Any]:
        """As plain values; beside the separator only what is not the default, which readers of before know."""
        defaults = {one.name: one.default for one in fields(self)}
        told = {name: value for name, value in asdict(self).items() if value != defaults[name]}
        return {"separator": self.separator, **told}

    @property
    def fields(self) -> list[str]:
        """The columns that the templates name."""
        return [name for template in (self.prompt, self.target) if template for name in template.fields]

    @property
    def prompt(self) -> Template | None:
        """The template of the prompt."""
        return None if self.prompt_template is None else Template(self.prompt_template, "prompt_template")

    @property
    def target(self) -> Template | None:
        """The template of the target."""
        return None if self.target_template is None else Template(self.target_template, "target_template")


def roles(settings: TrainSettings, table: Table) -> dict[str, str | None]:
    """Role → column of a language model's rows: a conversation, a prompt and a target, or a text.

    A role that a template fills has no column.

    Raises:
        SettingError: none of the three was named, or more than one.
        ColumnError: the template of the prompt has the column of the target.
    """
    data = settings.data
    prompts = {"prompt": data.prompt_column, "prompt_template": settings.prompt_template}
    targets = {"target": data.target_column, "target_template": settings.target_template}
    for one in (prompts, targets):
        if None not in one.values():
            raise SettingError(f"{' and '.join(one)} are two ways to say the same; give one")
    asked, answered = any(prompts.values()), any(targets.values())
    ways = (data.messages_column is not None, asked or answered, data.text_column is not None)
    if sum(ways) != 1 or asked != answered:
        raise SettingError(
            f"causal-lm needs prompt_column and target_column (or templates of several columns), or text_column "
            f"alone, or messages_column alone; {table.source} has {', '.join(table.columns)}"
        )
    if data.messages_column is not None:
        return {"messages": data.messages_column}
    if settings.prompt_template is not None:
        shared = {*Template(settings.prompt_template, "prompt_template").fields} & {data.target_column}
        if shared:
            raise ColumnError(f"prompt_template has the column {shared.pop()!r}, which is to be written; take it out")
    columns = {"prompt": data.prompt_column, "target": data.target_column, "text": data.text_column}
    filled = {"prompt": settings.prompt_template, "target": settings.target_template}
    return {role: name for role, name in columns.items() if filled.get(role) is None}

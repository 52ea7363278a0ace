"""Conversations as a model reads them, by the chat template of its tokenizer, and which tokens of them are answers."""

import json
from collections.abc import Sequence
from typing import Any, cast

from jinja2 import TemplateError

from randbasis.errors import ColumnError, SettingError
from randbasis.train.tabular import Table

Message = dict[str, Any]
Conversation = list[Message]

_ANSWER = "zqxj"
_PROBE: Conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": _ANSWER}]
"""What a template makes of this tells how it begins and ends an answer."""


class Chat:
    """A tokenizer's chat template, or one in its place.

    Args:
        tokenizer: of the base.
        template: a Jinja template; ``None`` for the tokenizer's own.

    Raises:
        SettingError: there is none, it cannot be filled, or the tokenizer does not tell where its tokens stand.
    """

    def __init__(self, tokenizer: Any, template: str | None):
        if template is None and not getattr(tokenizer, "chat_template", None):
            raise SettingError(
                "the tokenizer of this model has no chat template; give one as a file with chat_template, or take a "
                "model that was trained on conversations"
            )
        if not tokenizer.is_fast:
            raise SettingError("conversations need a fast tokenizer, which tells where in a text its tokens stand")
        self.tokenizer = tokenizer
        self.template = template
        self._header = ""
        probe = self.text(_PROBE)
        if _ANSWER not in probe:
            raise SettingError("the chat template leaves the content of the assistant out; take another one")
        start, bare = self.prompt(_PROBE[:1]), self.text(_PROBE[:1])
        if start == bare and probe.startswith(
            bare
        ):  # a template that does not begin answers: what it writes before one
            self._header = probe[len(bare) : probe.rindex(_ANSWER)]
        self.end_id = self._end_of_answer(probe)

    def text(self, messages: Conversation) -> str:
        """A conversation as one text."""
        return self._filled(messages, add_generation_prompt=False)

    def prompt(self, messages: Conversation) -> str:
        """A conversation up to where an answer begins."""
        return self._filled(messages, add_generation_prompt=True) + self._header

    def ids(self, text: str) -> list[int]:
        """Tokens of a text that a template wrote, which has its special tokens already."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def learned(self, messages: Conversation) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation, and whether each is of an answer of the assistant.

        A template may mark answers by ``{% generation %}``, as transformers has it. Else an answer is what follows on
        the prompt that a model is given for it; blanks that a template writes behind it are not learned.

        Raises:
            SettingError: the template writes the beginning of a conversation otherwise than by itself.
        """
        if "generation %}" in (self.template or self.tokenizer.chat_template).replace("-%}", " %}"):
            marked = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            return marked["input_ids"], [bool(one) for one in marked["assistant_masks"]]
        text = self.text(messages)
        spans = [self._span(messages, place, text) for place, one in enumerate(messages) if one["role"] == "assistant"]
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        places: list[tuple[int, int]] = found["offset_mapping"]
        return found["input_ids"], [any(a <= start < end <= b for a, b in spans) for start, end in places]

    def _span(self, messages: Conversation, place: int, text: str) -> tuple[int, int]:
        start, end = self.prompt(messages[:place]), self.text(messages[: place + 1])
        if not (text.startswith(end) and end.startswith(start)):
            raise SettingError(
                "the chat template does not write a conversation as the continuation of its beginning, so that answers "
                "cannot be told from the rest; mark them with {% generation %} in a template of your own "
                "(chat_template), or learn the whole text (loss_on all)"
            )
        return len(start), len(end.rstrip())

    def _filled(self, messages: Conversation, *, add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise SettingError(f"the chat template cannot be filled: {error}; {json.dumps(messages)[:200]}") from error

    def _end_of_answer(self, probe: str) -> int | None:
        """The special token that the template writes behind an answer, if it does."""
        behind = self.ids(probe.rpartition(_ANSWER)[2].strip())
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return behind[0] if behind and behind[0] in special else None


def asked(messages: Conversation) -> Conversation:
    """A conversation without the answer at its end."""
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def conversations(table: Table, column: str) -> list[Conversation]:
    """The conversations of a column: lists of messages, or the same as JSON text.

    Raises:
        ColumnError: the column does not exist, or a row holds something else.
    """
    found: list[Conversation] = []
    for number, cell in enumerate(table.column(column), 1):
        try:
            found.append(conversation(cell))
        except ValueError as error:
            raise ColumnError(f"row {number} of {table.source}, column {column!r}: {error}") from error
    return found


def conversation(value: Any) -> Conversation:
    """A conversation as a list of messages.

    Raises:
        SettingError: it is something else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise SettingError(f"messages are a list of objects with role and content, got a text: {error}") from error
    messages = cast(Sequence[Any], value) if isinstance(value, list) else ()
    if not messages:
        raise SettingError(f"messages are a list of objects with role and content, got {value!r}")
    for message in messages:
        keys: set[str] = set(cast(Message, message)) if isinstance(message, dict) else set()
        if {"from", "value"} <= keys:
            raise SettingError("messages with 'from' and 'value' are of another form; rename them to role and content")
        if not keys >= {"role", "content"} or not all(isinstance(message[key], str) for key in ("role", "content")):
            raise SettingError(f"each message has a role and a content, both texts; got {message!r}")
    return [dict(cast(Message, message)) for message in messages]

"""TOKENS → TEXT while they come: whole characters alone, nothing of a stop string, nothing that may become one."""

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"
"""What a tokenizer writes for bytes that are no character, or not yet one."""
_CONTEXT = 6
"""Tokens of the prompt that the first token of an answer is decoded beside: whether a blank belongs before it."""
_LONGEST_CHARACTER = 8
"""Tokens after which bytes that are still no character are taken for broken ones: a character has four bytes."""


class TextStream:
    """The text of one answer.

    A tokenizer decodes some tokens otherwise alone than behind others, so each is decoded beside those before it, and
    what those alone give is taken off.

    Args:
        tokenizer: of transformers; used by one thread at a time.
        prompt: token ids of the prompt.
        stop: texts that end the answer.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-_CONTEXT:])
        self._start = 0
        self._read = len(self._tokens)
        self._held = ""
        self._stop = [one for one in stop if one]

    def add(self, token: int) -> tuple[str, bool]:
        """What can be told once this token came, and whether a stop string has ended the answer."""
        self._tokens.append(token)
        before = self._decoded(self._start, self._read)
        after = self._decoded(self._start, len(self._tokens))
        unfinished = after.endswith(BROKEN) and len(self._tokens) - self._read < _LONGEST_CHARACTER
        if unfinished or len(after) <= len(before):
            return "", False
        self._start, self._read = self._read, len(self._tokens)
        return self._checked(after[len(before) :])

    def end(self) -> str:
        """What was held back, once no token comes any more."""
        before = self._decoded(self._start, self._read)
        rest = self._decoded(self._start, len(self._tokens))[len(before) :]
        self._start = self._read = len(self._tokens)
        text, stopped = self._checked(rest)
        held, self._held = self._held, ""
        return text if stopped else text + held

    def _decoded(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True)

    def _checked(self, text: str) -> tuple[str, bool]:
        text = self._held + text
        found = [place for one in self._stop if (place := text.find(one)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max((_overlap(text, one) for one in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text begin a stop string."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)

"""What the routes stand on: one base model with its names, its tokenizer, its engine and who may use what."""

import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from fastapi import Request as Http
from fastapi.concurrency import run_in_threadpool

from randbasis.errors import AnswerError, EngineStoppedError, NotStoredError
from randbasis.serve.adapters import Adapters, Named
from randbasis.serve.bodies import Message
from randbasis.serve.keys import ANYBODY, Key
from randbasis.serve.metrics import Metrics
from randbasis.serve.requests import Request
from randbasis.train.chat import Chat

Encoded = list[int]
E = TypeVar("E")


class TextEngine(Protocol):
    """What writes texts; see :class:`randbasis.serve.engine.Engine`."""

    context: int

    @property
    def fault(self) -> str | None:
        """Why it answers no more."""
        ...

    def check(self, prompt: Sequence[int], max_tokens: int) -> None:
        """Refuse a prompt."""
        ...

    def submit(self, requests: Sequence[Request]) -> None:
        """Take requests."""
        ...

    def cancel(self, requests: Sequence[Request]) -> None:
        """Drop them."""
        ...


class RowEngine(Protocol):
    """What reads texts; see :class:`randbasis.serve.encoding.EncoderEngine`."""

    context: int
    vocabulary: int

    @property
    def fault(self) -> str | None:
        """Why it answers no more."""
        ...

    async def embed(self, rows: Sequence[Encoded], lease: Any | None) -> list[list[float]]:
        """A vector a row."""
        ...

    async def classify(self, rows: Sequence[Encoded], lease: Any) -> list[list[float]]:
        """Logits of each row."""
        ...


class Words:
    """A tokenizer that one thread uses at a time.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    def encode(self, text: str) -> Encoded:
        """A text as the model reads it.

        Raises:
            AnswerError: it is no text.
        """
        _check_characters(text)
        with self._lock:
            return self._tokenizer(text, verbose=False)["input_ids"]

    def chat(self, messages: Sequence[Message], template: str | None) -> Encoded:
        """A conversation up to where the answer begins.

        Raises:
            AnswerError: there is no chat template, or a text is none.
            SettingError: it cannot be filled with these messages.
        """
        plain = [one.plain() for one in messages]
        _check_characters("".join(text for one in plain for text in one.values()))
        with self._lock:
            if template is None and not getattr(self._tokenizer, "chat_template", None):
                raise AnswerError(
                    "this model has no chat template, so that it reads no conversations; use /v1/completions"
                )
            chat = Chat(self._tokenizer, template)
            return chat.ids(chat.prompt(plain))

    def token(self, token: int) -> str:
        """One token as text. It is decoded behind itself: at the beginning of a text some lose their blank."""
        with self._lock:
            alone, twice = self._tokenizer.decode([token]), self._tokenizer.decode([token, token])
        return twice[len(alone) :]


@dataclass
class Service:
    """One server.

    Attributes:
        adapters: names and what they mean.
        words: the tokenizer.
        metrics: what is counted.
        engine: of a decoder, else None.
        encoder: of an encoder, else None.
        draining: whether it takes no more requests.
        created: seconds since 1970.
    """

    adapters: Adapters
    words: Words
    metrics: Metrics
    engine: TextEngine | None = None
    encoder: RowEngine | None = None
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def fault(self) -> str | None:
        """Why nothing is answered any more."""
        working = self.engine or self.encoder
        return None if working is None else working.fault

    def writer(self) -> TextEngine:
        """The engine of a decoder.

        Raises:
            AnswerError: the base is an encoder.
            EngineStoppedError: it is shutting down.
        """
        return self._of_its_kind(self.engine, "is an encoder and writes no texts; use /v1/embeddings")

    def reader(self) -> RowEngine:
        """The engine of an encoder.

        Raises:
            AnswerError: the base is a decoder.
            EngineStoppedError: it is shutting down.
        """
        return self._of_its_kind(self.encoder, "writes texts and is no encoder; use /v1/completions")

    def _of_its_kind(self, engine: E | None, instead: str) -> E:
        self._check_open()
        if engine is None:
            raise AnswerError(f"{self.adapters.base!r} {instead}")
        return engine

    def named(self, http: Http, word: str) -> Named:
        """What a client's ``model`` means, where its key may name it; else it is not told whether it is there.

        Raises:
            NotStoredError: the key may not name it.
        """
        http.state.model = word
        named = self.adapters.named(word)
        if not key_of(http).may_use(named.name if named.name is not None else self.adapters.base):
            raise not_there(word)
        return named

    async def lease(self, named: Named) -> Any | None:
        """See :meth:`Adapters.lease`; a store may have to be read.

        Raises:
            NotStoredError: it is not there. The store's own message would name what is called alike, other users' too.
        """
        try:
            return None if named.name is None else await run_in_threadpool(self.adapters.lease, named)
        except NotStoredError as error:
            raise not_there(named.word) from error

    def _check_open(self) -> None:
        if self.draining:
            raise EngineStoppedError("the server is shutting down; ask another one")


def _check_characters(text: str) -> None:
    """Raise where there is half of a pair of UTF-16, which JSON can name and no text has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise AnswerError(f"a text must be whole characters, got {error.object[error.start]!r} in it") from error


def key_of(http: Http) -> Key:
    """Who asks, as the gate found."""
    return getattr(http.state, "key", ANYBODY)


def not_there(word: str) -> NotStoredError:
    """What is said of an adapter that is not there, and of one that the key may not name."""
    return NotStoredError(f"there is no adapter {word!r}; /v1/models lists what there is")


def fresh_id(kind: str) -> str:
    """An id of an answer."""
    return f"{kind}-{secrets.token_hex(12)}"


def prompts_of(given: str | list[str] | list[int] | list[list[int]]) -> list[str] | list[list[int]]:
    """The prompts of a body: one or several, texts or tokens.

    Raises:
        AnswerError: there is none.
    """
    if isinstance(given, str):
        return [given]
    if not given:
        raise AnswerError("there must be at least one text, got an empty list; write one")
    if isinstance(given[0], int):
        return [[one for one in given if isinstance(one, int)]]
    return given  # pyright: ignore[reportReturnType] # pydantic allows no mixed lists

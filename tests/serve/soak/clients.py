"""Clients of the server: what they ask for, and what came of it."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

MAX_TRIES = 6


@dataclass(slots=True)
class Asked:
    """One request and its answer.

    Attributes:
        name: of an adapter; None for the base.
        version: that was asked for; None for the newest.
        prompt: token ids.
        hangs_up: whether its client goes after the first piece.
        sent: when, on the monotonic clock; of the last try.
        first: when the first piece came; None where none did.
        ended: when nothing came any more.
        status: of HTTP; 0 where there was no connection, or it broke.
        text: of the answer.
        tokens: that the server counted.
        finish: why it ended.
        tries: how often it was sent; again where the server had been killed.
        trouble: of the connection.
    """

    name: str | None
    version: int | None
    prompt: list[int]
    hangs_up: bool = False
    sent: float = 0.0
    first: float | None = None
    ended: float = 0.0
    status: int = 0
    text: str = ""
    tokens: int = 0
    finish: str | None = None
    tries: int = 0
    trouble: str = ""

    @property
    def answer(self) -> list[int]:
        """The tokens of the text, whose words they are."""
        return [int(word.removeprefix("w")) for word in self.text.split()]


@dataclass
class Line:
    """To one server, which may be down for a while.

    Attributes:
        url: of it.
        base: name of the base.
        up: set while it answers.
        kills: began and ended being down.
    """

    url: str
    base: str
    max_tokens: int
    up: asyncio.Event = field(default_factory=asyncio.Event)
    kills: list[tuple[float, float]] = field(default_factory=list)

    def cut(self, asked: Asked) -> bool:
        """Whether the server was down in its time."""
        return any(began <= asked.ended and asked.sent <= ended for began, ended in self.kills) or not self.up.is_set()


async def ask(client: httpx.AsyncClient, line: Line, asked: Asked) -> None:
    """Until there is an answer that no kill has cut off."""
    while asked.tries < MAX_TRIES:
        await line.up.wait()
        asked.tries += 1
        asked.first, asked.status, asked.text, asked.finish, asked.trouble = None, 0, "", None, ""
        asked.sent = time.monotonic()
        try:
            await _stream(client, line, asked)
        except httpx.TransportError as error:
            asked.status, asked.trouble = 0, f"{type(error).__name__}: {error}"
        asked.ended = time.monotonic()
        if asked.status:
            return
        await asyncio.sleep(0.05)  # a kill is told a moment later than it is felt
        if not line.cut(asked):
            return


async def _stream(client: httpx.AsyncClient, line: Line, asked: Asked) -> None:
    model = asked.name or line.base
    body = {
        "model": model if asked.version is None else f"{model}@{asked.version}",
        "prompt": asked.prompt,
        "max_tokens": line.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with client.stream("POST", f"{line.url}/v1/completions", json=body) as response:
        if response.status_code != 200:
            asked.trouble = (await response.aread()).decode()
            asked.status = response.status_code
            return
        async for one in response.aiter_lines():
            if not one.startswith("data: "):
                continue
            data = one.removeprefix("data: ")
            if data == "[DONE]":
                asked.status = 200
                return
            _take(asked, json.loads(data))
            if asked.hangs_up and asked.first is not None:
                asked.status = 200
                return
    raise httpx.ReadError("the stream ended before its end")


def _take(asked: Asked, event: dict[str, Any]) -> None:
    if "error" in event:
        raise httpx.ReadError(event["error"]["message"])
    for choice in event["choices"]:
        if choice["text"] and asked.first is None:
            asked.first = time.monotonic()
        asked.text += choice["text"]
        asked.finish = choice["finish_reason"] or asked.finish
    if event["usage"] is not None:
        asked.tokens = event["usage"]["completion_tokens"]

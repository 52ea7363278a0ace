"""HTTP ↔ ENGINE: the choices of one HTTP request as one stream of pieces, which ends when its client goes."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from fastapi import Request as Http

from randbasis.serve.adapters import Named
from randbasis.serve.requests import SEEDS, Hold, Piece, Request, Sampling
from randbasis.serve.service import Encoded, Service, TextEngine, fresh_id

POLL_SECONDS = 0.5
"""How often a client is looked for that waits for a whole answer."""

Indexed = tuple[int, Piece]


class Choices:
    """The requests of all choices of all prompts, in the order of their index.

    Args:
        engine: that answers them.
        http: of the client; its tokens are counted there for the log.
        requests: submitted.
        arrived: where their pieces come.
    """

    def __init__(self, engine: TextEngine, http: Http, requests: Sequence[Request], arrived: "asyncio.Queue[Indexed]"):
        self._engine = engine
        self._http = http
        self.requests = requests
        self._arrived = arrived

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, each once."""
        return sum(len(one.prompt) for one in self.requests if one.choice == 0)

    @property
    def tokens(self) -> int:
        """Of all answers so far."""
        return sum(len(one.tokens) for one in self.requests)

    async def stream(self) -> AsyncGenerator[Indexed]:
        """Index and piece, as they come, up to the last of each; whoever stops early cancels the rest."""
        left = len(self.requests)
        try:
            while left:
                index, piece = await self._next()
                left -= piece.finish is not None
                yield index, piece
        finally:
            self._http.state.prompt_tokens, self._http.state.tokens = self.prompt_tokens, self.tokens
            if left:
                self._engine.cancel(self.requests)

    async def whole(self) -> list[list[Piece]]:
        """All pieces of each."""
        found: list[list[Piece]] = [[] for _ in self.requests]
        async with aclosing(self.stream()) as stream:
            async for index, piece in stream:
                found[index].append(piece)
        return found

    async def _next(self) -> Indexed:
        """The next piece; of a client that went away no more."""
        while True:
            try:
                return await asyncio.wait_for(self._arrived.get(), POLL_SECONDS)
            except TimeoutError:
                if await self._http.is_disconnected():
                    raise asyncio.CancelledError from None


async def open_choices(
    service: Service, http: Http, named: Named, prompts: Sequence[Encoded], sampling: Sampling, n: int | None
) -> Choices:
    """Submit the choices of prompts.

    Args:
        service: the server.
        http: of the client.
        named: the adapter.
        prompts: token ids.
        sampling: how each is answered.
        n: choices of each.

    Raises:
        RandbasisError: a prompt cannot be answered, the adapter cannot be used, or the queue is full.
    """
    engine, count = service.writer(), n or 1
    for prompt in prompts:
        engine.check(prompt, sampling.max_tokens)
    lease = await service.lease(named)
    hold = None if lease is None else Hold(lease, count * len(prompts))
    arrived: asyncio.Queue[Indexed] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def put(index: int, piece: Piece) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(arrived.put_nowait, (index, piece))

    requests = [
        Request(fresh_id("choice"), tuple(prompt), sampling, hold, partial(put, place * count + choice), choice)
        for place, prompt in enumerate(prompts)
        for choice in range(count)
    ]
    try:
        engine.submit(requests)
    except BaseException:
        for _ in requests if hold is not None else ():
            hold.release()  # pyright: ignore[reportOptionalMemberAccess]
        raise
    return Choices(engine, http, requests, arrived)


def seeded(sampling: Sampling, seed: int | None) -> Sampling:
    """With the client's seed, else with one of its own."""
    return replace(sampling, seed=secrets.randbits(64) if seed is None else seed % SEEDS)

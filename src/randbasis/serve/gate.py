"""In front of every route: who asks, how fast, how much; and behind it, one line of the access log.

A body is read only once its sender is known, and never beyond the limit.
"""

import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import UTC, datetime
from math import ceil
from typing import Any

from fastapi.responses import JSONResponse

from randbasis.serve.keys import Key, KeyRing
from randbasis.serve.limits import TokenBuckets
from randbasis.serve.metrics import Metrics
from randbasis.serve.page_routes import PAGE_FILES
from randbasis.serve.refusals import refusal
from randbasis.serve.settings import ADMIN

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/health", *PAGE_FILES})
"""Routes without a key."""
ADMIN_ROUTES = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
"""Routes of admin keys alone."""
ACCESS = logging.getLogger("randbasis.serve.access")


class Gate:
    """A middleware of ASGI around the app.

    Args:
        app: what is behind it.
        keys: who may ask.
        metrics: what is counted.
        max_body: most bytes of a body.
    """

    def __init__(self, app: App, keys: KeyRing, metrics: Metrics, max_body: int) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics
        self._max_body = max_body
        self._buckets = TokenBuckets()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 500
        state: dict[str, Any] = scope.setdefault("state", {})

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refused = self._admitted(scope, state)
            replayed = receive
            if refused is None:
                replayed, refused = await self._with_body(scope, receive)
            await (refused or self._app)(scope, replayed, sending)
        finally:
            self._tell(scope, state, status, time.monotonic() - began)

    def _admitted(self, scope: Message, state: dict[str, Any]) -> JSONResponse | None:
        path = scope["path"]
        if path in OPEN:
            return None
        key = self._keys.find(_secret(scope))
        if key is None:
            return refusal(
                401,
                "a key must be given as `Authorization: Bearer KEY`; `randbasis keys add` makes one",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        state["key"] = key
        if path in ADMIN_ROUTES and key.role != ADMIN:
            return refusal(403, f"{path} needs an admin key, {key.name!r} is none; ask who runs the server")
        wait = self._buckets.take(key.name, key.rate)
        if wait and key.rate is not None:
            message = f"key {key.name!r} may ask {key.rate.text}; try again in {wait:.2f} s"
            return refusal(429, message, "rate_limit_exceeded", headers={"Retry-After": str(ceil(wait))})
        return None

    async def _with_body(self, scope: Message, receive: Receive) -> tuple[Receive, JSONResponse | None]:
        """A receive that gives the whole body, or what to answer where it is too long."""
        body = bytearray()
        more = scope["method"] not in ("GET", "HEAD", "OPTIONS")
        too_long = more and _length(scope) > self._max_body
        while more and not too_long:
            message = await receive()
            if message["type"] != "http.request":
                return _replay(message, receive), None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            too_long = len(body) > self._max_body
        if too_long:
            message = f"a body must have at most {self._max_body} bytes; send less at once"
            return receive, refusal(413, message, "body_too_long", headers={"Connection": "close"})
        return _replay({"type": "http.request", "body": bytes(body), "more_body": False}, receive), None

    def _tell(self, scope: Message, state: dict[str, Any], status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None)
        name = route if isinstance(route, str) else "other" if scope["path"] not in ADMIN_ROUTES else scope["path"]
        self._metrics.http(name, status, seconds)
        key: Key | None = state.get("key")
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "key": None if key is None else key.name,
            "method": scope["method"],
            "route": name,
            "status": status,
            "model": state.get("model"),
            "prompt_tokens": state.get("prompt_tokens", 0),
            "tokens": state.get("tokens", 0),
            "ms": round(seconds * 1000, 1),
        }
        ACCESS.info("%s", json.dumps(line, ensure_ascii=False))


def _replay(first: Message, receive: Receive) -> Receive:
    waiting = [first]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed


def _headers(scope: Message, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key.lower() == name]


def _secret(scope: Message) -> str | None:
    """The key of the request; of several headers none, since it is not clear whose it is."""
    given = _headers(scope, b"authorization")
    scheme, _, secret = given[0].decode("latin-1").partition(" ") if len(given) == 1 else ("", "", "")
    return secret.strip() if scheme.lower() == "bearer" and secret.strip() else None


def _length(scope: Message) -> int:
    given = _headers(scope, b"content-length")
    return int(given[0]) if given and given[0].isdigit() else 0

"""``/v1/completions`` and ``/v1/chat/completions``: bodies to requests, pieces to answers and to streams."""

import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from fastapi import Request as Http
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse

from randbasis.errors import AdapterRefusedError, AnswerError, EngineStoppedError, RandbasisError
from randbasis.serve.bodies import ChatAnswer, ChatBody, CompletionAnswer, CompletionBody, SamplingBody
from randbasis.serve.choices import Choices, open_choices, seeded
from randbasis.serve.refusals import error_body, responses, status_of
from randbasis.serve.requests import Piece, Sampling, Scored
from randbasis.serve.service import Encoded, Service, Words, fresh_id, prompts_of

DEFAULT_TOKENS = 16
"""Of a completion, as OpenAI has it."""
_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}
_REFUSALS = responses(400, 403, 404, 413, 422)

Delta = Callable[[int, Piece], dict[str, Any]]
"""Index and piece → a choice of a chunk."""


def text_routes(service: Service) -> APIRouter:
    """The routes of a decoder."""
    router = APIRouter()

    async def completions(http: Http, body: CompletionBody) -> Response:
        """Continue prompts."""
        service.writer()
        named = service.named(http, body.model)
        prompts = await run_in_threadpool(_encoded, service.words, prompts_of(body.prompt))
        sampling = _sampling(body, body.max_tokens or DEFAULT_TOKENS, body.logprobs)
        choices = await open_choices(service, http, named, prompts, sampling, body.n)
        shape = _CompletionShape(service.words)
        return await _answered(choices, body, _head("cmpl", "text_completion", body.model), shape)

    async def chat(http: Http, body: ChatBody) -> Response:
        """Answer a conversation."""
        engine = service.writer()
        named = service.named(http, body.model)
        prompt = await run_in_threadpool(service.words.chat, body.messages, None)
        asked = body.max_completion_tokens or body.max_tokens or max(1, engine.context - len(prompt))
        sampling = _sampling(body, asked, (body.top_logprobs or 0) if body.logprobs else None)
        choices = await open_choices(service, http, named, [prompt], sampling, body.n)
        shape = _ChatShape(service.words)
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        return await _answered(choices, body, _head("chatcmpl", kind, body.model), shape)

    for path, route, model in (
        ("/v1/completions", completions, CompletionAnswer),
        ("/v1/chat/completions", chat, ChatAnswer),
    ):
        told: dict[int | str, dict[str, Any]] = {
            200: {"model": model, "content": _STREAM, "description": "The answer, or a stream of its pieces."}
        }
        router.add_api_route(path, route, methods=["POST"], responses=told | _REFUSALS, response_model=None)
    return router


class _CompletionShape:
    """Pieces as ``/v1/completions`` tells them."""

    def __init__(self, words: Words):
        self._words = words
        self._offsets: dict[int, int] = {}

    def first(self, index: int) -> dict[str, Any] | None:
        """What a stream begins with: nothing."""
        return None

    def chunk(self, index: int, piece: Piece, finish: str | None) -> dict[str, Any]:
        """A choice of a chunk."""
        return {"index": index, "text": piece.text, "logprobs": self._logprobs(index, piece), "finish_reason": finish}

    def whole(self, index: int, piece: Piece, finish: str | None) -> dict[str, Any]:
        """A choice of a whole answer."""
        return self.chunk(index, piece, finish)

    def _logprobs(self, index: int, piece: Piece) -> dict[str, Any] | None:
        if not piece.scored:
            return None
        tokens = [self._words.token(one.token) for one in piece.scored]
        offsets: list[int] = []
        for token in tokens:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in piece.scored],
            "top_logprobs": [{self._words.token(t): p for t, p in one.top} for one in piece.scored],
            "text_offset": offsets,
        }


class _ChatShape:
    """Pieces as ``/v1/chat/completions`` tells them."""

    def __init__(self, words: Words):
        self._words = words

    def first(self, index: int) -> dict[str, Any] | None:
        """What a stream begins with: who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, index: int, piece: Piece, finish: str | None) -> dict[str, Any]:
        """A choice of a chunk."""
        delta = {"content": piece.text} if piece.text else {}
        return {"index": index, "delta": delta, "logprobs": self._logprobs(piece), "finish_reason": finish}

    def whole(self, index: int, piece: Piece, finish: str | None) -> dict[str, Any]:
        """A choice of a whole answer."""
        message = {"role": "assistant", "content": piece.text}
        return {"index": index, "message": message, "logprobs": self._logprobs(piece), "finish_reason": finish}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not piece.scored:
            return None
        return {"content": [self._token(one) for one in piece.scored], "refusal": None}

    def _token(self, one: Scored) -> dict[str, Any]:
        return self._told(one.token, one.logprob) | {"top_logprobs": [self._told(*top) for top in one.top]}

    def _told(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._words.token(token)
        return {"token": text, "logprob": logprob, "bytes": [*text.encode()]}


_Shape = _CompletionShape | _ChatShape


async def _answered(choices: Choices, body: SamplingBody, head: dict[str, Any], shape: _Shape) -> Response:
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        events = _events(choices, head, shape, usage=usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    answers = [_joined(pieces) for pieces in await choices.whole()]
    failed = next((one for one in answers if one.finish in ("error", "cancelled")), None)
    if failed is not None:
        raise _error_of(failed)
    told = [shape.whole(index, one, one.finish) for index, one in enumerate(answers)]
    return JSONResponse({**head, "choices": told, "usage": _usage(choices)})


async def _events(choices: Choices, head: dict[str, Any], shape: _Shape, *, usage: bool) -> AsyncGenerator[str]:
    """Server-sent events. An error ends the stream, since its status is long sent."""
    extra: dict[str, Any] = {"usage": None} if usage else {}
    begun: set[int] = set()
    async with aclosing(choices.stream()) as stream:
        async for index, piece in stream:
            if piece.finish in ("error", "cancelled"):
                error = _error_of(piece)
                status, code = status_of(error)
                yield _event(error_body(status, str(error), code))
                return
            if index not in begun and (first := shape.first(index)) is not None:
                yield _event({**head, "choices": [first], **extra})
            begun.add(index)
            yield _event({**head, "choices": [shape.chunk(index, piece, piece.finish)], **extra})
    if usage:
        yield _event({**head, "choices": [], "usage": _usage(choices)})
    yield "data: [DONE]\n\n"


def _error_of(piece: Piece) -> RandbasisError:
    kind = AdapterRefusedError if piece.refused else EngineStoppedError
    return kind(piece.error or "the request was cancelled; ask again")


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _joined(pieces: Sequence[Piece]) -> Piece:
    last = pieces[-1]
    scored = tuple(one for piece in pieces for one in piece.scored)
    return Piece("".join(piece.text for piece in pieces), scored, last.finish, last.error, last.refused)


def _head(kind: str, told: str, model: str) -> dict[str, Any]:
    return {"id": fresh_id(kind), "object": told, "created": int(time.time()), "model": model}


def _usage(choices: Choices) -> dict[str, int]:
    prompt, answer = choices.prompt_tokens, choices.tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _sampling(body: SamplingBody, max_tokens: int, logprobs: int | None) -> Sampling:
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    return seeded(Sampling(max_tokens, temperature, top_p, 0, body.stops, logprobs), body.seed)


def _encoded(words: Words, prompts: Sequence[str] | Sequence[list[int]]) -> list[Encoded]:
    if len(prompts) > MOST_PROMPTS:
        raise AnswerError(f"at most {MOST_PROMPTS} prompts may come at once, got {len(prompts)}; send several bodies")
    return [words.encode(one) if isinstance(one, str) else one for one in prompts]


MOST_PROMPTS = 128

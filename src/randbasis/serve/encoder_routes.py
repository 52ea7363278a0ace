"""``/v1/embeddings`` and ``/v1/classify``: texts to vectors and to classes."""

import base64
import struct
import time
from collections.abc import Sequence
from math import exp
from typing import Any

from fastapi import APIRouter
from fastapi import Request as Http
from fastapi.concurrency import run_in_threadpool

from randbasis.errors import AnswerError
from randbasis.serve.bodies import (
    Classified,
    ClassifiedList,
    ClassifyBody,
    Embedded,
    EmbeddingBody,
    EmbeddingList,
    Usage,
)
from randbasis.serve.refusals import responses
from randbasis.serve.service import Encoded, RowEngine, Service, Words, fresh_id, prompts_of

MOST_ROWS = 512
"""Texts of one request."""


def encoder_routes(service: Service) -> APIRouter:
    """The routes of an encoder."""
    router = APIRouter()

    async def embeddings(http: Http, body: EmbeddingBody) -> EmbeddingList:
        """Vectors of texts, whose cosine says how alike they are."""
        engine = service.reader()
        named = service.named(http, body.model)
        rows = await run_in_threadpool(_rows, service.words, engine, prompts_of(body.input))
        lease = await service.lease(named)
        try:
            vectors = await engine.embed(rows, lease)
        finally:
            if lease is not None:
                lease.release()
        told = [
            Embedded(index=index, embedding=one if body.encoding_format == "float" else _packed(one))
            for index, one in enumerate(vectors)
        ]
        return EmbeddingList(data=told, model=body.model, usage=_counted(http, rows))

    async def classify(http: Http, body: ClassifyBody) -> ClassifiedList:
        """Classes of texts, by an adapter that was trained with a head."""
        engine = service.reader()
        named = service.named(http, body.model)
        rows = await run_in_threadpool(_rows, service.words, engine, prompts_of(body.input))
        lease = await service.lease(named)
        if lease is None:
            raise AnswerError(f"{body.model!r} is the base, which has no classes; name an adapter with a head")
        try:
            labels = _labels(lease.resident)
            logits = await engine.classify(rows, lease)
        finally:
            lease.release()
        data = [_classified(index, one, labels) for index, one in enumerate(logits)]
        usage = _counted(http, rows)
        return ClassifiedList(
            id=fresh_id("classify"), created=int(time.time()), model=body.model, data=data, usage=usage
        )

    refusals = responses(400, 403, 404, 413, 422)
    for path, route, model in (
        ("/v1/embeddings", embeddings, EmbeddingList),
        ("/v1/classify", classify, ClassifiedList),
    ):
        router.add_api_route(path, route, methods=["POST"], response_model=model, responses=refusals)
    return router


def _rows(words: Words, engine: RowEngine, texts: Sequence[str] | Sequence[list[int]]) -> list[Encoded]:
    if len(texts) > MOST_ROWS:
        raise AnswerError(f"at most {MOST_ROWS} texts may come at once, got {len(texts)}; send several bodies")
    rows = [words.encode(one) if isinstance(one, str) else one for one in texts]
    for row in rows:
        if not 0 < len(row) <= engine.context:
            raise AnswerError(f"a text must have from 1 to {engine.context} tokens, got {len(row)}; send another one")
        if not all(0 <= token < engine.vocabulary for token in row):
            raise AnswerError(f"a text has tokens that are not from 0 to {engine.vocabulary - 1}; use its tokenizer")
    return rows


def _counted(http: Http, rows: Sequence[Encoded]) -> Usage:
    http.state.prompt_tokens = count = sum(map(len, rows))
    return Usage(prompt_tokens=count, total_tokens=count)


def _packed(vector: Sequence[float]) -> str:
    """float32, little-endian, as base64."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _labels(resident: Any) -> list[str]:
    """The classes of an adapter, in the order of its head.

    Raises:
        AnswerError: it was trained for something else.
    """
    labels = resident.spec.task.get("labels")
    if not resident.extra or not labels:
        raise AnswerError(f"{resident.name!r} was not trained to tell classes; name an adapter with a head")
    return [str(one) for one in labels]


def _classified(index: int, logits: Sequence[float], labels: Sequence[str]) -> Classified:
    most = max(logits)
    chances = [exp(one - most) for one in logits]
    probs = [one / sum(chances) for one in chances]
    label = labels[probs.index(max(probs))]
    return Classified(index=index, label=label, probs=probs, num_classes=len(probs), labels=[*labels])

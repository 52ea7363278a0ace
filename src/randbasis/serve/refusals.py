"""ERROR → STATUS: every refusal as OpenAI's error body, with the message of this package."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.requests import Request
from fastapi.responses import JSONResponse

from randbasis.errors import (
    AdapterRefusedError,
    AnswerError,
    BankFullError,
    EngineStoppedError,
    NotStoredError,
    QueueFullError,
    RandbasisError,
    SettingError,
    StoreAccessError,
    StoreLockedError,
    StoreNameError,
)
from randbasis.serve.bodies import ErrorBody

_LOG = logging.getLogger("randbasis.serve")
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    422: "adapter_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
_STATUS: tuple[tuple[type[RandbasisError], int, str], ...] = (
    (NotStoredError, 404, "model_not_found"),
    (StoreNameError, 404, "model_not_found"),
    (AnswerError, 400, "invalid_value"),
    (SettingError, 400, "invalid_value"),
    (AdapterRefusedError, 422, "adapter_refused"),
    (QueueFullError, 429, "queue_full"),
    (BankFullError, 503, "bank_full"),
    (EngineStoppedError, 503, "stopped"),
    (StoreLockedError, 503, "store_locked"),
    (StoreAccessError, 503, "store_unreadable"),
)
_SECONDS = "1"
"""After which a client of a full queue or a full bank may try again."""


def responses(*more: int) -> dict[int | str, dict[str, Any]]:
    """The refusals that a route documents: those of every route that needs a key, and its own."""
    return {status: {"model": ErrorBody, "description": _KINDS[status]} for status in sorted({401, 429, 503, *more})}


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's."""
    return {"error": {"message": message, "type": _KINDS.get(status, "server_error"), "param": param, "code": code}}


def refusal(
    status: int,
    message: str,
    code: str | None = None,
    *,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """A response that says what is wrong."""
    return JSONResponse(error_body(status, message, code, param), status, headers)


def status_of(error: RandbasisError) -> tuple[int, str]:
    """Status and code; what no rule names is the server's fault."""
    return next(((status, code) for kind, status, code in _STATUS if isinstance(error, kind)), (500, "internal"))


def add_handlers(app: FastAPI) -> None:
    """Tell every error of the app so."""
    app.add_exception_handler(RandbasisError, _ours)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    for status in (400, 404, 405):  # which starlette raises as exceptions of its own
        app.add_exception_handler(status, _http)
    app.add_exception_handler(Exception, _unexpected)


def _ours(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RandbasisError)
    status, code = status_of(error)
    if status == 500:
        _LOG.error("%s %s", request.url.path, error, exc_info=error)
    headers = {"Retry-After": _SECONDS} if status in (429, 503) else None
    return refusal(status, str(error), code, headers=headers)


def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = jsonable_encoder(error.errors())[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    said = str(first["msg"]).removeprefix("Value error, ")
    return refusal(400, f"{where}: {said}" if where else said, str(first["type"]), param=where or None)


def _http(request: Request, error: Exception) -> JSONResponse:
    status = getattr(error, "status_code", 500)
    detail = str(getattr(error, "detail", error))
    if status == 404:
        detail = f"there is no {request.method} {request.url.path}; /openapi.json has the routes"
    elif status == 405:
        detail = f"{request.url.path} does not take {request.method}"
    elif status == 400:
        detail = "the body must be a JSON document in UTF-8"
    return refusal(status, detail, headers=getattr(error, "headers", None))


def _unexpected(request: Request, error: Exception) -> JSONResponse:
    _LOG.error("%s failed", request.url.path, exc_info=error)
    return refusal(500, "something went wrong in the server, which its log tells", "internal")

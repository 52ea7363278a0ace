"""The app: every route, behind the gate."""

from fastapi import APIRouter, FastAPI
from fastapi import Request as Http
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

import randbasis
from randbasis.errors import AnswerError
from randbasis.serve.bodies import Health, LoadBody, ModelCard, ModelList, UnloadBody
from randbasis.serve.encoder_routes import encoder_routes
from randbasis.serve.gate import Gate
from randbasis.serve.keys import KeyRing
from randbasis.serve.page_routes import page_routes
from randbasis.serve.refusals import add_handlers, responses
from randbasis.serve.service import Service, key_of
from randbasis.serve.text_routes import text_routes

_TEXT = "text/plain; version=0.0.4; charset=utf-8"


def make_app(service: Service, keys: KeyRing, *, max_body: int) -> FastAPI:
    """The server as an app of ASGI.

    Args:
        service: what it stands on.
        keys: who may ask.
        max_body: most bytes of a body.
    """
    # No /docs: its page would fetch scripts from elsewhere.
    app = FastAPI(title="randbasis", version=randbasis.__version__, docs_url=None, redoc_url=None)
    add_handlers(app)
    for router in (text_routes(service), encoder_routes(service), _own_routes(service), page_routes()):
        app.include_router(router)
    app.add_middleware(
        Gate,  # pyright: ignore[reportArgumentType] # starlette's types of ASGI are its own
        keys=keys,
        metrics=service.metrics,
        max_body=max_body,
    )
    return app


def _own_routes(service: Service) -> APIRouter:
    router = APIRouter()

    async def health() -> Response:
        """Whether requests are answered; needs no key."""
        status = "failed" if service.fault else "draining" if service.draining else "ok"
        told = Health(status=status, reason=service.fault)
        return JSONResponse(told.model_dump(), 200 if status == "ok" else 503)

    async def models(http: Http) -> ModelList:
        """What the key may name."""
        return ModelList(data=await run_in_threadpool(_cards, service, http))

    async def metrics() -> Response:
        """Numbers in Prometheus' text format."""
        return Response(service.metrics.page(), headers={"Content-Type": _TEXT})

    async def load(http: Http, body: LoadBody) -> Response:
        """Make an adapter of a packed file, or of an entry of the store, resident under a name."""
        _check_scope(http, body.lora_name)
        await run_in_threadpool(service.adapters.load, body.lora_name, body.lora_path, key_of(http).may_use)
        return Response(f"Success: LoRA adapter '{body.lora_name}' added.", media_type="text/plain")

    async def unload(http: Http, body: UnloadBody) -> Response:
        """Take out what was loaded so; requests that run keep it."""
        _check_scope(http, body.lora_name)
        await run_in_threadpool(service.adapters.unload, body.lora_name)
        return Response(f"Success: LoRA adapter '{body.lora_name}' removed.", media_type="text/plain")

    said = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
    admin = {**said, **responses(400, 403, 404, 413, 422)}
    unwell = {503: {"model": Health, "description": "No requests are answered."}}
    router.add_api_route("/health", health, response_model=Health, responses={**unwell})
    router.add_api_route("/v1/models", models, response_model=ModelList, responses=responses())
    router.add_api_route("/metrics", metrics, response_class=Response, responses={**said, **responses()})
    for path, route in (("/v1/load_lora_adapter", load), ("/v1/unload_lora_adapter", unload)):
        router.add_api_route(path, route, methods=["POST"], response_class=Response, responses=admin)
    return router


def _cards(service: Service, http: Http) -> list[ModelCard]:
    key, base = key_of(http), service.adapters.base
    cards = [ModelCard(id=base, created=service.created, root=base)] if key.may_use(base) else []
    return cards + [
        ModelCard(
            id=one.name,
            created=one.created or service.created,
            root=one.name,
            parent=base,
            version=one.version,
            method=one.method,
            bytes=one.nbytes,
            resident=one.resident,
        )
        for one in service.adapters.listed()
        if key.may_use(one.name)
    ]


def _check_scope(http: Http, name: str) -> None:
    if not key_of(http).may_use(name):
        raise AnswerError(f"lora_name must be one that the key may name, got {name!r}; ask who runs the server")

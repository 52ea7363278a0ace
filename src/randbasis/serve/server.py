"""SETTINGS → A RUNNING SERVER, and its end: told to stop, it takes no more and answers what it took."""

import logging
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from transformers import AutoModel, AutoModelForCausalLM

from randbasis.adapters.base_model import auto_class, read_config
from randbasis.serve.adapters import Adapters
from randbasis.serve.app import make_app
from randbasis.serve.batching import BatchSettings
from randbasis.serve.decoder_bank import DecoderBank
from randbasis.serve.encoding import EncoderEngine
from randbasis.serve.engine import Engine
from randbasis.serve.gate import ACCESS
from randbasis.serve.keys import KeyRing
from randbasis.serve.metrics import Metrics
from randbasis.serve.service import Service, Words
from randbasis.serve.settings import CACHE_TOKENS, ServeSettings
from randbasis.serve.views import EncoderViews
from randbasis.store import AdapterStore
from randbasis.train.classification import allowed_length, pad_id
from randbasis.train.machine import torch_device
from randbasis.train.model_reading import read_model, read_tokenizer

_LOG = logging.getLogger("randbasis.serve")


class RunningService:
    """A base model with its bank and its engine, ready to answer.

    Args:
        settings: how.
        share_blocks: of the cache; see :class:`BatchSettings`.

    Attributes:
        service: what the routes stand on.
        keys: who may ask.
        bank: the adapters in memory.

    Raises:
        DataMissingError: the base cannot be read.
        RegistrationError: the installed transformers has another continuous batching than is needed.
        StoreMissingError: there is no store.
        KeysError: the file of keys is none.
    """

    def __init__(self, settings: ServeSettings, *, share_blocks: bool = False) -> None:
        settings.check()
        self.settings = settings
        with ExitStack() as on_failure:
            self.keys = KeyRing(Path(settings.keys))
            store = None
            if settings.store is not None:
                store = on_failure.enter_context(AdapterStore(settings.store, create=False))
            tokenizer = read_tokenizer(settings.model)
            decoder = auto_class(read_config(settings.model)) is AutoModelForCausalLM
            model = _model(settings, decoder)
            metrics = Metrics()
            sizes: dict[str, Any] = {"row_bytes": settings.row_bytes, "expanded_bytes": settings.expanded_bytes}
            self.bank: Any = DecoderBank(model, **sizes) if decoder else EncoderViews(model, **sizes)
            folder = None if settings.adapter_folder is None else Path(settings.adapter_folder)
            adapters = Adapters(self.bank, store, settings.base, folder)
            self.engine: Any
            if decoder:
                batch = _batch(settings, model.device, share_blocks)
                self.engine = Engine(model, tokenizer, self.bank, batch, queue=settings.queue, metrics=metrics)
            else:
                self.engine = EncoderEngine(
                    self.bank,
                    padding=pad_id(tokenizer),
                    context=allowed_length(tokenizer, model.config),
                    max_batch_tokens=settings.max_batch_tokens,
                    queue=settings.queue,
                )
            on_failure.callback(self.engine.stop)
            metrics.watch(self.engine.counts)
            metrics.watch_bank(self.bank.stats)
            writer, reader = (self.engine, None) if decoder else (None, self.engine)
            self.service = Service(adapters, Words(tokenizer), metrics, writer, reader)
            self._open = on_failure.pop_all()

    def app(self) -> FastAPI:
        """The server as an app of ASGI; see :func:`make_app`."""
        return make_app(self.service, self.keys, max_body=self.settings.max_body)

    def close(self) -> None:
        """End the engine, and close the store."""
        self.service.draining = True
        self._open.close()


class HttpServer(uvicorn.Server):
    """uvicorn, which says to the service that it is told to stop before it closes its connections.

    Args:
        running: what answers.
        app: of it.
    """

    def __init__(self, running: RunningService, app: FastAPI) -> None:
        settings = running.settings
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
            )
        )
        self._running = running

    def drain(self) -> None:
        """Take no more requests, answer those that there are, then end."""
        self._running.service.draining = True
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """SIGTERM and Ctrl-C drain; a second one ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            if self.should_exit:
                self.force_exit = True
            self.drain()

        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def url(self) -> str:
        """Where it listens, once it started."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def startup(self, sockets: Any = None) -> None:
        """As uvicorn's; then say where it listens, and to whom."""
        await super().startup(sockets)
        if self.started:
            _LOG.info("listening on %s", self.url)
            if not self._running.keys.needed:
                _LOG.warning(
                    "no keys: whoever reaches %s may ask for anything; `randbasis keys add` makes one", self.url
                )


def run(settings: ServeSettings) -> None:
    """Serve until told to stop.

    Raises:
        RandbasisError: it cannot be started; see :class:`RunningService`.
        SystemExit: the address cannot be listened on.
    """
    log_to_error_stream()
    running = RunningService(settings)
    try:
        HttpServer(running, running.app()).run()
    finally:
        running.close()


def log_to_error_stream() -> None:
    """Messages as text and the access log as JSON, one line each, on the error stream."""
    for logger, form in ((_LOG, "%(levelname)s: %(message)s"), (ACCESS, "%(message)s")):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(form))
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO)


def _model(settings: ServeSettings, decoder: bool) -> Any:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    auto = AutoModelForCausalLM if decoder else AutoModel
    options: dict[str, Any] = {"attn_implementation": "sdpa"} if decoder else {}
    model, _ = read_model(auto, settings.model, settings.dtype, complete=True, **options)
    return model.to(torch_device(settings.device)).eval()


def _batch(settings: ServeSettings, device: torch.device, share_blocks: bool) -> BatchSettings:
    cache = settings.cache_tokens or (CACHE_TOKENS if device.type == "cpu" else None)
    page = 16 if device.type == "cpu" else 256
    return BatchSettings(settings.max_batch_tokens, cache_tokens=cache, page_size=page, share_blocks=share_blocks)

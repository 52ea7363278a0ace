"""A server on a free port in a thread of the test, adapters in a store for it, and what they answer alone."""

import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import randbasis
from randbasis.adapter_file import Base, PackedAdapter, Spec, SpecMatrix, group_matrices
from randbasis.methods import Method, Nola, RandLora, Vera
from randbasis.serve.server import HttpServer, RunningService
from randbasis.serve.settings import ServeSettings
from randbasis.store import AdapterStore

METHODS: tuple[Method, ...] = (
    Nola(r=2, num_basis=6, alpha=4.0),
    Vera(r=8),
    RandLora(r=4),
)


def linears(model: Any, words: Sequence[str] = ("q_proj", "v_proj")) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in model.named_modules() if name.rpartition(".")[2] in words]


def random_adapter(
    model: Any,
    seed: int,
    *,
    method: Method | None = None,
    size: float = 0.5,
    words: Sequence[str] = ("q_proj", "v_proj"),
) -> PackedAdapter:
    """An adapter of random coefficients that changes what the model says."""
    method = method or METHODS[seed % len(METHODS)]
    matrices = [
        SpecMatrix(name, "", 0, layer.out_features, layer.out_features, layer.in_features, method)
        for name, layer in linears(model, words)
    ]
    spec = Spec(method, Base("base", model.config.model_type), group_matrices(matrices), 32)
    values = torch.randn(spec.count, generator=torch.Generator().manual_seed(seed)) * size
    return PackedAdapter.of(spec, values)


@dataclass
class Alone:
    """The base and its adapters one at a time: what a server must answer."""

    model: Any
    tokenizer: Any

    @classmethod
    def of(cls, folder: str) -> "Alone":
        return cls(AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))

    def tokens(self, adapter: PackedAdapter | None, prompt: str | Sequence[int], count: int) -> list[int]:
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else [*prompt]
        model = self.model if adapter is None else randbasis.put(self.model, adapter)
        try:
            with torch.no_grad():
                found = model.generate(input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=count)
        finally:
            if adapter is not None:
                self.model = model.unload()
        return found[0, len(ids) :].tolist()

    def text(self, adapter: PackedAdapter | None, prompt: str, count: int) -> str:
        """The answer as the continuation of its prompt."""
        ids = self.tokenizer(prompt)["input_ids"]
        whole = self.tokenizer.decode(ids + self.tokens(adapter, prompt, count), skip_special_tokens=True)
        return whole[len(self.tokenizer.decode(ids, skip_special_tokens=True)) :]


@dataclass
class Served:
    """A server that runs."""

    url: str
    running: RunningService
    server: HttpServer

    def openai(self, key: str = "none", **options: Any) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)


@contextmanager
def serving(model: str, store: Path | None, *, share_blocks: bool = False, **options: Any) -> Generator[Served]:
    """A server on a free port."""
    options = {"keys": "no-keys-here.json", "device": "cpu", "port": 0, **options}
    settings = ServeSettings(model, None if store is None else str(store), **options)
    running = RunningService(settings, share_blocks=share_blocks)
    server = HttpServer(running, running.app())
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < until
            time.sleep(0.01)
        yield Served(server.url, running, server)
    finally:
        server.drain()
        thread.join(30)
        running.close()


def store_of(path: Path, adapters: dict[str, PackedAdapter]) -> Path:
    with AdapterStore(path) as store:
        for name, adapter in adapters.items():
            store.add(name, adapter)
    return path

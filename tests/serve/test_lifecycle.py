"""Versions, damage, clients that go, queues, and the end: what the server keeps while things change under it."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from served import Alone, Served, random_adapter, serving, store_of

from randbasis.adapter_file import PackedAdapter
from randbasis.methods import Nola
from randbasis.serve.requests import Request
from randbasis.store import AdapterStore

PROMPT = "Once upon a time"
BASE = "llama_stories260k"


@pytest.fixture
def own(base: str, users: dict[str, PackedAdapter], tmp_path: Path) -> Iterator[tuple[Served, Path]]:
    """A server with a store of its own."""
    path = store_of(tmp_path / "own.db", users)
    with serving(base, path, adapter_folder=str(tmp_path), queue=8) as served:
        yield served, path


def text(client: openai.OpenAI, model: str, count: int = 8, **options: Any) -> str:
    asked: dict[str, Any] = {"model": model, "prompt": PROMPT, "max_tokens": count, "temperature": 0, **options}
    return client.completions.create(**asked).choices[0].text


def wait_for(true: Callable[[], object], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def idle(served: Served) -> bool:
    """No request is known, and no adapter is leased."""
    leases = [one.leases for one in served.running.bank.residents()]
    return served.running.engine.counts() == (0, 0) and not any(leases)


# --- versions ---


def test_a_new_version_is_served_from_the_next_request_while_a_running_one_ends_on_its_own(
    own: tuple[Served, Path], alone: Alone, users: dict[str, PackedAdapter]
):
    served, path = own
    client, newer = served.openai(), random_adapter(alone.model, 101, method=users["acme/b"].spec.method)
    expected = {"old": alone.text(users["acme/b"], PROMPT, 300), "new": alone.text(newer, PROMPT, 8)}
    stream = client.completions.create(model="acme/b", prompt=PROMPT, max_tokens=300, temperature=0, stream=True)
    running = next(stream).choices[0].text
    with AdapterStore(path) as store:
        store.add("acme/b", newer)
    assert text(client, "acme/b") == expected["new"] != expected["old"][: len(expected["new"])]
    assert text(client, "acme/b@1") == alone.text(users["acme/b"], PROMPT, 8)
    assert running + "".join(chunk.choices[0].text for chunk in stream) == expected["old"]
    with AdapterStore(path) as store:
        store.rollback("acme/b")
    assert text(client, "acme/b@2") == expected["new"]
    assert text(client, "acme/b") == alone.text(users["acme/b"], PROMPT, 8)
    with AdapterStore(path) as store:
        store.remove("acme/b")
    for name in ("acme/b", "acme/b@1", "acme/b@2"):
        with pytest.raises(openai.NotFoundError):
            text(client, name)
    wait_for(lambda: idle(served))


def test_an_adapter_that_is_loaded_stands_before_the_store(
    own: tuple[Served, Path], alone: Alone, users: dict[str, PackedAdapter], tmp_path: Path
):
    served, _ = own
    client, other = served.openai(), random_adapter(alone.model, 102)
    other.write(tmp_path / "other.safetensors")

    def post(what: str, **body: str) -> httpx.Response:
        return httpx.post(f"{served.url}/v1/{what}_lora_adapter", json=body)

    loaded = post("load", lora_name="acme/a", lora_path="other.safetensors")
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'acme/a' added.")
    assert text(client, "acme/a") == alone.text(other, PROMPT, 8)
    assert post("load", lora_name="acme/a", lora_path="store:acme/c").status_code == 200
    assert text(client, "acme/a") == alone.text(users["acme/c"], PROMPT, 8)
    assert [one.id for one in client.models.list()].count("acme/a") == 1
    assert post("unload", lora_name="acme/a").status_code == 200
    assert text(client, "acme/a") == alone.text(users["acme/a"], PROMPT, 8)
    assert post("unload", lora_name="acme/a").status_code == 404
    for source in ("nothing.safetensors", "store:nothing", "store:acme/a@9", "/etc/passwd\0"):
        assert post("load", lora_name="x", lora_path=source).status_code in (400, 404), source
    for source in ("/etc/passwd", "../../../etc/passwd", str(Path(sys.executable))):
        assert post("load", lora_name="x", lora_path=source).status_code == 400, source
    for name in (BASE, f"{BASE}:x", "x@3", " "):
        assert post("load", lora_name=name, lora_path="other.safetensors").status_code == 400, name


def test_without_a_folder_no_file_is_loaded(served: Served):
    body = {"lora_name": "x", "lora_path": "/etc/passwd"}
    found = httpx.post(f"{served.url}/v1/load_lora_adapter", json=body)
    assert found.status_code == 400
    assert "--adapter-folder" in found.json()["error"]["message"]


# --- damage ---


def test_a_bad_adapter_is_its_own_users_422(own: tuple[Served, Path], alone: Alone, users: dict[str, PackedAdapter]):
    served, path = own
    client = served.openai()
    narrow = random_adapter(alone.model, 1, words=("gate_proj",))
    for one in narrow.spec.groups:
        assert one.like.out_features != one.like.in_features
    ends = random_adapter(alone.model, 3, method=Nola(r=2, num_basis=4, alpha=1.0), words=("lm_head",))
    with AdapterStore(path) as store:
        store.add("bad/ends", ends)
        store.add("bad/base", other_base(alone, 4))
        store.add("bad/blob", random_adapter(alone.model, 200))
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(
            "UPDATE blobs SET content = zeroblob(100) WHERE id = (SELECT blob FROM adapters WHERE name = 'bad/blob')"
        )
    connection.close()
    stream = client.completions.create(model="acme/a", prompt=PROMPT, max_tokens=200, temperature=0, stream=True)
    running = next(stream).choices[0].text
    for name in ("bad/blob", "bad/base", "bad/ends", "bad/blob"):
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            text(client, name)
        assert refused.value.code == "adapter_refused"
    assert running + "".join(chunk.choices[0].text for chunk in stream) == alone.text(users["acme/a"], PROMPT, 200)
    assert httpx.get(f"{served.url}/health").status_code == 200
    wait_for(lambda: idle(served))


def other_base(alone: Alone, seed: int) -> PackedAdapter:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    return random_adapter(LlamaForCausalLM(config), seed)


def test_what_goes_wrong_in_one_request_is_that_requests(
    own: tuple[Served, Path], alone: Alone, monkeypatch: pytest.MonkeyPatch
):
    served, _ = own
    client, engine = served.openai(), served.running.engine
    take = engine._go_on

    def fail(request: Request, output: Any) -> None:
        if len(request.tokens) == 2 and request.sampling.max_tokens == 7:
            raise ZeroDivisionError
        take(request, output)

    monkeypatch.setattr(engine, "_go_on", fail)
    stream = client.completions.create(model=BASE, prompt=PROMPT, max_tokens=60, temperature=0, stream=True)
    with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
        text(client, "acme/a", 7)
    with pytest.raises(openai.APIError, match="ZeroDivisionError"):
        list(client.completions.create(model="acme/a", prompt=PROMPT, max_tokens=7, stream=True))
    assert "".join(chunk.choices[0].text for chunk in stream) == alone.text(None, PROMPT, 60)
    wait_for(lambda: idle(served))


def test_when_the_engine_ends_everybody_is_told(own: tuple[Served, Path], monkeypatch: pytest.MonkeyPatch):
    served, _ = own
    client = served.openai()

    def fail(runs: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(served.running.bank, "tokens", fail)
    with pytest.raises(openai.InternalServerError, match="no memory"):
        text(client, "acme/a")
    with pytest.raises(openai.InternalServerError, match="no memory"):
        text(client, BASE)
    health = httpx.get(f"{served.url}/health")
    assert (health.status_code, health.json()["status"]) == (503, "failed")
    assert "no memory" in health.json()["reason"]
    wait_for(lambda: idle(served))


# --- clients that go, and too many ---


def test_a_client_that_goes_frees_its_place_and_its_adapter(own: tuple[Served, Path]):
    served, _ = own
    client = served.openai()
    for model in ("acme/a", BASE):
        stream = client.completions.create(model=model, prompt=PROMPT, max_tokens=500, stream=True, n=2)
        next(stream)
        assert not idle(served)
        stream.close()
        wait_for(lambda: idle(served), 20)
    body = {"model": "acme/b", "prompt": PROMPT, "max_tokens": 500, "n": 8}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/completions", json=body, timeout=httpx.Timeout(30, read=0.1))
    wait_for(lambda: idle(served), 20)
    page = httpx.get(f"{served.url}/metrics").text
    assert 'randbasis_answers_total{finish="cancelled"}' in page


def test_a_full_queue_is_a_429_and_leaves_nothing_behind(own: tuple[Served, Path]):
    served, _ = own
    client = served.openai()
    streams = [
        client.completions.create(model="acme/a", prompt=PROMPT, max_tokens=400, stream=True, n=4) for _ in range(2)
    ]
    with pytest.raises(openai.RateLimitError) as refused:
        text(client, "acme/b")
    assert refused.value.response.headers["retry-after"] == "1"
    assert refused.value.code == "queue_full"
    for stream in streams:
        stream.close()
    wait_for(lambda: idle(served))
    assert text(client, "acme/b")


def test_a_bank_that_is_full_of_adapters_in_use_is_a_503(base: str, store: Path, users: dict[str, PackedAdapter]):
    biggest = max(4 * one.spec.count for one in users.values())
    with serving(base, store, row_bytes=biggest) as served:
        client = served.openai()
        text(client, "acme/a")
        (resident,) = served.running.bank.residents()
        in_use = served.running.bank.lease(resident.name)
        statuses = set[int]()
        for name in users:
            try:
                text(client, name)
                statuses.add(200)
            except openai.APIStatusError as error:
                statuses.add(error.status_code)
        assert 503 in statuses
        in_use.release()
        wait_for(lambda: idle(served))
        assert all(text(client, name) for name in users), "they take turns"
        assert served.running.bank.stats()["evictions"] > 0


# --- the end ---


def command(base: str, store: Path, *more: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "randbasis", "serve", "--model", base, "--store", str(store), "--port", "0"]
    words += ["--threads", "1", "--device", "cpu", "--keys", str(store.parent / "none.json"), *more]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def listening(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if "listening on " in line:
            return line.rsplit(" ", 1)[1].strip()
    raise AssertionError("it ended before it listened")


def test_sigterm_answers_what_runs_and_takes_no_more(
    base: str, store: Path, alone: Alone, users: dict[str, PackedAdapter]
):
    process = command(base, store)
    try:
        url = listening(process)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        found: list[str] = []

        def ask() -> None:
            asked: dict[str, Any] = {"model": "acme/a", "prompt": PROMPT, "max_tokens": 400, "temperature": 0}
            found.extend(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))

        thread = threading.Thread(target=ask)
        thread.start()
        wait_for(lambda: found, 30)
        process.send_signal(signal.SIGTERM)
        thread.join(30)
        assert "".join(found) == alone.text(users["acme/a"], PROMPT, 400)
        assert process.wait(30) == 0
        host, port = url.removeprefix("http://").split(":")
        with pytest.raises(ConnectionError):
            socket.create_connection((host, int(port)), 2)
        assert process.stderr is not None
        lines = [json.loads(line) for line in process.stderr if line.startswith("{")]
        assert [(line["status"], line["tokens"]) for line in lines] == [(200, 400)]
    finally:
        process.kill()
        process.communicate()


def test_what_cannot_be_started_says_why(base: str, store: Path, tmp_path: Path):
    for more, said in (
        (("--store", str(tmp_path / "none.db")), "there is no store"),
        (("--max-batch-tokens", "1"), "--max-batch-tokens must be at least 8, got 1"),
        (("--model", str(tmp_path / "nothing")), "nothing"),
    ):
        process = command(base, store, *more)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2, errors
        assert said in errors
        assert "Traceback" not in errors

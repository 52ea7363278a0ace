"""Every route for everybody who may come, as one table; and how fast they may."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Served, serving

from randbasis.serve.keys import add_key, remove_key

BASE = "llama_stories260k"
WHO = ("nobody", "wrong", "other", "read", "admin")
ASK = {"prompt": "Once", "max_tokens": 1}
#: Route and body → the status for nobody, a wrong key, another tenant's key, the tenant's, an admin's.
TABLE: list[tuple[str, str, Any, tuple[int, ...]]] = [
    ("GET", "/health", None, (200, 200, 200, 200, 200)),
    ("GET", "/v1/models", None, (401, 401, 200, 200, 200)),
    ("GET", "/metrics", None, (401, 401, 200, 200, 200)),
    ("GET", "/openapi.json", None, (401, 401, 200, 200, 200)),
    ("GET", "/", None, (200, 200, 200, 200, 200)),
    ("GET", "/docs", None, (401, 401, 404, 404, 404)),
    ("GET", "/nothing", None, (401, 401, 404, 404, 404)),
    ("POST", "/health", None, (405, 405, 405, 405, 405)),
    ("POST", "/v1/completions", {"model": "acme/a", **ASK}, (401, 401, 404, 200, 200)),
    ("POST", "/v1/completions", {"model": "acme/a@1", **ASK}, (401, 401, 404, 200, 200)),
    ("POST", "/v1/completions", {"model": f"{BASE}:acme/a", **ASK}, (401, 401, 404, 200, 200)),
    ("POST", "/v1/completions", {"model": "acme/a", "stream": True, **ASK}, (401, 401, 404, 200, 200)),
    ("POST", "/v1/completions", {"model": "other/a", **ASK}, (401, 401, 200, 404, 200)),
    ("POST", "/v1/completions", {"model": "acme/nothing", **ASK}, (401, 401, 404, 404, 404)),
    ("POST", "/v1/completions", {"model": BASE, **ASK}, (401, 401, 404, 404, 200)),
    ("POST", "/v1/completions", {"model": "acme/a"}, (401, 401, 400, 400, 400)),
    ("POST", "/v1/completions", b"{", (401, 401, 400, 400, 400)),
    ("POST", "/v1/chat/completions", {"model": "acme/a", "messages": [{"role": "user", "content": "a"}]},
     (401, 401, 404, 400, 400)),
    ("POST", "/v1/embeddings", {"model": "acme/a", "input": "a"}, (401, 401, 400, 400, 400)),
    ("POST", "/v1/classify", {"model": "acme/a", "input": "a"}, (401, 401, 400, 400, 400)),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "acme/x", "lora_path": "store:acme/a@1"},
     (401, 401, 403, 403, 200)),
    ("POST", "/v1/load_lora_adapter", b"{", (401, 401, 403, 403, 400)),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "acme/x"}, (401, 401, 403, 403, 200)),
    ("GET", "/v1/load_lora_adapter", None, (401, 401, 403, 403, 405)),
]  # fmt: skip


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    secrets = {
        "other": add_key(path, "other", ["other/*"], None, "read")[1],
        "read": add_key(path, "acme", ["acme/*"], None, "read")[1],
        "admin": add_key(path, "ops", ["*"], None, "admin")[1],
        "wrong": "rb-" + "A" * 43,
    }
    return path, secrets


@pytest.fixture(scope="module")
def locked(base: str, store: Path, keys: tuple[Path, dict[str, str]]) -> Iterator[Served]:
    with serving(base, store, keys=str(keys[0])) as served:
        yield served


def ask(served: Served, method: str, path: str, body: Any, key: str | None) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    sent: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body} if body is not None else {}
    return httpx.request(method, f"{served.url}{path}", headers=headers, timeout=30, **sent)


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"), TABLE, ids=[f"{m} {p} {str(b)[:50]}" for m, p, b, _ in TABLE]
)
def test_who_may_what(
    method: str,
    path: str,
    body: Any,
    expected: tuple[int, ...],
    locked: Served,
    keys: tuple[Path, dict[str, str]],
):
    found = [ask(locked, method, path, body, keys[1].get(who)) for who in WHO]
    assert tuple(one.status_code for one in found) == expected
    for one in found:
        if one.status_code >= 400:
            assert one.json()["error"]["message"]
        if one.status_code == 401:
            assert one.headers["www-authenticate"] == "Bearer"


def test_every_route_is_in_the_table(locked: Served, keys: tuple[Path, dict[str, str]]):
    schema = ask(locked, "GET", "/openapi.json", None, keys[1]["admin"]).json()
    known = {(method.upper(), path) for path, methods in schema["paths"].items() for method in methods}
    assert known <= {(method, path) for method, path, _, _ in TABLE}


def test_a_list_tells_only_what_the_key_may_use(locked: Served, keys: tuple[Path, dict[str, str]]):
    def listed(who: str) -> set[str]:
        return {one["id"] for one in ask(locked, "GET", "/v1/models", None, keys[1][who]).json()["data"]}

    assert listed("read") == {"acme/a", "acme/b", "acme/c"}
    assert listed("other") == {"other/a", "other/b", "other/c"}
    assert listed("admin") == {BASE, *listed("read"), *listed("other")}


def test_what_is_not_allowed_looks_like_what_is_not_there(locked: Served, keys: tuple[Path, dict[str, str]]):
    bodies = [{"model": name, **ASK} for name in ("acme/nothing", "other/a")]
    missing, forbidden = (ask(locked, "POST", "/v1/completions", body, keys[1]["read"]).json() for body in bodies)
    assert str(missing).replace("acme/nothing", "X") == str(forbidden).replace("other/a", "X")


@pytest.mark.parametrize(
    "headers",
    [
        [("Authorization", "Basic {}")],
        [("Authorization", "{}")],
        [("Authorization", "Bearer")],
        [("Authorization", "Bearer {} x")],
        [("Authorization", "Bearer {}"), ("Authorization", "Bearer {}")],
        [("X-Api-Key", "{}")],
        [("Authorization", "Bearer \xff")],
    ],
)
def test_a_key_is_given_in_one_way(headers: list[tuple[str, str]], locked: Served, keys: tuple[Path, dict[str, str]]):
    sent = [(name.encode(), value.format(keys[1]["admin"]).encode("latin-1")) for name, value in headers]
    assert httpx.get(f"{locked.url}/v1/models", headers=sent).status_code == 401


def test_a_key_in_the_address_is_none(locked: Served, keys: tuple[Path, dict[str, str]]):
    assert httpx.get(f"{locked.url}/v1/models?key={keys[1]['admin']}").status_code == 401


@pytest.mark.parametrize("path", ["/health/", "//health", "/health%2F", "/HEALTH", "/health;x"])
def test_no_path_slips_past_the_gate(path: str, locked: Served):
    with httpx.Client() as client:
        request = client.build_request("GET", f"{locked.url}/x")
        request.url = request.url.copy_with(raw_path=path.encode())
        assert client.send(request).status_code in (401, 404)
        assert client.send(request).status_code == 401


def test_a_key_that_is_removed_ends_with_the_next_request(locked: Served, keys: tuple[Path, dict[str, str]]):
    _, secret = add_key(keys[0], "short", ["acme/*"], None, "read")
    assert ask(locked, "GET", "/v1/models", None, secret).status_code == 200
    remove_key(keys[0], "short")
    assert ask(locked, "GET", "/v1/models", None, secret).status_code == 401


def test_who_asks_too_fast_waits_as_long_as_is_said(locked: Served, keys: tuple[Path, dict[str, str]]):
    _, secret = add_key(keys[0], "slow", ["acme/*"], "2/s", "read")
    found = [ask(locked, "GET", "/v1/models", None, secret) for _ in range(6)]
    assert [one.status_code for one in found[:2]] == [200, 200]
    refused = [one for one in found if one.status_code == 429]
    assert refused
    assert refused[0].json()["error"]["type"] == "rate_limit_error"
    assert ask(locked, "GET", "/v1/models", None, keys[1]["read"]).status_code == 200, "others go on"
    time.sleep(int(refused[-1].headers["retry-after"]))
    assert ask(locked, "GET", "/v1/models", None, secret).status_code == 200


def test_the_log_names_the_key(locked: Served, keys: tuple[Path, dict[str, str]], caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", "randbasis.serve.access"):
        ask(locked, "GET", "/v1/models", None, keys[1]["read"])
        ask(locked, "GET", "/v1/models", None, keys[1]["wrong"])
        time.sleep(0.2)  # it is written once the answer is sent
    assert '"key": "acme"' in caplog.text
    assert '"key": null' in caplog.text
    assert "rb-" not in caplog.text

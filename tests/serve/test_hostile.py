"""What a client, an operator or an adapter can do to the others: nothing."""

import os
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from served import Alone, Served, random_adapter, serving, store_of

from randbasis.adapter_file import PackedAdapter
from randbasis.errors import AdapterRefusedError, NotStoredError
from randbasis.serve import decoder_bank
from randbasis.serve.adapters import Adapters
from randbasis.serve.decoder_bank import DecoderBank
from randbasis.serve.keys import add_key
from randbasis.store import AdapterStore

PROMPT = "Once upon a time"


def post(served: Served, path: str = "completions", key: str = "none", **body: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    asked = {"model": "acme/a", "prompt": PROMPT, "max_tokens": 4} if path == "completions" else {}
    return httpx.post(f"{served.url}/v1/{path}", json={**asked, **body}, headers=headers, timeout=30)


def text(served: Served, model: str) -> str:
    return post(served, model=model, temperature=0, max_tokens=8).json()["choices"][0]["text"]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30])
def test_the_smallest_temperatures_take_the_most_probable_token(temperature: float, served: Served):
    found = post(served, temperature=temperature, seed=1)
    assert found.status_code == 200, found.text
    assert found.json()["choices"][0]["text"] == post(served, temperature=0).json()["choices"][0]["text"]


def test_half_of_a_character_is_a_400(served: Served):
    body = b'{"model": "acme/a", "prompt": "a\\ud800"}'
    found = httpx.post(f"{served.url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert (found.status_code, "whole characters" in found.text) == (400, True)


def test_no_version_0(served: Served):
    assert post(served, model="acme/a@0").status_code == 404


def test_more_choices_than_the_queue_will_ever_hold_are_a_400_and_not_for_later(served: Served):
    assert post(served, prompt=[PROMPT] * 100, n=16).status_code == 400


def scaled(adapter: PackedAdapter, size: float) -> PackedAdapter:
    return PackedAdapter.of(adapter.spec, torch.full((adapter.spec.count,), size))


def test_an_adapter_whose_sums_overflow_is_a_422_and_nobody_elses(
    base: str, alone: Alone, users: dict[str, PackedAdapter], tmp_path: Path
):
    """What is no number in one run of tokens, attention would spread to all that are packed beside it."""
    wild = {"bad/wild": scaled(users["acme/a"], 1e30), "bad/edge": scaled(users["acme/a"], 9e3)}
    with serving(base, store_of(tmp_path / "wild.db", users | wild)) as served:
        client = served.openai()
        for name, status in (("bad/wild", 422), ("bad/edge", 200)):
            asked = {"model": "acme/b", "prompt": PROMPT, "max_tokens": 200, "temperature": 0}
            stream = client.completions.create(**asked, stream=True)
            running = next(stream).choices[0].text
            assert post(served, model=name).status_code == status
            whole = running + "".join(chunk.choices[0].text for chunk in stream)
            assert whole == alone.text(users["acme/b"], PROMPT, 200), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_module_trained_whole_that_holds_no_numbers_is_refused(
    value: float, alone: Alone, users: dict[str, PackedAdapter]
):
    name, norm = next((name, one) for name, one in alone.model.named_parameters() if name.endswith("norm.weight"))
    sound = next(iter(users.values()))
    extra = {f"base_model.model.{name}": torch.full_like(norm, value).detach()}
    with DecoderBank(alone.model) as bank:
        bank.load("sound", sound.to_bytes())
        with pytest.raises(AdapterRefusedError, match="numbers of at most"):
            bank.load("broken", PackedAdapter.of(sound.spec, sound.values(), extra=extra).to_bytes())
        assert [one.name for one in bank.residents()] == ["sound"]


@pytest.mark.parametrize("stream", [False, True])
def test_logits_that_are_no_numbers_end_their_request(
    stream: bool, base: str, users: dict[str, PackedAdapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(decoder_bank, "LARGEST", float("inf"))
    with serving(base, store_of(tmp_path / "wild.db", users | {"bad/wild": scaled(users["acme/a"], 1e30)})) as served:
        before = text(served, "acme/b")
        for options in ({"temperature": 0}, {"temperature": 1, "top_p": 0.5}, {"logprobs": 2}):
            found = post(served, model="bad/wild", stream=stream, **options)
            assert found.status_code == (200 if stream else 422)
            assert "no finite numbers" in found.text
            assert "adapter_refused" in found.text
        assert text(served, "acme/b") == before
        assert httpx.get(f"{served.url}/health").status_code == 200


def test_an_admin_of_one_tenant_loads_nothing_of_another(base: str, store: Path, tmp_path: Path):
    _, secret = add_key(tmp_path / "keys.json", "ops", ["acme/*"], None, "admin")
    with serving(base, store, keys=str(tmp_path / "keys.json")) as served:

        def load(path: str) -> httpx.Response:
            return post(served, "load_lora_adapter", secret, lora_name="acme/x", lora_path=path)

        assert load("store:acme/a").status_code == 200
        there, absent = load("store:other/a"), load("store:other/z")
        assert (there.status_code, absent.status_code) == (404, 404)
        assert there.text.replace("other/a", "other/z") == absent.text
        told = load("store:acme/a@9").text + load("store:").text
        assert "other/" not in told
        assert str(store) not in told


def test_a_store_that_is_replaced_or_gone(base: str, alone: Alone, users: dict[str, PackedAdapter], tmp_path: Path):
    path = store_of(tmp_path / "s.db", users)
    other = random_adapter(alone.model, 300, method=users["acme/a"].spec.method)
    replacement = store_of(tmp_path / "other.db", {"acme/a": other})
    with serving(base, path) as served:
        assert text(served, "acme/a") == alone.text(users["acme/a"], PROMPT, 8)
        os.replace(replacement, path)
        assert text(served, "acme/a") == alone.text(other, PROMPT, 8) != alone.text(users["acme/a"], PROMPT, 8)
        assert post(served, model="acme/b").status_code == 404
        path.unlink()
        assert post(served).status_code == 503
        assert httpx.get(f"{served.url}/health").status_code == 200


class SlowBank(dict[str, object]):
    """A bank whose loading takes as long as the test wants."""

    def __init__(self, adapter: PackedAdapter) -> None:
        self.begun, self.go_on, self._adapter = threading.Event(), threading.Event(), adapter

    def load(self, name: str, source: Any, *, version: int | None = None, pin: bool = False) -> Any:
        self[name] = self._adapter
        self.begun.set()
        assert self.go_on.wait(10)
        return self._adapter

    def unload(self, name: str) -> Any:
        del self[name]

    def lease(self, name: str) -> Any:
        return self[name]


def test_one_name_loaded_and_unloaded_at_once(alone: Alone, users: dict[str, PackedAdapter], tmp_path: Path):
    with AdapterStore(store_of(tmp_path / "s.db", users)) as store:
        bank = SlowBank(users["acme/a"])
        adapters = Adapters(bank, store, "base")
        bank.go_on.set()
        adapters.load("x", "store:acme/a", lambda _: True)
        bank.begun.clear()
        bank.go_on.clear()
        loading = threading.Thread(target=adapters.load, args=("x", "store:acme/a", lambda _: True))
        loading.start()
        assert bank.begun.wait(10)
        unloading = threading.Thread(target=adapters.unload, args=("x",))
        unloading.start()
        unloading.join(0.1)
        bank.go_on.set()
        loading.join()
        unloading.join()
        with pytest.raises(NotStoredError):
            adapters.lease(adapters.named("x"))
        assert not bank


def test_the_base_is_looked_through_once(
    alone: Alone, users: dict[str, PackedAdapter], monkeypatch: pytest.MonkeyPatch
):
    bank, calls, ends = DecoderBank(alone.model), [], random_adapter(alone.model, 1, words=("lm_head",))
    for name in ("state_dict", "named_modules"):
        own = getattr(alone.model, name)
        monkeypatch.setattr(alone.model, name, lambda *a, n=name, f=own, **k: calls.append(n) or f(*a, **k))
    try:
        for name, user in users.items():
            bank.load(name, user.to_bytes())
        with pytest.raises(AdapterRefusedError, match="tokens come in or go out"):
            bank.load("x", ends.to_bytes())
    finally:
        bank.close()
    assert calls.count("named_modules") == 1
    assert calls.count("state_dict") <= 1


def test_the_openai_client_is_told_whose_fault_it_is(served: Served):
    with pytest.raises(openai.BadRequestError, match="server's queue"):
        served.openai().completions.create(model="acme/a", prompt=[PROMPT] * 100, n=16)

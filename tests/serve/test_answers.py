"""What real clients get: each answer is that of its adapter put on the base alone."""

import concurrent.futures
import json
import shutil
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from served import Alone, Served, serving

from randbasis.adapter_file import PackedAdapter

PROMPT = "Once upon a time"
BASE = "llama_stories260k"


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return served.openai()


def test_a_mixed_load_is_each_adapter_alone(client: openai.OpenAI, alone: Alone, users: dict[str, PackedAdapter]):
    """Base and six adapters of three methods, prompts of many lengths, all at once, in streams and whole."""
    prompts = ["Once", PROMPT, f"{PROMPT}, there was a little girl named Lily. " * 4, "The dog saw a big red ball."]
    asked = [(name, prompt) for prompt in prompts for name in (BASE, *users)]
    expected = {(name, prompt): alone.text(users.get(name), prompt, 14) for name, prompt in asked}
    assert len({*expected.values()}) > 20, "adapters and prompts must matter"

    def ask(one: tuple[str, str], stream: bool) -> str:
        options: dict[str, Any] = {"model": one[0], "prompt": one[1], "max_tokens": 14, "temperature": 0}
        if not stream:
            return client.completions.create(**options).choices[0].text
        return "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True))

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        jobs = {(one, stream): pool.submit(ask, one, stream) for stream in (False, True) for one in asked}
    wrong = [key for key, job in jobs.items() if job.result() != expected[key[0]]]
    assert not wrong


def test_usage_and_the_reason(client: openai.OpenAI, alone: Alone):
    found = client.completions.create(model=BASE, prompt=[PROMPT, "The dog"], max_tokens=3, temperature=0)
    tokens = len(alone.tokenizer(PROMPT)["input_ids"]) + len(alone.tokenizer("The dog")["input_ids"])
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (tokens, 6)
    assert [(one.index, one.finish_reason) for one in found.choices] == [(0, "length"), (1, "length")]


def test_the_end_token_ends_an_answer_and_is_no_part_of_it(base: str, alone: Alone, tmp_path: Path):
    folder = shutil.copytree(base, tmp_path / "ends")
    tokens = alone.tokens(None, PROMPT, 60)
    end = alone.tokenizer.convert_tokens_to_ids(".")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [2, end]}))
    with serving(str(folder), None) as served:
        asked: dict[str, Any] = {"model": "ends", "prompt": PROMPT, "max_tokens": 60, "temperature": 0}
        found = served.openai().completions.create(**asked)
        streamed = "".join(one.choices[0].text for one in served.openai().completions.create(**asked, stream=True))
    assert found.choices[0].finish_reason == "stop"
    assert found.choices[0].text == streamed == alone.text(None, PROMPT, tokens.index(end))
    assert found.usage is not None
    assert found.usage.completion_tokens == tokens.index(end) + 1


def test_usage_of_a_stream(client: openai.OpenAI):
    options: dict[str, Any] = {"model": BASE, "prompt": PROMPT, "max_tokens": 3, "stream": True}
    chunks = list(client.completions.create(**options, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3
    assert all(one.usage is None for one in chunks[:-1])
    assert all(one.choices for one in client.completions.create(**options))


def test_tokens_are_prompts_too(client: openai.OpenAI, alone: Alone):
    ids = alone.tokenizer(PROMPT)["input_ids"]
    found = client.completions.create(model="acme/a", prompt=[ids, ids], max_tokens=5, temperature=0)
    one = client.completions.create(model="acme/a", prompt=ids, max_tokens=5, temperature=0)
    text = client.completions.create(model="acme/a", prompt=PROMPT, max_tokens=5, temperature=0)
    assert {choice.text for choice in (*found.choices, *one.choices, *text.choices)} == {text.choices[0].text}


@pytest.mark.parametrize("name", ["acme/b", f"{BASE}:acme/b", "acme/b@1", f"{BASE}:acme/b@1"])
def test_names_of_an_adapter(name: str, client: openai.OpenAI, alone: Alone, users: dict[str, PackedAdapter]):
    found = client.completions.create(model=name, prompt=PROMPT, max_tokens=6, temperature=0)
    assert found.choices[0].text == alone.text(users["acme/b"], PROMPT, 6)
    assert found.model == name


def test_models_are_listed(client: openai.OpenAI, users: dict[str, PackedAdapter]):
    found = {one.id: one for one in client.models.list()}
    assert {*found} == {BASE, *users}
    told = found["acme/a"].model_extra or {}
    assert (told["root"], told["parent"], told["version"], told["method"]) == ("acme/a", BASE, 1, "nola")
    assert told["bytes"] == len(users["acme/a"].to_bytes())


# --- how tokens are chosen ---


def test_a_seed_gives_the_same_answer_whatever_else_is_asked(client: openai.OpenAI):
    def ask(seed: int, model: str = "acme/b", **options: Any) -> str:
        asked: dict[str, Any] = {"model": model, "prompt": PROMPT, "max_tokens": 20, "temperature": 1.5, **options}
        return client.completions.create(seed=seed, **asked).choices[0].text

    quiet = [ask(seed) for seed in (1, 2, -3)]
    assert len({*quiet}) == 3
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        noise = [pool.submit(ask, seed, model) for seed in range(20) for model in (BASE, "acme/c")]
        loud = [pool.submit(ask, seed) for seed in (1, 2, -3)]
    assert [job.result() for job in loud] == quiet
    assert len({job.result() for job in noise}) > 30
    assert ask(1, top_p=1e-6) == ask(2, top_p=1e-6), "of one token there is nothing to draw"
    assert ask(1, top_p=1e-6) == ask(1, temperature=0)


def test_without_a_seed_answers_differ(client: openai.OpenAI):
    found = client.completions.create(model=BASE, prompt=PROMPT, max_tokens=20, temperature=1.5, n=4)
    assert [one.index for one in found.choices] == [0, 1, 2, 3]
    assert len({one.text for one in found.choices}) == 4
    assert found.usage is not None
    assert found.usage.completion_tokens == 80


def test_choices_of_a_seed_differ_and_are_the_same_again(client: openai.OpenAI):
    asked: dict[str, Any] = {"model": "acme/a", "prompt": PROMPT, "max_tokens": 12, "temperature": 1.5, "seed": 5}
    whole = [one.text for one in client.completions.create(**asked, n=3).choices]
    assert len({*whole}) == 3
    streamed = ["", "", ""]
    for chunk in client.completions.create(**asked, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == whole
    assert client.completions.create(**asked).choices[0].text == whole[0]


def test_stop_strings(client: openai.OpenAI, alone: Alone):
    text = alone.text(None, PROMPT, 40)
    for stop in (" girl", "ttle gi", [" Lily", "named"], "zzz"):
        stops = [stop] if isinstance(stop, str) else stop
        places = [text.find(one) for one in stops if one in text]
        asked: dict[str, Any] = {"model": BASE, "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "stop": stop}
        found = client.completions.create(**asked)
        expected = text[: min(places)] if places else text
        assert (found.choices[0].text, found.choices[0].finish_reason) == (expected, "stop" if places else "length")
        streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))
        assert streamed == expected


def test_log_probabilities(client: openai.OpenAI, alone: Alone):
    import torch

    found = client.completions.create(model=BASE, prompt=PROMPT, max_tokens=4, temperature=2.0, seed=3, logprobs=2)
    told = found.choices[0].logprobs
    assert told is not None
    assert told.tokens is not None
    assert told.token_logprobs is not None
    assert told.top_logprobs is not None
    assert "".join(told.tokens) == found.choices[0].text
    assert told.text_offset == [sum(map(len, told.tokens[:i])) for i in range(4)]
    ids = alone.tokenizer(PROMPT)["input_ids"]
    tokens = alone.tokenizer(PROMPT + found.choices[0].text)["input_ids"][len(ids) :]
    if len(tokens) == 4:  # the text may be cut into other tokens
        with torch.no_grad():
            logits = alone.model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
        expected = torch.log_softmax(logits, -1)
        own = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert told.token_logprobs == pytest.approx(own.tolist(), abs=1e-4)
        best = [max(one.values()) for one in told.top_logprobs]
        assert best == pytest.approx(expected.max(-1).values.tolist(), abs=1e-4)
    assert [len(one) for one in told.top_logprobs] == [2, 2, 2, 2]


# --- what is refused ---


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100_000}, "at most 512 tokens together"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n:"),
        ({"n": 1000}, "n:"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "at most 16 texts"),
        ({"prompt": []}, "at least one text"),
        ({"prompt": [[]]}, "no tokens"),
        ({"prompt": [5000]}, "not from 0 to 511"),
        ({"prompt": ["a"] * 129}, "at most 128 prompts"),
        ({"extra_body": {"presence_penalty": 1.0}}, "presence_penalty is not supported"),
        ({"extra_body": {"echo": True}}, "echo is not supported"),
        ({"extra_body": {"what": 1}}, "what"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_a_400_that_says_so(change: dict[str, Any], said: str, client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**{"model": BASE, "prompt": PROMPT, **change})
    assert said in str(refused.value)
    assert (refused.value.body or {})["type"] == "invalid_request_error"  # pyright: ignore[reportIndexIssue]


def test_neutral_values_of_what_is_not_supported_are_taken(client: openai.OpenAI):
    found = client.completions.create(
        model=BASE,
        prompt=PROMPT,
        max_tokens=2,
        presence_penalty=0,
        frequency_penalty=0,
        echo=False,
        best_of=1,
        user="me",
    )
    assert found.choices


@pytest.mark.parametrize("name", ["nobody", "acme/a@7", "acme", f"{BASE}:nobody", "../../etc/passwd", "é", "a" * 300])
def test_an_unknown_adapter_is_a_404(name: str, client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError) as refused:
        client.completions.create(model=name, prompt=PROMPT)
    assert refused.value.code == "model_not_found"


def test_a_model_without_a_chat_template_says_so(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "hi"}])


def test_encoders_routes_say_what_the_base_is(client: openai.OpenAI, served: Served):
    with pytest.raises(openai.BadRequestError, match="no encoder"):
        client.embeddings.create(model=BASE, input="a")
    assert httpx.post(f"{served.url}/v1/classify", json={"model": BASE, "input": "a"}).status_code == 400


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"model": 3}', b"null"])
def test_what_is_no_body(body: bytes, served: Served):
    found = httpx.post(f"{served.url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert found.status_code == 400
    assert {*found.json()["error"]} == {"message", "type", "param", "code"}


def test_what_is_no_route(served: Served):
    assert httpx.get(f"{served.url}/v1/nothing").status_code == 404
    assert httpx.get(f"{served.url}/v1/completions").status_code == 405
    assert httpx.get(f"{served.url}/v1/completions").json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_too_long(served: Served):
    found = httpx.post(f"{served.url}/v1/completions", json={"model": BASE, "prompt": "a" * (1 << 20)})
    assert found.status_code == 413

    def endless() -> Any:
        for _ in range(64):
            yield b" " * (1 << 16)

    try:
        status = httpx.post(f"{served.url}/v1/completions", content=endless()).status_code
    except httpx.WriteError:
        status = 413  # it closed the connection while we were sending
    assert status == 413


# --- numbers ---


def test_metrics_have_few_labels(served: Served, client: openai.OpenAI, users: dict[str, PackedAdapter]):
    for name in users:
        client.completions.create(model=name, prompt=PROMPT, max_tokens=2)
    httpx.get(f"{served.url}/v1/nothing/at/all")
    text = httpx.get(f"{served.url}/metrics").text
    assert not [line for line in text.splitlines() if "acme" in line or "at/all" in line]
    numbers = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(numbers["randbasis_generated_tokens_total"]) > 0
    assert float(numbers["randbasis_time_to_first_token_seconds_count"]) > 0
    assert float(numbers["randbasis_bank_adapters"]) == len(users)
    assert float(numbers["randbasis_requests_running"]) == 0
    assert float(numbers['randbasis_http_requests_total{route="/v1/completions",status="200"}']) > 0
    assert float(numbers['randbasis_http_requests_total{route="other",status="404"}']) > 0
    assert "prometheus_client" not in text, "a registry of its own"


def test_the_access_log_tells_no_prompt(served: Served, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", "randbasis.serve.access"):
        served.openai().completions.create(model="acme/a", prompt="a secret story", max_tokens=3)
        until = time.monotonic() + 10
        lines: list[Any] = []
        while not lines:  # it is written once the answer is sent
            assert time.monotonic() < until
            lines = [json.loads(one.message) for one in caplog.records if '"tokens": 3' in one.message]
    (line,) = lines
    assert {*line} == {"time", "key", "method", "route", "status", "model", "prompt_tokens", "tokens", "ms"}
    assert (line["key"], line["route"], line["status"], line["tokens"]) == ("anybody", "/v1/completions", 200, 3)
    assert "secret" not in caplog.text

"""What the server costs above the model: the same 32 answers by ``generate`` over the bank, by the engine, over HTTP.

The server is a process of its own (``randbasis serve``), whose clients are in this one; each answer is that of its own
adapter, 16 tokens of one prompt. Needs the tokenizer of a model in the folder of data sets.
"""

import asyncio
import json
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks import bases
from benchmarks.bank import ROWS, users
from benchmarks.bases import Base
from benchmarks.case import Built, Case, CheckFailed, Side
from randbasis.bank import AdapterBank
from randbasis.store import AdapterStore

METHOD = "NOLA r=8 k=64"
TOKENIZER = bases.DATA / "llama_stories260k"
TOKENS = 16
PROMPT = "Once upon a time there was a"
GENERATE, ENGINE, HTTP = "generate over the bank", "the engine", "over HTTP, streamed"


def cases(*, tiny: bool = False, everything: bool = False) -> Iterator[Case]:
    """One case; none where there is no tokenizer."""
    del everything
    base = bases.llama(1, 64, 512) if tiny else bases.llama(6, 512, 512)
    if TOKENIZER.exists():
        yield Case(
            family="serving",
            name=f"{ROWS} answers of {TOKENS} tokens, each with its adapter of {METHOD}, {base.name}",
            sides=(GENERATE, ENGINE, HTTP),
            build=partial(_build, base),
            parameters={"model": base.name, "rows": ROWS},
            work=ROWS * TOKENS,
            unit="tokens/s",
            usual=False,
            seconds=20,
        )


def _build(base: Base, sides: Sequence[str]) -> Built:
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    tokenizer: Any = AutoTokenizer.from_pretrained(TOKENIZER)
    model = cast("LlamaForCausalLM", base.model().eval())
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    bank = AdapterBank(model)
    with AdapterStore(folder / "adapters.db") as store:
        for number, adapter in enumerate(users(METHOD, base, ROWS)):
            store.add(f"u{number}", adapter)
            bank.load(f"u{number}", adapter)
    ids = tokenizer(PROMPT)["input_ids"]
    words = torch.tensor([ids] * ROWS)
    names = [f"u{number}" for number in range(ROWS)]

    def generate() -> list[list[int]]:
        options: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            made = cast("Any", model).generate(input_ids=words, adapter_names=names, **options)
        return made[:, words.shape[1] :].tolist()

    engine = _Engine(folder, ids)
    server = _Server(folder)
    calls = {GENERATE: generate, ENGINE: engine.answers, HTTP: server.answers}

    def check() -> str:
        wanted, texts, streamed = generate(), engine.answers(), server.answers()
        # Sums in another order decide a near tie between two tokens otherwise.
        differing = sum(one != other for one, other in zip(engine.tokens, wanted, strict=True))
        if differing > ROWS // 8 or streamed != texts:
            raise CheckFailed(f"{differing} of {ROWS} answers are not those of generate, or HTTP gives others")
        return f"{ROWS - differing} of {ROWS} answers those of generate to the token, the streamed ones the engine's"

    # The last reference to the sides is that of the case, which is done then.
    weakref.finalize(engine, _end, server.process, folder)
    return Built({name: Side(calls[name]) for name in sides}, check)


def _end(process: "subprocess.Popen[str]", folder: Path) -> None:
    process.terminate()
    process.wait(30)
    shutil.rmtree(folder)


class _Engine:
    """The engine in this process, without HTTP.

    Attributes:
        tokens: of the last answers.
    """

    tokens: list[list[int]]

    def __init__(self, folder: Path, ids: list[int]) -> None:
        from randbasis.serve.server import RunningService
        from randbasis.serve.settings import ServeSettings

        settings = ServeSettings(
            str(folder / "model"), str(folder / "adapters.db"), device="cpu", keys=str(folder / "keys.json")
        )
        self._running, self._ids, self._turn = RunningService(settings), tuple(ids), 0
        weakref.finalize(self, self._running.close)

    def answers(self) -> list[str]:
        """The text of each user's answer."""
        from randbasis.serve.requests import Hold, Piece, Request, Sampling

        ends: queue.SimpleQueue[int] = queue.SimpleQueue()
        texts = [""] * ROWS

        def put(number: int, piece: Piece) -> None:
            texts[number] += piece.text
            if piece.finish is not None:
                ends.put(number)

        adapters, requests = self._running.service.adapters, list[Request]()
        for number in range(ROWS):
            self._turn += 1
            hold = Hold(adapters.lease(adapters.named(f"u{number}")), 1)
            sampling = Sampling(TOKENS, temperature=0.0)
            requests.append(Request(f"r{self._turn}", self._ids, sampling, hold, partial(put, number)))
        self._running.engine.submit(requests)
        for _ in range(ROWS):
            ends.get(timeout=120)
        self.tokens = [one.tokens for one in requests]
        return texts


class _Server:
    """``randbasis serve`` in a process of its own."""

    def __init__(self, folder: Path) -> None:
        options = {"--model": folder / "model", "--store": folder / "adapters.db", "--keys": folder / "keys.json"}
        command = [sys.executable, "-m", "randbasis", "serve", "--port", "0", "--device", "cpu"]
        command += [str(word) for pair in options.items() for word in pair]
        command += ["--threads", str(torch.get_num_threads())]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        told: list[str] = []
        for line in self.process.stderr:
            told.append(line)
            if "listening on " in line:
                self._url = line.rpartition("listening on ")[2].strip()
                break
        else:
            raise CheckFailed(f"the server did not start: {''.join(told[-3:])}")
        # Its access log must not fill the pipe.
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def answers(self) -> list[str]:
        """The text of each user's answer, over connections of their own at once."""
        return asyncio.run(self._all())

    async def _all(self) -> list[str]:
        async with httpx.AsyncClient(base_url=self._url, timeout=120) as client:
            return list(await asyncio.gather(*(self._one(client, f"u{number}") for number in range(ROWS))))

    async def _one(self, client: httpx.AsyncClient, user: str) -> str:
        body = {"model": user, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "stream": True}
        text = ""
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
        return text

"""REQUESTS → PIECES: one batch of all users' requests, over the bank, in one thread."""

import logging
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any, Protocol

from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from randbasis.errors import AnswerError, EngineStoppedError, QueueFullError
from randbasis.serve.batching import BatchLoop, BatchSettings
from randbasis.serve.host_names import ENGINE_NAMES, ENGINE_RANGE
from randbasis.serve.metrics import Metrics
from randbasis.serve.requests import Finish, Piece, Request, State
from randbasis.serve.sampling import Row
from randbasis.serve.text_stream import TextStream
from randbasis.tuner.host_names import check_names

_LOG = logging.getLogger("randbasis.serve")
_STATES: dict[Finish, State] = {
    "stop": State.FINISHED,
    "length": State.FINISHED,
    "cancelled": State.CANCELLED,
    "error": State.FAILED,
}

_BROKEN = "the model's logits are no finite numbers with this adapter; train it anew, or ask another one"


class TokenPlans(Protocol):
    """What the engine needs of a bank."""

    def tokens(self, runs: Sequence[tuple[Any, int]]) -> AbstractContextManager[object]:
        """Around a pass over packed tokens: lease, or None for the base, and number of tokens of each run."""
        ...


class Engine:
    """Answers requests; each keeps its adapter until it ends.

    ``submit`` and ``cancel`` may be called by any thread. All else happens on the thread of the loop: it alone changes
    a request once it was submitted.

    Args:
        model: a decoder of transformers on which the bank stands.
        tokenizer: of it; a copy is used.
        bank: plans which adapter each token has.
        settings: what the batch may hold.
        queue: most requests that are waiting and running.
        metrics: what is counted.

    Raises:
        RegistrationError: the installed transformers has another continuous batching than this was written for.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        bank: TokenPlans,
        settings: BatchSettings,
        *,
        queue: int,
        metrics: Metrics,
    ) -> None:
        check_names(ENGINE_NAMES, ENGINE_RANGE)
        self._bank = bank
        self._tokenizer = deepcopy(tokenizer)  # two threads that use one cut the texts of both
        self._queue = queue
        self._metrics = metrics
        self._requests: dict[str, Request] = {}
        self._texts: dict[str, TextStream] = {}
        self._leaving: deque[str] = deque()
        self._changed = threading.Condition()
        self._draining = False
        self._fault: str | None = None
        self._ends = end_tokens(model)
        config = model.config.get_text_config()
        self.vocabulary: int = config.vocab_size
        self._loop = BatchLoop(model, settings, self)
        longest: int = getattr(config, "max_position_embeddings", None) or self._loop.longest
        self.context = min(longest, self._loop.longest)
        """Most tokens of a prompt and its answer."""
        self._loop.start()

    @property
    def fault(self) -> str | None:
        """Why no request is answered any more; None while they are."""
        return self._fault

    def counts(self) -> tuple[int, int]:
        """Requests that wait, and that run."""
        states = [one.state for one in list(self._requests.values())]
        return states.count(State.WAITING), states.count(State.RUNNING)

    def check(self, prompt: Sequence[int], max_tokens: int) -> None:
        """Refuse a prompt that the model cannot read or that leaves no room for its answer.

        Raises:
            AnswerError: with the numbers.
        """
        if not prompt:
            raise AnswerError("the prompt has no tokens, and there is nothing to go on from; write something")
        if not all(0 <= token < self.vocabulary for token in prompt):
            raise AnswerError(f"the prompt has tokens that are not from 0 to {self.vocabulary - 1}; use its tokenizer")
        if len(prompt) + max_tokens > self.context:
            raise AnswerError(
                f"prompt and answer must have at most {self.context} tokens together, got {len(prompt)} and "
                f"max_tokens {max_tokens}; ask for less"
            )

    # --- any thread ---

    def submit(self, requests: Sequence[Request]) -> None:
        """Take requests, all or none; what is refused keeps its hold.

        Raises:
            AnswerError: a prompt cannot be answered; see :meth:`check`.
            QueueFullError: there are too many already.
            EngineStoppedError: none is answered any more.
        """
        for one in requests:
            self.check(one.prompt, one.sampling.max_tokens)
        if len(requests) > self._queue:
            raise AnswerError(
                f"prompts times n must be at most {self._queue}, which is the server's queue, got {len(requests)}; "
                "ask in several bodies"
            )
        with self._changed:
            if self._fault is not None or self._draining:
                raise EngineStoppedError(self._fault or "the server is shutting down; ask another one")
            if len(self._requests) + len(requests) > self._queue:
                raise QueueFullError(
                    f"at most {self._queue} requests may wait, {len(self._requests)} do; try again in a moment"
                )
            for one in requests:
                self._texts[one.id] = TextStream(self._tokenizer, one.prompt, one.sampling.stop)
                self._requests[one.id] = one
        for one in requests:
            self._loop.add_request(
                [*one.prompt],
                request_id=one.id,
                max_new_tokens=one.sampling.max_tokens,
                streaming=True,
                eos_token_id=self._ends,
            )

    def cancel(self, requests: Iterable[Request]) -> None:
        """Nobody waits for these any more; those that ended are left alone."""
        self._leaving.extend(one.id for one in requests if not one.ended)
        self._loop.wake()

    def drain(self, seconds: float) -> bool:
        """Take no more requests, and wait until those that there are have ended; whether they did."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._requests, seconds)

    def stop(self) -> None:
        """End the loop; requests that still run fail."""
        with self._changed:
            self._draining = True
        self._loop.stop(hard_stop=True)

    # --- the thread of the loop ---

    def plan(self, runs: Sequence[tuple[str, int]]) -> AbstractContextManager[object]:
        """See :class:`randbasis.serve.batching.Hooks`."""
        requests = [(self._requests[request_id], tokens) for request_id, tokens in runs]
        for one, _ in requests:
            if one.state is State.WAITING:
                one.state = State.RUNNING
        self._metrics.step(len(requests), sum(tokens for _, tokens in requests))
        return self._bank.tokens([(one.hold and one.hold.lease, tokens) for one, tokens in requests])

    def row(self, request_id: str, position: int) -> Row:
        """See :class:`randbasis.serve.batching.Hooks`."""
        return Row(self._requests.get(request_id), position)

    def take(self, output: GenerationOutput) -> None:
        """See :class:`randbasis.serve.batching.Hooks`. What goes wrong with one request is that request's."""
        request = self._requests.get(output.request_id)
        if request is None or request.ended:
            return
        try:
            if output.status == RequestStatus.FAILED:
                self._end(request, "error", error=output.error or "it failed in the engine", out=True)
            else:
                self._go_on(request, output)
        except Exception as error:  # noqa: BLE001 # whatever it is, the thread goes on for the others
            _LOG.exception("request %s failed", request.id)
            self._end(request, "error", error=f"{type(error).__name__} in its text", out=output.is_finished())
        if request.ended and not output.is_finished():
            self._leaving.append(request.id)

    def leaving(self) -> list[str]:
        """See :class:`randbasis.serve.batching.Hooks`."""
        return [self._leaving.popleft() for _ in range(len(self._leaving))]

    def left(self, request_ids: Sequence[str]) -> None:
        """See :class:`randbasis.serve.batching.Hooks`."""
        for request_id in request_ids:
            if (request := self._requests.get(request_id)) is not None:
                self._end(request, "cancelled", out=True)

    def closed(self, error: Exception | None) -> None:
        """See :class:`randbasis.serve.batching.Hooks`: whoever still waits is told."""
        with self._changed:
            told = "the server was stopped" if error is None else f"the engine stopped: {type(error).__name__}: {error}"
            self._fault = f"{told}; it has to be started anew"
        for request in list(self._requests.values()):
            self._end(request, "error", error=self._fault, out=True)

    def _go_on(self, request: Request, output: GenerationOutput) -> None:
        if request.broken:
            self._end(request, "error", error=_BROKEN, refused=request.hold is not None, out=output.is_finished())
            return
        new = output.generated_tokens[len(request.tokens) :]
        self._metrics.tokens(request, len(new))
        stream, text, stopped = self._texts[request.id], "", False
        for token in new:
            request.tokens.append(token)
            if token in self._ends or stopped:
                continue
            more, stopped = stream.add(token)
            text += more
        if stopped:
            self._end(request, "stop", text, out=output.is_finished())
        elif output.is_finished():
            ended = bool(new) and new[-1] in self._ends
            rest = stream.end()
            self._end(request, "stop" if ended else "length", text + rest, out=True)
        elif text or request.scored:
            request.put(Piece(text, request.taken()))

    def _end(
        self,
        request: Request,
        finish: Finish,
        text: str = "",
        *,
        error: str = "",
        refused: bool = False,
        out: bool = False,
    ) -> None:
        """Tell the end once. Where no step reads the request any more, its adapter is free before its client knows."""
        told = request.ended
        if not told:
            request.state = _STATES[finish]
        if out:
            self._remove(request)
        if not told:
            self._metrics.ended(request, finish)
            request.put(Piece(text, request.taken(), finish, error, refused))

    def _remove(self, request: Request) -> None:
        if request.id not in self._requests:
            return
        if request.hold is not None:
            request.hold.release()
        with self._changed:
            del self._requests[request.id], self._texts[request.id]
            self._changed.notify_all()


def end_tokens(model: Any) -> list[int]:
    """The tokens that end an answer, by the model's own generation settings."""
    found = getattr(model.generation_config, "eos_token_id", None)
    return [] if found is None else [found] if isinstance(found, int) else [*found]

"""The state of one answer: what was asked, where it is, and the pieces in which it comes.

Every field has one owner; docs/serving.md has the table.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, TypeAlias

Finish: TypeAlias = Literal["stop", "length", "cancelled", "error"]
"""Why an answer ended: a stop string or end token; its most tokens; nobody wants it any more; it failed."""

SEEDS = 1 << 64
"""Seeds are below this, as those of a basis."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of an answer are chosen.

    Attributes:
        max_tokens: most tokens of the answer.
        temperature: of the distribution; 0 takes the most probable token.
        top_p: draw among the fewest tokens that have this probability together.
        seed: of the draws. The same seed, prompt, choice and adapter give the same answer, whatever else is in the
            batch; an integer below :data:`SEEDS`.
        stop: texts that end the answer and are no part of it.
        logprobs: tell the log-probability of each token, and of that many alternatives; None tells none.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """A token with its natural log-probability in the model's own distribution, before temperature and top_p.

    Attributes:
        token: its id.
        logprob: of it.
        top: the most probable tokens with theirs, the most probable first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer.

    Attributes:
        text: what came since the piece before; whole characters.
        scored: the tokens behind it, where log-probabilities were asked for.
        finish: why it is the last piece; None where more comes.
        error: what went wrong, where ``finish`` is ``"error"``.
        refused: whether the adapter is at fault for it, and not the server.
    """

    text: str = ""
    scored: tuple[Scored, ...] = ()
    finish: Finish | None = None
    error: str = ""
    refused: bool = False


class Hold:
    """One lease for the choices of one request: they have one version, and the last that ends releases it.

    Args:
        lease: of the bank.
        count: choices.
    """

    def __init__(self, lease: Any, count: int):
        self.lease = lease
        self._left = count
        self._lock = threading.Lock()

    def release(self) -> None:
        """One choice ended."""
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self.lease.release()


class State(Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Request:
    """One choice of one prompt on its way to an answer.

    Attributes:
        id: unlike that of any other request.
        prompt: token ids.
        sampling: how its tokens are chosen.
        hold: on its adapter; None is the base. The engine releases it when the request ends, however it ends.
        put: takes each piece, on the engine's thread; must not block.
        choice: its number among the choices of one prompt, which draw differently.
        state: set by the engine's thread.
        tokens: of the answer so far, set by the engine's thread.
        scored: of them, those that no piece has told yet; set by the engine's thread.
        created: when it was made, on the monotonic clock.
        seen: when its newest token came; 0 before the first.
        broken: whether the logits of its newest token were no numbers; set by the engine's thread.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    hold: Hold | None
    put: Callable[[Piece], None]
    choice: int = 0
    state: State = State.WAITING
    tokens: list[int] = field(default_factory=list[int])
    scored: list[Scored] = field(default_factory=list[Scored])
    created: float = field(default_factory=time.monotonic)
    seen: float = 0.0
    broken: bool = False

    @property
    def ended(self) -> bool:
        """Whether no piece comes any more."""
        return self.state not in (State.WAITING, State.RUNNING)

    def taken(self) -> tuple[Scored, ...]:
        """The scored tokens that no piece has told yet; from now on they are told."""
        told = tuple(self.scored)
        self.scored.clear()
        return told

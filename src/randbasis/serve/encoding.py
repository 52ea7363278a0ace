"""TEXTS → VECTORS, CLASSES: rows of all users in one padded batch, in one thread."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from randbasis.errors import EngineStoppedError, QueueFullError
from randbasis.serve.service import Encoded
from randbasis.serve.views import EncoderViews
from randbasis.train.pooled import mean_over

_LOG = logging.getLogger("randbasis.serve")


@dataclass(slots=True, eq=False)
class Job:
    """One row.

    Attributes:
        row: token ids.
        lease: of the adapter; None is the base.
        classes: whether its classes are wanted, and not its vector.
        done: its numbers.
    """

    row: Encoded
    lease: Any | None
    classes: bool
    done: "Future[list[float]]" = field(default_factory=lambda: Future[list[float]]())


class EncoderEngine:
    """Answers rows; those that come while a batch is computed make the next one.

    Args:
        views: the encoder and its banks.
        padding: id of the token that fills up rows.
        context: most tokens of a row.
        max_batch_tokens: most tokens of a batch, padding too.
        queue: most rows that wait.
    """

    def __init__(self, views: EncoderViews, *, padding: int, context: int, max_batch_tokens: int, queue: int):
        self.context = context
        self.vocabulary: int = views.encoder.config.vocab_size
        self._views = views
        self._padding = padding
        self._most = max(max_batch_tokens, context)
        self._queue = queue
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._busy = False
        self._thread = threading.Thread(target=self._run, name="randbasis-encoder", daemon=True)
        self._thread.start()

    @property
    def fault(self) -> str | None:
        """Why nothing is answered any more; None while it is."""
        return None if self._thread.is_alive() else "the encoder was stopped; it has to be started anew"

    def counts(self) -> tuple[int, int]:
        """Rows that wait, and whether some are computed."""
        return len(self._jobs), int(self._busy)

    async def embed(self, rows: Sequence[Encoded], lease: Any | None) -> list[list[float]]:
        """Unit vectors: the mean of the encoder's hidden states.

        Raises:
            QueueFullError: too many rows wait.
            EngineStoppedError: none is answered any more.
        """
        return await self._all([Job(row, lease, False) for row in rows])

    async def classify(self, rows: Sequence[Encoded], lease: Any) -> list[list[float]]:
        """Logits, by the adapter's own head.

        Raises:
            QueueFullError: too many rows wait.
            EngineStoppedError: none is answered any more.
        """
        return await self._all([Job(row, lease, True) for row in rows])

    def drain(self, seconds: float) -> bool:
        """Wait until no row waits; whether that was reached."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._busy, seconds)

    def stop(self) -> None:
        """End the thread; rows that wait fail."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    async def _all(self, jobs: Sequence[Job]) -> list[list[float]]:
        with self._changed:
            if self._stopped:
                raise EngineStoppedError("the server is shutting down; ask another one")
            if len(self._jobs) + len(jobs) > self._queue:
                raise QueueFullError(
                    f"at most {self._queue} texts may wait, {len(self._jobs)} do; try again in a moment"
                )
            self._jobs.extend(jobs)
            self._changed.notify_all()
        return await asyncio.gather(*[asyncio.wrap_future(job.done) for job in jobs])

    # --- the thread ---

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._jobs or self._stopped)
                if self._stopped:
                    break
                batch, self._busy = self._next(), True
            self._answer(batch)
        for job in self._jobs:
            job.done.set_exception(EngineStoppedError("the server was stopped; ask another one"))

    def _next(self) -> list[Job]:
        """The jobs that go with the first into one batch, oldest first."""
        kind, longest = self._kind(self._jobs[0]), 0
        taken: list[Job] = []
        for job in self._jobs:
            if self._kind(job) == kind:
                longest = max(longest, len(job.row))
                if longest * (len(taken) + 1) > self._most:
                    break
                taken.append(job)
        chosen = set(map(id, taken))
        self._jobs = deque(job for job in self._jobs if id(job) not in chosen)
        return [job for job in taken if job.done.set_running_or_notify_cancel()]

    def _kind(self, job: Job) -> object:
        """Equal for jobs that may share a batch: heads of other sizes have logits of another width."""
        if job.lease is None or not job.classes:
            return self._views.placed(job.lease)[0], job.classes
        shapes = tuple(
            (path, name, tuple(tensor.shape))
            for path, tensors in sorted(job.lease.resident.extra.items())
            for name, tensor in sorted(tensors.items())
        )
        return self._views.placed(job.lease)[0], shapes

    def _answer(self, jobs: Sequence[Job]) -> None:
        """What goes wrong with a batch goes wrong with its rows, and with no other."""
        if not jobs:
            return
        try:
            found = self._computed(jobs)
        except Exception as error:  # noqa: BLE001 # whatever it is, the thread goes on for the others
            _LOG.exception("a batch of %d rows failed", len(jobs))
            for job in jobs:
                job.done.set_exception(error)
        else:
            for job, numbers in zip(jobs, cast("list[list[float]]", found.tolist()), strict=True):
                job.done.set_result(numbers)

    @torch.no_grad()
    def _computed(self, jobs: Sequence[Job]) -> Tensor:
        encoder: Any = self._views.encoder
        longest = max(len(job.row) for job in jobs)
        ids = [job.row + [self._padding] * (longest - len(job.row)) for job in jobs]
        mask = [[1] * len(job.row) + [0] * (longest - len(job.row)) for job in jobs]
        batch = {
            "input_ids": torch.tensor(ids, device=encoder.device),
            "attention_mask": torch.tensor(mask, device=encoder.device),
        }
        bank = self._views.placed(jobs[0].lease)[1]
        with bank.rows([job.lease for job in jobs]):
            if jobs[0].classes:
                return bank.model(**batch).logits.float().cpu()
            states = encoder(**batch).last_hidden_state.float()
        return normalize(mean_over(states, batch["attention_mask"]), dim=-1).cpu()

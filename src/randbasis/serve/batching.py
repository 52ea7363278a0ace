"""transformers' continuous batching with a plan of adapters around each step, and with our draws.

The host's loop runs in its own thread and calls three things of ours: the plan before a step, the sampler in it, and
the hooks behind it. Requests never share a block of the cache: its key is the tokens alone, and the keys and values of
the same tokens differ from adapter to adapter.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput

from randbasis.errors import RegistrationError
from randbasis.serve.host_names import ENGINE_RANGE
from randbasis.serve.sampling import Row, SeededSampler

_NEVER = -1
"""An end token that no model writes."""


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """What the batch may hold.

    Args:
        max_batch_tokens: most tokens of one step; longer prompts take several.
        max_batch_requests: most requests of one step.
        cache_tokens: tokens, of all requests together, whose keys and values are kept; None takes what the memory of
            an accelerator has room for.
        page_size: tokens of a page of the cache.
        share_blocks: what transformers does by default. It answers one user from the cache of another, and is here for
            the test that shows so.
    """

    max_batch_tokens: int = 512
    max_batch_requests: int = 256
    cache_tokens: int | None = 16384
    page_size: int = 16
    share_blocks: bool = False

    def config(self, device: torch.device) -> ContinuousBatchingConfig:
        """The same for transformers. No graphs: a replay would not ask for the plan of its step."""
        return ContinuousBatchingConfig(
            page_size=self.page_size,
            num_blocks=None if self.cache_tokens is None else -(-self.cache_tokens // self.page_size),
            max_batch_tokens=self.max_batch_tokens,
            max_requests_per_batch=min(self.max_batch_requests, self.max_batch_tokens),
            allow_block_sharing=self.share_blocks,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=device.type == "cuda",
        )


class Hooks(Protocol):
    """What the loop asks, always on its own thread."""

    def plan(self, runs: Sequence[tuple[str, int]]) -> AbstractContextManager[object]:
        """Around a step: request id and number of its tokens, in the order in which they are packed."""
        ...

    def row(self, request_id: str, position: int) -> Row:
        """Whose next token the next row of logits decides."""
        ...

    def take(self, output: GenerationOutput) -> None:
        """A token came, or a request ended."""
        ...

    def leaving(self) -> list[str]:
        """Requests that are to be taken out before the next step."""
        ...

    def left(self, request_ids: Sequence[str]) -> None:
        """They are out: no step reads them any more."""
        ...

    def closed(self, error: Exception | None) -> None:
        """The loop ended."""
        ...


class _Router(OutputRouter):
    """Hands every output over where it arises."""

    def __init__(self, take: Callable[[GenerationOutput], None]) -> None:
        super().__init__()
        self._take = take

    def deliver(self, output: GenerationOutput) -> None:
        """One output."""
        self._take(output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        """The outputs of one step."""
        for output in outputs:
            self._take(output)


class BatchLoop(ContinuousBatchingManager):
    """The loop.

    Args:
        model: a decoder of transformers, in evaluation mode.
        settings: what the batch may hold.
        hooks: what is asked.

    Raises:
        RegistrationError: transformers keeps the requests of a step elsewhere.
    """

    def __init__(self, model: Any, settings: BatchSettings, hooks: Hooks) -> None:
        generation = GenerationConfig(do_sample=False, eos_token_id=_NEVER)
        super().__init__(model, generation, settings.config(model.device))
        self._hooks = hooks
        self.output_router = _Router(hooks.take)
        sampler = SeededSampler(self._rows)
        self.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([sampler]))
        self.warmup()
        if not hasattr(self._step_holder(), "requests_in_batch"):
            raise RegistrationError(
                "transformers keeps the requests of a step elsewhere than in inputs_and_outputs.requests_in_batch, so "
                f"that adapters cannot be told to their tokens; install '{ENGINE_RANGE['transformers']}'"
            )
        self.longest = infer_max_single_request_tokens(cast("Any", self.batch_processor).cache)

    def _step_holder(self) -> Any:
        return cast("Any", self.batch_processor).inputs_and_outputs

    def _in_batch(self) -> list[FutureRequestState]:
        return self._step_holder().requests_in_batch

    def _rows(self) -> list[Row]:
        return [
            self._hooks.row(one.state.request_id, one.state.current_len())
            for one in self._in_batch()
            if one.has_new_token
        ]

    def _generation_step(self) -> None:
        with self._hooks.plan([(one.state.request_id, one.query_length) for one in self._in_batch()]):
            super()._generation_step()

    def _generation_loop_body(self, batch_processor: Any, bootstrapping: bool) -> bool:
        leaving = self._hooks.leaving()
        for request_id in leaving:
            self.cancel_queue.put(request_id)
        goes_on = super()._generation_loop_body(batch_processor, bootstrapping)
        if leaving:
            self._hooks.left(leaving)
        return goes_on

    def _run_generation_loop(self) -> None:
        try:
            super()._run_generation_loop()
        finally:
            self._hooks.closed(self.background_thread_status.fatal_error)

    def wake(self) -> None:
        """Let the loop look at what changed, where it waits for work."""
        self._wake_up_loop.set()

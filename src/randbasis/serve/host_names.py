"""The names of transformers' continuous batching that the engine stands on, checked when one is made.

See :mod:`randbasis.tuner.host_names`. They are younger than the other names, so that their range is narrower.
"""

from randbasis.tuner.host_names import HostName

ENGINE_RANGE = {"transformers": "transformers>=5.21,<5.24"}
"""Where the names below are as they must be, and requests do not share blocks of the cache when told not to."""

_BATCHING = "transformers.generation.continuous_batching"
_API = f"{_BATCHING}.continuous_api"
_REQUESTS = f"{_BATCHING}.requests"
_PLAN = "the tokens of a step are not told to which requests they belong"

ENGINE_NAMES = (
    HostName("transformers.generation.configuration_utils", "ContinuousBatchingConfig", "no engine can be made", (
        "page_size", "num_blocks", "max_batch_tokens", "max_requests_per_batch", "allow_block_sharing",
        "use_async_batching", "use_cuda_graph", "auto_switch_to_flash",
    )),
    HostName(_API, "ContinuousBatchingManager", "no engine can be made", (
        "model", "generation_config", "continuous_batching_config",
    )),
    HostName(_API, "ContinuousBatchingManager._generation_loop_body", "cancelled requests keep their adapters", (
        "batch_processor", "bootstrapping",
    )),
    HostName(_API, "ContinuousBatchingManager._generation_step", "every request is answered by the base"),
    HostName(_API, "ContinuousBatchingManager._run_generation_loop", "requests wait for ever for a loop that ended"),
    HostName(_API, "ContinuousBatchingManager.add_request", "no request can be answered", (
        "input_ids", "request_id", "max_new_tokens", "streaming", "eos_token_id",
    )),
    HostName(_API, "ContinuousBatchingManager.warmup", "how long a request may be is not known"),
    HostName(_API, "OutputRouter.deliver", "no answer arrives"),
    HostName(_API, "OutputRouter.deliver_batch", "no answer arrives"),
    HostName(_API, "OutputRouter.fail_and_deliver", "a request that failed waits for ever"),
    HostName(f"{_BATCHING}.cb_logits_processors", "ContinuousBatchingLogitsProcessorList", "tokens are not drawn", (
        "logits_processor",
    )),
    HostName(f"{_BATCHING}.model_runner", "infer_max_single_request_tokens", "how long a request may be is not known", (
        "cache",
    )),
    HostName(_REQUESTS, "FutureRequestState.state", _PLAN),
    HostName(_REQUESTS, "FutureRequestState.query_length", _PLAN),
    HostName(_REQUESTS, "FutureRequestState.has_new_token", "tokens are drawn for other requests than theirs"),
    HostName(_REQUESTS, "GenerationOutput.is_finished", "no answer ends"),
    HostName(_REQUESTS, "RequestState.current_len", "a seed gives other answers in another batch"),
    HostName(_REQUESTS, "RequestStatus", "a request that failed waits for ever"),
)  # fmt: skip
"""What serving overrides or reaches into."""

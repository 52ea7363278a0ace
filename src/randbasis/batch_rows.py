"""The rows of a batch: how many a call has, and what names the adapter of each may be."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

BASE = "__base__"
"""The name that stands for no adapter in a mixed batch."""

TOKENS_FIRST = frozenset(
    {
        "clipseg", "conditional_detr", "convbert", "dab_detr", "deformable_detr", "edgetam_video", "fsmt", "led",
        "longformer", "mask2former", "maskformer", "omdet-turbo", "oneformer", "pegasus_x", "sam2_video",
        "sam3_tracker_video", "xlnet",
    }
)  # fmt: skip
"""Model types of transformers of which some layers see ``[tokens, rows, width]``, or say so."""

INPUTS = (
    "input_ids", "inputs", "inputs_embeds", "input_features", "input_values", "encoder_outputs",
)  # fmt: skip
"""Arguments of a forward pass or of generation that have one entry for each row; the first that is given counts."""


def rows_of_a_prompt(model: nn.Module, given: Mapping[str, Any]) -> int:
    """How many rows generation makes of one prompt: beams or returned sequences, whichever are more.

    Args:
        model: what generates; its ``generation_config`` has what is not given.
        given: the arguments of the call.
    """
    configs = (given.get("generation_config"), getattr(model, "generation_config", None))

    def setting(name: str) -> int:
        values = (given.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if isinstance(value, int)), 1)

    return max(setting("num_beams"), setting("num_return_sequences"))


def given_rows(args: Sequence[Any], given: Mapping[str, Any]) -> int | None:
    """The rows of the inputs of a call, where they can be seen: PEFT passes some of them on by another way."""
    inputs = [*(given.get(name) for name in INPUTS), *args[:1]]
    for value in inputs:
        first = value if isinstance(value, Tensor) else _first_tensor(value)
        if first is not None and first.dim():
            return first.shape[0]
    return None


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Mapping):
        return next((one for one in cast("Mapping[str, Any]", value).values() if isinstance(one, Tensor)), None)
    return None

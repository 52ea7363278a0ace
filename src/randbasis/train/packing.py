"""Short rows side by side in one sequence: which go together, their batch, and whether a model keeps them apart.

As transformers' ``DataCollatorWithFlattening`` has it, positions begin anew with each row and no attention mask is
given; models of transformers then let a row see nothing but itself, with every implementation of attention. Rows are
put together as TRL does (best fit, longest first), so that none is cut.
"""

import inspect
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from randbasis.errors import SettingError
from randbasis.train.task import Batch, Example, inference

UNSEEN = -100


def pack(examples: Sequence[Example], length: int) -> list[Example]:
    """Sequences of at most ``length`` tokens, each of whole rows; the first token of a row is predicted from nothing.

    Args:
        examples: rows with ``input_ids`` and ``labels``, none longer than ``length``.
        length: tokens a sequence.
    """
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is free in which pack, sorted
    for row in order:
        size = len(examples[row]["input_ids"])
        place = bisect_left(room, (size, -1))
        if place == len(room):
            packs.append([])
            free, one = length, len(packs) - 1
        else:
            free, one = room.pop(place)
        packs[one].append(row)
        insort(room, (free - size, one))
    return [_joined([examples[row] for row in sorted(rows)]) for rows in packs]


def _joined(rows: Sequence[Example]) -> Example:
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "labels": [label for row in rows for label in (UNSEEN, *row["labels"][1:])],
        "position_ids": [place for row in rows for place in range(len(row["input_ids"]))],
    }


def collate_packs(packs: Sequence[Example], padding: int) -> Batch:
    """Packs as one batch; what fills the shorter ones up is a row of its own, of which nothing is learned."""
    longest = max(len(one["input_ids"]) for one in packs)

    def filled(name: str, fill: Sequence[int]) -> Tensor:
        return torch.tensor([[*one[name], *fill[: longest - len(one[name])]] for one in packs])

    return {
        "input_ids": filled("input_ids", [padding] * longest),
        "labels": filled("labels", [UNSEEN] * longest),
        "position_ids": filled("position_ids", range(longest)),
        "use_cache": False,  # with a cache, models take all for one row
    }


def check_kept_apart(model: nn.Module, examples: Sequence[Example]) -> None:
    """Compute two rows of the data together and alone, before anything is trained.

    Raises:
        SettingError: a row changes what the model says of its neighbour, or is read otherwise than alone.
    """
    rows = [example["input_ids"][:8] for example in examples[:2]]
    first, last = rows[0], rows[-1]
    other = [first[-1]] * len(first)
    apart = "position_ids" in inspect.signature(model.forward).parameters
    if apart:
        with inference(model):
            beside, besides, alone = (_logits(model, row, last) for row in (first, other, []))
        scale = float(alone.std()) or 1.0
        close = 1e-3 if alone.dtype == torch.float32 else 0.1
        seen = float((beside - besides).abs().max()) / scale
        moved = float((beside - alone).abs().max()) / scale
        apart = seen < close / 100 and moved < close
    if not apart:
        raise SettingError(
            f"packing does not work with {type(model).__name__}: a row would see its neighbours; leave it out, rows of "
            "like length share a batch anyway"
        )


def _logits(model: nn.Module, before: list[int], row: list[int]) -> Tensor:
    """What the model says of a row that stands behind another one."""
    device = next(model.parameters()).device
    rows = [{"input_ids": one, "labels": one} for one in (before, row) if one]
    batch = {name: value for name, value in collate_packs([_joined(rows)], 0).items() if name != "labels"}
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return cast(Any, model)(**inputs).logits[0, len(before) :]

"""transformers' schedules of the learning rate, without a first step that learns nothing."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainingArguments, get_scheduler  # pyright: ignore[reportUnknownVariableType]


def warmed_schedule(args: TrainingArguments, optimizer: Optimizer, steps: int) -> LRScheduler:
    """The schedule of a run whose warm-up of W steps rises through 1/(W+1), 2/(W+1), ... of the learning rate.

    transformers begins a warm-up at 0, so that its first step, one of seventeen in a short run, changes nothing. This
    is its schedule of one more step, seen from its second; behind the warm-up it is the same.
    """
    warm = args.get_warmup_steps(steps)
    made = cast(Callable[..., Any], cast(object, get_scheduler))
    given: dict[str, Any] = {"scheduler_specific_kwargs": args.lr_scheduler_kwargs}
    if warm == 0:
        return made(args.lr_scheduler_type, optimizer, 0, steps, **given)
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    longer = made(args.lr_scheduler_type, stand_in, warm + 1, steps + 1, **given)
    rate: Callable[[int], float] = longer.lr_lambdas[0]
    return LambdaLR(optimizer, lambda step: rate(step + 1))

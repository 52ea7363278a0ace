"""What a run says of its own result: how the adapter compares in size, and whether anything was learned."""

from collections.abc import Mapping
from typing import Any, cast

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from randbasis.train.task import LOWER_IS_BETTER
from randbasis.train.trainer import parameter_groups
from randbasis.tuner.layer import RandbasisLinear

FLOAT_BYTES = 4


def compared_size(model: nn.Module) -> dict[str, Any] | None:
    """LoRA of rank one on the same matrices, Σ (in + out) in float32, counted; ``None`` where there is no adapter.

    Returns:
        ``coefficients`` and ``bytes`` of such a LoRA, and how many ``times`` those of this adapter that is.
    """
    if not isinstance(model, PeftModel):
        return None
    name = model.active_adapters[0]
    count = 0
    for module in cast(Any, model).modules():
        if isinstance(module, RandbasisLinear) and name in module.adapted:
            count += sum(one.bound.in_features + one.bound.out_features for one in module.matrices(name))
        elif isinstance(module, LoraLayer) and name in module.lora_A:
            lora = cast(Any, module)
            count += int(lora.in_features) + int(lora.out_features)
    own = sum(parameter.numel() for parameter in parameter_groups(model)["adapter"].values())
    return {"coefficients": count, "bytes": FLOAT_BYTES * count, "times": round(count / own, 2)}


def doubts(metric: str, before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """What speaks against a result, in sentences; empty where nothing does."""
    found: list[str] = []
    if metric in before and metric in after:
        better = after[metric] < before[metric] if metric in LOWER_IS_BETTER else after[metric] > before[metric]
        if not better:
            found.append(
                f"{metric} after training ({after[metric]:.4f}) is no better than before ({before[metric]:.4f}); try "
                "another learning rate, more steps or a larger rank"
            )
    if after.get("matthews") == 0.0:
        found.append(
            "Matthews' coefficient is 0: the answers do not depend on the rows, most likely all are of one class; try "
            "a lower learning rate, or class weights where the classes are of unequal size"
        )
    return found

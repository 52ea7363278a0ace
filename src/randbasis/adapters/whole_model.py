"""A model from its checkpoint, whole: nothing drawn anew and nothing left out but where the caller says so.

``from_pretrained`` draws what a checkpoint lacks, or has in another shape, and leaves out what it does not know; it
says so in a log at most. Here each of these is refused, by name, outside of a head that is about to be replaced.
"""

from collections.abc import Collection, Iterable
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from randbasis.adapters.base_model import model_readable
from randbasis.adapters.hub_reach import within_reach
from randbasis.errors import PartialModelError

POOLER = "pooler"
"""The part of a backbone that only a head uses."""
_WRAPPERS = ("_orig_mod.", "module.")
_SHOWN = 3


def load_whole(
    auto: Any, name: str, *, given: Collection[str] = (), other_head: bool = False, fresh_head: bool = False, **how: Any
) -> tuple[PreTrainedModel, list[str]]:
    """Read a model, every weight of it from its checkpoint.

    Args:
        auto: auto class of transformers.
        name: folder or hub name.
        given: parameters that the caller is about to set, of whatever shape they are in the checkpoint.
        other_head: the checkpoint may have a head that the model has no place for.
        fresh_head: the head, a pooler included, may be drawn from torch's current generator.
        how: for ``from_pretrained``.

    Returns:
        The model, and the names of the parameters that are not from the checkpoint.

    Raises:
        DataMissingError: the model cannot be read.
        RemoteError: it is on a hub that cannot be reached.
        PartialModelError: the checkpoint lacks weights, has others, or has them in another shape.
    """
    with model_readable(name, "weights"), within_reach(name):
        model, report = auto.from_pretrained(name, ignore_mismatched_sizes=True, output_loading_info=True, **how)
    base = cast("PreTrainedModel", model)
    mismatched = {key: shapes for key, *shapes in report["mismatched_keys"]}
    lacking = {*report["missing_keys"], *mismatched}
    wrong = sorted(key for key in lacking - {*given} if not (fresh_head and _in_head(base, key)))
    if wrong:
        raise _partial(base, name, wrong, mismatched, report["unexpected_keys"])
    unknown = _without_buffers(base, report["unexpected_keys"])
    strange = sorted(key for key in unknown if not ((other_head or fresh_head) and _in_head(base, key)))
    if strange:
        raise PartialModelError(
            f"model {name!r} must have no weights but those of {type(base).__name__} (by its config.json), it has "
            f"{_shown(strange)} too, which would be left out; name the checkpoint of that class, or mend its config"
        )
    return base, sorted(lacking)


def _in_head(model: PreTrainedModel, key: str) -> bool:
    """Whether a parameter lies behind the backbone, or in the pooler of it."""
    prefix = model.base_model_prefix
    backbone = model.base_model
    parts = key.split(".")
    if prefix and parts[0] == prefix:
        parts = parts[1:]
    elif backbone is not model and parts[0] in dict(model.named_children()):
        return True
    return POOLER in parts[:1] or not parts or parts[0] not in dict(backbone.named_children())


def _without_buffers(model: PreTrainedModel, keys: Iterable[str]) -> set[str]:
    """Without tables that a model makes by itself, which older checkpoints hold."""
    buffers = {name for name, _ in cast("nn.Module", model).named_buffers()}
    return {key for key in keys if not any(name == key or name.endswith(f".{key}") for name in buffers)}


def _partial(
    model: PreTrainedModel, name: str, wrong: list[str], mismatched: dict[str, Any], unknown: Collection[str]
) -> PartialModelError:
    told = [
        f"{key} of shape {list(mismatched[key][1])} and not {list(mismatched[key][0])}" if key in mismatched else key
        for key in wrong
    ]
    wrapper = next((one for one in _WRAPPERS if any(key.startswith(one) for key in unknown)), None)
    way_out = (
        f"its names begin with {wrapper!r}, which a wrapper such as torch.compile or DataParallel put there: save "
        f"the model inside of it (model.{wrapper.removesuffix('.')})"
        if wrapper
        else "take a whole checkpoint, or mend its config.json"
    )
    return PartialModelError(
        f"model {name!r} must have all weights of {type(model).__name__} (by its config.json), it has no weights for "
        f"{_shown(told)}, which would be drawn anew; {way_out}"
    )


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

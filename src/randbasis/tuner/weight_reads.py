"""Modules whose weight is read by the module around them, which then goes past the module and whatever is put on it.

``nn.MultiheadAttention`` hands the weight of its ``out_proj`` to a kernel, and so do WavLM's attention and the mixers
of Mamba and its kin: an adapter there would train nothing, or train on one machine and not be seen on another. Which
modules these are is read from the code of the classes as they are installed: every ``self.name.weight`` in what
they compute with.
"""

import dis
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

Path = tuple[str, ...]
"""Names of attributes from a module down to one whose weight is read.

``"*"`` is first where it may lie anywhere below, and ``"?"`` stands for any one name: an entry of a list.
"""

_ABOUT = frozenset(
    {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "is_cuda", "is_meta", "requires_grad", "__class__"}
)
"""What can be asked of a weight without using its numbers."""
_ATTRIBUTES = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_QUESTIONS = frozenset({"isinstance", "hasattr", "getattr", "type", "id"})

_NO_COMPUTATION = (
    "__",
    "_init",
    "init_",
    "reset_",
    "tie_",
    "_tie",
    "get_",
    "set_",
    "extra_",
    "prune",
    "resize",
    "_load",
)

_HARMLESS: Mapping[tuple[str, str], Callable[[nn.Module], bool]] = {
    # Fast paths that fast_paths.py turns off.
    ("TransformerEncoderLayer", "linear1"): lambda _: True,
    ("TransformerEncoderLayer", "linear2"): lambda _: True,
    ("TransformerEncoder", "linear1"): lambda _: True,
    ("TransformerEncoder", "linear2"): lambda _: True,
    # Slices of a checkpoint that was trained in parts; off unless a configuration asks for it.
    ("BloomAttention", "dense"): lambda module: not _slow_but_exact(module),
    ("BloomMLP", "dense_4h_to_h"): lambda module: not _slow_but_exact(module),
    # Only for queries of another stream, which no model of transformers hands over.
    ("DisentangledSelfAttention", "in_proj"): lambda _: True,
    # Weights divided in evaluation, with the hidden states; off by the configuration.
    ("RwkvModel", "output"): lambda module: getattr(getattr(module, "config", None), "rescale_every", 0) <= 0,
    ("RwkvModel", "value"): lambda module: getattr(getattr(module, "config", None), "rescale_every", 0) <= 0,
}
"""``(class, last name)`` → whether the read does no harm in this module."""


def weight_reader(model: nn.Module, key: str) -> nn.Module | None:
    """The module above a target that reads its weight without calling it; None where every use is a call.

    Args:
        model: the whole model.
        key: path of the target.
    """
    names = key.split(".")
    above: nn.Module = model
    for depth in range(len(names)):
        below = tuple(names[depth:])
        reads = _reads_of(type(above), type(above).forward)
        if (own := vars(above).get("forward")) is not None:
            reads = reads.union(*(_weights_read(code) for code in _codes(own)))
        if any(_meets(path, below) for path in reads) and not _harmless(above, names[-1]):
            return above
        above = cast("nn.Module", getattr(above, names[depth]))
    return None


def _meets(path: Path, below: Path) -> bool:
    if path[0] == "*":
        return len(path) <= len(below) and below[len(below) - len(path) + 1 :] == path[1:]
    return len(path) == len(below) and all(name in ("?", there) for name, there in zip(path, below, strict=True))


def _harmless(module: nn.Module, name: str) -> bool:
    return any(
        rule(module) for kind in type(module).__mro__ if (rule := _HARMLESS.get((kind.__name__, name))) is not None
    )


def _slow_but_exact(module: nn.Module) -> bool:
    return bool(getattr(module, "slow_but_exact", False)) and getattr(module, "pretraining_tp", 1) > 1


@lru_cache(maxsize=1024)
def _reads_of(kind: type[nn.Module], _forward: object) -> frozenset[Path]:
    """What the functions of a class read the weight of; its ``forward`` too, which may be replaced while we run."""
    found: set[Path] = set()
    for name in _own_names(kind):
        if not name.startswith(_NO_COMPUTATION):
            for code in _codes(inspect.getattr_static(kind, name, None)):
                found |= _weights_read(code)
    return frozenset(found)


def _own_names(kind: type[nn.Module]) -> set[str]:
    """What a class and its parents define, short of what every module and every model of transformers has."""
    names = {name for one in kind.__mro__ for name in vars(one)} - set(dir(PreTrainedModel))
    return names | {"forward"}


def _codes(function: Any) -> Iterator[CodeType]:
    """The code of a function, of what it decorates and of the functions inside of it."""
    for inner in (getattr(function, "fget", None), getattr(function, "__func__", None)):
        if inner is not None:
            function = inner
    function = inspect.unwrap(function) if callable(function) else None
    if not isinstance(function, FunctionType):
        return
    for cell in function.__closure__ or ():
        if isinstance(inner := _content(cell), FunctionType) and inner is not function:
            yield inner.__code__
    waiting = [function.__code__]
    while waiting:
        code = waiting.pop()
        yield code
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a cell that nothing was put into
        return None


@lru_cache(maxsize=4096)
def _weights_read(code: CodeType) -> frozenset[Path]:
    """Chains of attributes that end in ``.weight`` whose numbers are used."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("PUSH_NULL", "CACHE", "PRECALL")]
    found: set[Path] = set()
    for index, step in enumerate(steps):
        if step.opname != "LOAD_ATTR" or step.argval != "weight":
            continue
        if _only_asked(steps, index):
            continue
        start = index
        while start and steps[start - 1].opname in ("LOAD_ATTR", "LOAD_METHOD"):
            start -= 1
        chain = tuple(cast("str", one.argval) for one in steps[start:index])
        before = steps[start - 2] if start >= 2 else step
        if not chain and (owner := _owner(steps, index)):
            found.add(owner)
        if not chain or (before.opname.startswith("LOAD_GLOBAL") and before.argval in _QUESTIONS):
            continue
        of_self = start > 0 and "self" in _names(steps[start - 1].argval)
        found.add(chain if of_self else ("*", *chain))
    return frozenset(found)


def _only_asked(steps: Sequence[dis.Instruction], index: int) -> bool:
    """Whether of a weight that is loaded nothing is used but what it is like, or whether there is one."""
    after = steps[index + 1 : index + 4]
    if after and after[0].opname in _ATTRIBUTES and after[0].argval == "data":
        after = after[1:]
    if not after:
        return False
    if after[0].opname in _ATTRIBUTES:
        return after[0].argval in _ABOUT
    compared = len(after) > 1 and after[0].argval is None and after[1].opname == "IS_OP"
    return compared or after[0].opname.endswith(("_IF_NONE", "_IF_NOT_NONE"))


def _owner(steps: Sequence[dis.Instruction], index: int) -> Path | None:
    """The path below ``self`` of what is loaded before an instruction: by a local name, from a list, in a loop over it.

    None where it is computed in another way, which the first backward pass tells of.
    """
    step = steps[index - 1] if index else None
    if step is None:
        return None
    if step.opname in _ATTRIBUTES:
        return _below(_owner(steps, index - 1), cast("str", step.argval))
    if step.opname == "BINARY_SUBSCR" or (step.opname == "BINARY_OP" and step.argrepr == "[]"):
        key = steps[index - 2]
        name = key.argval if isinstance(key.argval, str) and key.opname == "LOAD_CONST" else "?"
        return _below(_owner(steps, index - 2), name) if key.opname.startswith("LOAD_") else None
    if not (step.opname.startswith("LOAD_FAST") or step.opname.endswith("LOAD_FAST") or step.opname == "LOAD_DEREF"):
        return None
    variable = _names(step.argval)[-1]
    if variable == "self":
        return ()
    for place in range(index - 1):
        if steps[place].opname.startswith("STORE_FAST") and _names(steps[place].argval)[0] == variable:
            loops = place > 1 and steps[place - 1].opname == "FOR_ITER" and steps[place - 2].opname == "GET_ITER"
            owner = _below(_owner(steps, place - 2), "?") if loops else _owner(steps, place)
            if owner:
                return owner
    return None


def _below(owner: Path | None, name: str) -> Path | None:
    return None if owner is None else (*owner, name)


def _names(argument: Any) -> tuple[str, ...]:
    """The variables that an instruction loads: newer Pythons load two at once."""
    return cast("tuple[str, ...]", argument) if isinstance(argument, tuple) else (argument,)

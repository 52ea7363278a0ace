"""WHICH MATRICES SHARE ONE COEFFICIENT VECTOR, math (26): by the paths of their modules, and by nothing else.

A block is what the first number of a path counts: ``model.layers.3`` of ``model.layers.3.mlp.experts.7.up_proj``.
Blocks of two lists (encoder and decoder) are never in one group, and what lies in no block is a group of its own.
"""

import re
from collections.abc import Iterable

from randbasis.errors import TieError

UNTIED = "matrix"
"""Every matrix has its own coefficients."""
MODEL = "model"
"""All matrices share one vector."""
_BLOCKS = re.compile(r"block:([1-9][0-9]{0,8})")


def check_tie(tie: object) -> str:
    """A value of the option ``tie``, as it was given.

    Raises:
        TieError: it is not one.
    """
    if tie in (UNTIED, MODEL) or (isinstance(tie, str) and _BLOCKS.fullmatch(tie)):
        return str(tie)
    raise TieError(
        f"tie must be {UNTIED!r} (coefficients of its own for each matrix), 'block:N' (one vector for N consecutive "
        f"blocks) or {MODEL!r} (one for all), got {tie!r}; use for example tie='block:4'"
    )


def group_of(path: str, tie: str) -> str:
    """What names the group of a matrix; the path itself where nothing is shared.

    Args:
        path: module path.
        tie: from :func:`check_tie`.
    """
    if tie == UNTIED:
        return path
    blocks = _BLOCKS.fullmatch(tie)
    if blocks is None:
        return ""
    words = path.split(".")
    at = next((place for place, word in enumerate(words) if word.isascii() and word.isdigit()), None)
    if at is None:
        return ""
    return f"{'.'.join(words[:at])}.{int(words[at]) // int(blocks[1])}"


def owners(paths: Iterable[str], tie: str) -> list[int]:
    """For each matrix the place of the first one of its group.

    Args:
        paths: of their modules, in the order that decides which is the first.
        tie: from :func:`check_tie`; not :data:`UNTIED`, where parts of one layer are matrices of their own.
    """
    first: dict[str, int] = {}
    return [first.setdefault(group_of(path, tie), place) for place, path in enumerate(paths)]

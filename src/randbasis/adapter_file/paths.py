"""Module paths: many layers of one pattern as a few lines, and names that no file may carry.

``model.layers.0.mlp.up_proj`` … ``model.layers.31.mlp.up_proj`` is the pattern ``model.layers.*.mlp.up_proj`` with the
layers ``0-31``: one list of numbers for each ``*``, and every combination of them is meant.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from itertools import product

from randbasis.errors import SpecValueError, UnsafeNameError

_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_RANGE = re.compile(r"(0|[1-9][0-9]{0,8})(?:-([1-9][0-9]{0,8}))?")
_UNSAFE_START = re.compile(r"[/\\~]|[A-Za-z]:[/\\]|[A-Za-z]:$|file:")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")

Numbers = tuple[range, ...]
"""Ascending ranges that do not touch: the numbers that one ``*`` stands for."""


def check_name(name: str, what: str, where: str) -> None:
    """Raise unless a name is one that cannot lead out of the directory it is used in.

    Args:
        name: the name.
        what: which name it is, for the message.
        where: the file, for the message.

    Raises:
        UnsafeNameError: it is an absolute path, climbs with ``..``, is empty or has control characters.
    """
    climbs = ".." in re.split(r"[/\\]", name)
    if not name or climbs or _UNSAFE_START.match(name) or _CONTROL.search(name):
        raise UnsafeNameError(
            f"{where}: {what} must be a relative name without '..' and control characters, got {name!r}; "
            "do not use this file, or pack the adapter again under a plain name"
        )


def check_module_path(path: str, where: str) -> None:
    """Raise unless a name is a safe path of modules joined by dots.

    Raises:
        UnsafeNameError: see :func:`check_name`.
        SpecValueError: a component is empty.
    """
    check_name(path, "the path of a module", where)
    if "" in path.split("."):
        raise SpecValueError(
            f"{where}: the path of a module must be names joined by single dots, got {path!r}; pack the adapter again"
        )


def split_path(path: str) -> tuple[str, tuple[int, ...]]:
    """A module path as its pattern and the numbers that stand for the ``*`` in it.

    Args:
        path: ``"model.layers.3.mlp"``, which gives ``("model.layers.*.mlp", (3,))``.
    """
    parts = path.split(".")
    numbers = tuple(int(part) for part in parts if _NUMBER.fullmatch(part))
    return ".".join("*" if _NUMBER.fullmatch(part) else part for part in parts), numbers


def join_path(pattern: str, numbers: Sequence[int]) -> str:
    """The inverse of :func:`split_path`."""
    left = iter(numbers)
    return ".".join(str(next(left)) if part == "*" else part for part in pattern.split("."))


def boxes(numbers: Collection[tuple[int, ...]]) -> list[tuple[Numbers, ...]]:
    """Number tuples of one length as products of number sets; the same tuples always give the same products.

    Args:
        numbers: ``{(0, 1), (0, 2), (5, 1), (5, 2)}`` gives one product, ``{0, 5} × {1, 2}``.
    """
    if not next(iter(numbers), ()):
        return [()]
    tails: dict[int, set[tuple[int, ...]]] = {}
    for first, *tail in numbers:
        tails.setdefault(first, set()).add(tuple(tail))
    alike: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for first in sorted(tails):
        alike.setdefault(frozenset(tails[first]), []).append(first)
    return [(_ranges(firsts), *rest) for tail, firsts in alike.items() for rest in boxes(tail)]


def expand(pattern: str, layers: Sequence[Numbers]) -> Iterable[str]:
    """Every path that a pattern and its layers stand for, in ascending order of the numbers."""
    each = [[number for part in numbers for number in part] for numbers in layers]
    return (join_path(pattern, chosen) for chosen in product(*each))


def range_text(numbers: Numbers) -> str:
    """``"0-31"``, ``"0,2,5-9"``."""
    return ",".join(str(part.start) if len(part) == 1 else f"{part.start}-{part.stop - 1}" for part in numbers)


def parse_ranges(text: str, where: str) -> Numbers:
    """The inverse of :func:`range_text`.

    Raises:
        SpecValueError: the text is not ascending ranges of whole numbers.
    """
    ranges: list[range] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        start = int(match[1]) if match else 0
        stop = int(match[2] or match[1]) + 1 if match else 0
        if match is None or (match[2] and stop - start < 2) or (ranges and start <= ranges[-1].stop):
            raise SpecValueError(
                f"{where}: layers must be ascending numbers and ranges such as '0-31' or '0,2,5-9', got {text!r}; "
                "pack the adapter again"
            )
        ranges.append(range(start, stop))
    return tuple(ranges)


def _ranges(ascending: Sequence[int]) -> Numbers:
    ranges: list[range] = []
    for number in ascending:
        if ranges and number == ranges[-1].stop:
            ranges[-1] = range(ranges[-1].start, number + 1)
        else:
            ranges.append(range(number, number + 1))
    return tuple(ranges)

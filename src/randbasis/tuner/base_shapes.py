"""The shapes of the layers that an adapter was made for, kept in its configuration with the layer numbers as ``*``."""

import re
from collections.abc import Mapping, Sequence


def compress_shapes(shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[int]]:
    """One entry for all layers of a pattern that have one shape, else one for each.

    Args:
        shapes: module path → ``(out, in)``.
    """
    patterns = {key: generic_path(key) for key in shapes}
    by_pattern: dict[str, set[tuple[int, int]]] = {}
    for key, shape in shapes.items():
        by_pattern.setdefault(patterns[key], set()).add(shape)
    return {
        (patterns[key] if len(by_pattern[patterns[key]]) == 1 else key): list(shape) for key, shape in shapes.items()
    }


def expected_shape(base_shapes: Mapping[str, Sequence[int]] | None, key: str) -> tuple[int, int] | None:
    """The shape kept for a module, by its whole path or, under a wrapper, by the end of it; None where none is kept."""
    shapes = base_shapes or {}
    for name in (key, generic_path(key)):
        found = shapes.get(name) or next(
            (shape for known, shape in shapes.items() if name.endswith(f".{known}") or known.endswith(f".{name}")), None
        )
        if found is not None:
            return found[0], found[1]
    return None


def generic_path(key: str) -> str:
    """A module path with its numbers replaced by ``*``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", key)

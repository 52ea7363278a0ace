"""Which matrices of a model a configuration names: modules, and slices of fused projections, math §4.

A target is a module name as PEFT understands it, optionally with parts in brackets: ``c_attn[q]``, ``c_attn[q,v]``,
``gate_up_proj[up]``, ``qkv[1/3]`` (the second of three equal parts), ``qkv[0:192]`` (output rows). What a name means
stands in :mod:`randbasis.tuner.fused_layouts`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from randbasis.errors import RandbasisError, SliceError, TargetError, near
from randbasis.tuner.fused_layouts import known_layout

_TARGET = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<parts>[^\[\]]*)\])?")
_NAMES = {"q": "q", "k": "k", "v": "v", "query": "q", "key": "k", "value": "v", "gate": "gate", "up": "up"}


@dataclass(frozen=True, slots=True)
class Part:
    """A range of output rows of a layer.

    Attributes:
        name: as the user wrote it; empty for the whole layer.
        start: first row.
        stop: row after the last.
    """

    name: str
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Number of output rows."""
        return self.stop - self.start

    @property
    def suffix(self) -> str:
        """The name as the end of an attribute name."""
        return "_" + re.sub(r"\W", "_", self.name) if self.name else ""


def split_names(text: str) -> list[str]:
    """Split ``"c_attn[q,v],c_fc"`` at the commas that are not in brackets.

    A regular expression, ``re:PATTERN``, is one name whatever it contains.
    """
    if text.startswith("re:"):
        return [text]
    return [name.strip() for name in re.split(r",(?![^\[]*\])", text) if name.strip()]


def split_slices(targets: Iterable[str]) -> tuple[set[str], dict[str, list[str]]]:
    """Module names, and the parts asked for of those that have any.

    Args:
        targets: entries of ``target_modules``.

    Returns:
        ``{"c_attn", "c_fc"}`` and ``{"c_attn": ["q", "v"]}`` for ``["c_attn[q]", "c_attn[v]", "c_fc"]``.

    Raises:
        TargetError: an entry is not of the form ``name`` or ``name[part,...]``.
        SliceError: a module is named both whole and in parts.
    """
    whole: set[str] = set()
    slices: dict[str, list[str]] = {}
    for target in targets:
        match = _TARGET.fullmatch(target)
        if match is None:
            raise TargetError(
                f"target_modules entries must look like 'name' or 'name[part,part]', got {target!r}; "
                "write for example 'c_attn[q,v]'"
            )
        name, parts = match["name"], match["parts"]
        if parts is None:
            whole.add(name)
            continue
        wanted = [part.strip() for part in parts.split(",") if part.strip()]
        if not wanted:
            raise SliceError(f"target_modules entry {target!r} names no part; write for example {name}[q]")
        known = slices.setdefault(name, [])
        known.extend(part for part in wanted if part not in known)
    both = sorted(whole & slices.keys())
    if both:
        raise SliceError(
            f"target_modules names {both[0]!r} both whole and in parts {slices[both[0]]}; keep one of the two"
        )
    return whole | slices.keys(), slices


def check_expression(argument: str, pattern: Any, matched: str, error: type[RandbasisError]) -> None:
    """Raise unless a pattern of module names is a regular expression.

    Args:
        argument: what it was given as.
        pattern: as written.
        matched: as it is matched, with what stands around it.
        error: class to raise.
    """
    try:
        re.compile(matched)
    except re.error as reason:
        raise error(
            f"{argument} must hold regular expressions of module names, got {pattern!r}: {reason}; "
            rf"put a backslash before a sign that stands for itself, as in 'layers\.0\.'"
        ) from reason


def parts_of(key: str, slices: Mapping[str, list[str]]) -> list[str]:
    """The parts asked for of the module ``key``: those of the longest name that matches it, none for a whole module."""
    names = [name for name in slices if key == name or key.endswith(f".{name}")]
    return list(slices[max(names, key=len)]) if names else []


def resolve_parts(key: str, wanted: list[str], out_features: int, model_config: Mapping[str, Any]) -> list[Part]:
    """Output rows of each part, in the order of the rows.

    Names (``q``, ``k``, ``v``, ``gate``, ``up``) are taken where :data:`~randbasis.tuner.fused_layouts.LAYOUTS` knows
    how the model splits the layer.

    Args:
        key: module path, for messages.
        wanted: part names; empty for the whole layer.
        out_features: output rows of the layer.
        model_config: the model's configuration as a mapping, those of its parts inside.

    Raises:
        SliceError: a part is unknown here, does not divide the layer, lies outside of it or overlaps another.
    """
    if not wanted:
        return [Part("", 0, out_features)]
    parts = sorted((_resolve(key, name, out_features, model_config) for name in wanted), key=lambda p: p.start)
    for first, second in pairwise(parts):
        if second.start < first.stop:
            raise SliceError(
                f"parts of {key!r} must not overlap, got {first.name}={first.start}:{first.stop} and "
                f"{second.name}={second.start}:{second.stop}; leave one out"
            )
    return parts


def _resolve(key: str, name: str, rows: int, model_config: Mapping[str, Any]) -> Part:
    if match := re.fullmatch(r"(\d+):(\d+)", name):
        start, stop = int(match[1]), int(match[2])
        if not 0 <= start < stop <= rows:
            raise SliceError(f"rows {name} of {key!r} must lie in 0:{rows} and not be empty; use for example 0:{rows}")
        return Part(name, start, stop)
    if match := re.fullmatch(r"(\d+)/(\d+)", name):
        return _equal(key, name, int(match[1]), int(match[2]), rows)
    if name in _NAMES:
        return _named(key, name, rows, model_config)
    raise SliceError(
        f"part {name!r} of {key!r} is unknown: {near(name, _NAMES)}; or write rows 'start:stop' or 'i/n' for equal "
        "parts"
    )


def _equal(key: str, name: str, index: int, count: int, rows: int) -> Part:
    if count <= 0 or index >= count:
        raise SliceError(f"part {name!r} of {key!r} must be i/n with i < n, counted from 0; use for example 0/3")
    if rows % count:
        raise SliceError(
            f"part {name!r} of {key!r} does not divide it: {rows} rows are not {count} equal parts; "
            "name the rows, for example [0:64]"
        )
    size = rows // count
    return Part(name, index * size, (index + 1) * size)


def _named(key: str, name: str, rows: int, model_config: Mapping[str, Any]) -> Part:
    found = known_layout(key, rows, model_config)
    if found is None:
        kind = model_config.get("model_type")
        whose = "a model without a model type" if kind in (None, "custom") else f"model type {kind!r}"
        raise SliceError(
            f"part {name!r} of {key!r} must be one of a layout that is known, and none is for this layer of {whose}: "
            f"models split fused projections in different ways; name the rows, for example [0:{max(rows // 3, 1)}], or "
            "equal parts, [0/3] for the first of three, as the model's own code splits them"
        )
    model_type, sizes = found
    if sizes is None:
        raise SliceError(
            f"part {name!r} of {key!r} is not one range of rows: this projection of model type {model_type!r} "
            "interleaves query, key and value by head; adapt the whole layer, or name rows 'start:stop'"
        )
    start = 0
    for part, size in sizes.items():
        if part == _NAMES[name]:
            return Part(name, start, start + size)
        start += size
    raise SliceError(
        f"part {name!r} of {key!r} must be one of {list(sizes)}, which is what this layer of model type {model_type!r} "
        "holds; or write rows 'start:stop'"
    )

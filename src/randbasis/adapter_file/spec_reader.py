"""A spec from a file that nothing is known of: every key, kind and range is checked before anything is built."""

import math
import re
import threading
import types
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal, Union, cast, get_args, get_origin

from randbasis.adapter_file.header import parse_object
from randbasis.adapter_file.paths import Numbers, check_module_path, check_name, parse_ranges
from randbasis.adapter_file.short_spec import long_entries
from randbasis.adapter_file.spec import STORED, Base, MatrixGroup, Spec, SpecMatrix, ordered
from randbasis.errors import RandbasisError, SpecKeyError, SpecSyntaxError, SpecValueError, near
from randbasis.methods import Method, method_class
from randbasis.precision import check_precision
from randbasis.ties import UNTIED, check_tie

SIDE_LIMIT = 1 << 32
"""Rows and columns of a layer stay below this: the counters of math (2) have 32 bits."""
MATRIX_LIMIT = 1 << 18
"""Most adapted matrices of one file."""

KNOWN_LIMIT, KNOWN_TEXT, KNOWN_MATRICES = 128, 1 << 16, 4096
"""How many specs are remembered; their longest text in characters, and most matrices."""

_DIGEST_VALUE = re.compile(r'"(digest|digest_rest)":"([0-9a-f]{64})"')
_KNOWN: dict[str, tuple[Spec, str | None]] = {}
_KNOWN_LOCK = threading.Lock()
_KEYS = {"method", "options", "seed", "law", "base", "matrices", "bits"}
_MAY = {"group", "extra", "peft", "task"}
_LONG_MAY, _SHORT_MAY = {"digest_rest"}, {"tie", "streams"}
"""Of versions 1 and 2."""
_DIGEST = re.compile(r"[0-9a-f]{64}")
_WEIGHTS = re.compile(r"[0-9a-f]{16}")
_PART = re.compile(r"[0-9A-Za-z_]+([:/][0-9A-Za-z_]+)?")


@dataclass(frozen=True)
class Digests:
    """What a spec says that hashing gives.

    Attributes:
        coefficients: SHA-256 of the bytes of the coefficients.
        rest: SHA-256 of the bytes of all other tensors; None where there are none.
        fingerprint: of the base model.
    """

    coefficients: str
    rest: str | None
    fingerprint: str


def parse_spec(text: str, where: str) -> tuple[Spec, Digests | None]:
    """Read the text of a spec.

    Adapters of one kind have specs that differ in their digests alone; they share one :class:`Spec`, with all that is
    worked out from it.

    Args:
        text: of ``__metadata__["spec"]``.
        where: the file, for messages.

    Returns:
        The spec, and its digests: None of version 2, whose file has one digest of everything.

    Raises:
        SpecSyntaxError: it is not a JSON object.
        SpecKeyError: a key is missing or unknown.
        SpecValueError: a value is of another kind or range than its key promises.
        UnsafeNameError: a name leads out of its directory.
        RandbasisError: what the method raises for its hyper-parameters: an unknown method or law, a seed or rank that
            cannot be.
    """
    if len(text) > KNOWN_TEXT or "\0" in text:  # no JSON has that character: it can stand for a digest
        return _parse_spec(text, where)
    kind, pairs = _DIGEST_VALUE.sub('"\\1":"\0"', text), _DIGEST_VALUE.findall(text)
    found = dict(pairs)
    with _KNOWN_LOCK:
        known = _KNOWN.get(kind)
    if known is not None:
        print_ = known[1]
        return known[0], None if print_ is None else Digests(found["digest"], found.get("digest_rest"), print_)
    spec, digests = _parse_spec(text, where)
    if spec.size <= KNOWN_MATRICES and _own_digests(text, len(pairs), found):
        with _KNOWN_LOCK:
            if len(_KNOWN) >= KNOWN_LIMIT:
                del _KNOWN[next(iter(_KNOWN))]
            _KNOWN[kind] = spec, None if digests is None else digests.fingerprint
    return spec, digests


def _own_digests(text: str, pairs: int, found: Mapping[str, str]) -> bool:
    """Whether the pairs that look like digests in a text are those of the spec itself, however it writes them."""
    if pairs != len(found):
        return False
    marked = parse_object(_DIGEST_VALUE.sub('"\\1":"?"', text))
    return all(marked.get(name) == ("?" if name in found else None) for name in ("digest", "digest_rest"))


def _parse_spec(text: str, where: str) -> tuple[Spec, Digests | None]:
    try:
        document = parse_object(text)
    except ValueError as error:
        raise SpecSyntaxError(
            f"{where}: the spec must be a JSON object, but {error} in {text[:60]!r}; take the file from its source"
        ) from error
    short = "tie" in document
    digests = set[str]() if short else {"digest"}
    _check_keys(document, _KEYS | digests, _MAY | (_SHORT_MAY if short else _LONG_MAY), "the spec", where)
    common = _method(document, where)
    bits, group = _whole(document, "bits", where), _whole(document, "group", where, missing=0)
    with naming(where):
        check_precision(bits, group)
    base, print_ = _base(_object(document, "base", where), where, weights=common.needs_base, short=short)
    entries = _list(document, "matrices", where)
    if short:
        entries = [one for entry in entries for one in _long_entries(entry, where)]
    groups = tuple(_group(entry, common, where) for entry in entries)
    groups = ordered(groups) if short else groups
    extra = tuple(_text(name, "a name in extra", where) for name in _list(document, "extra", where, missing=True))
    for name in extra:
        check_name(name, "the name of a tensor", where)
    if list(extra) != sorted(set(extra)):
        raise _wrong("extra", "sorted names without repetition", list(extra), where)
    peft, task = _object(document, "peft", where, missing=True), _task(document, where)
    spec = Spec(common, base, groups, bits, group, extra, peft, task, *_tie(document, where))
    if not 1 <= spec.size <= MATRIX_LIMIT:
        raise _wrong("matrices", f"1 to {MATRIX_LIMIT} matrices", spec.size, where)
    with naming(where):
        _ = spec.tie == UNTIED or spec.owners
    if print_ is None:
        return spec, None
    rest = _digest(document, "digest_rest", where) if "digest_rest" in document else None
    return spec, Digests(_digest(document, "digest", where), rest, print_)


def _tie(document: Mapping[str, Any], where: str) -> tuple[str, bool]:
    """What shares coefficients, and whether the streams are those of the paths."""
    with naming(where):
        tie = check_tie(document.get("tie", UNTIED))
    if tie == UNTIED and document.keys() & {"tie", "streams"}:
        raise _wrong("tie", "left out, and streams with it, where nothing is shared", document.get("tie"), where)
    if document.get("streams", STORED) != STORED:
        raise _wrong(
            "streams", f"{STORED!r}, or left out where they are those of the paths", document["streams"], where
        )
    return tie, tie != UNTIED and "streams" not in document


def check_layers(spec: Spec, where: str) -> None:
    """Raise where two matrices of a spec claim the same rows of a layer, or shapes of a layer disagree.

    Raises:
        SpecValueError: they do.
    """
    if spec.clash is not None:
        found = [(m.out_features, m.in_features, m.start, m.start + m.rows) for m in spec.clash]
        raise _wrong("matrices", f"parts of one layer {spec.clash[0].name!r} that do not overlap", found, where)


@contextmanager
def naming(where: str) -> Generator[None]:
    """Put the name of the file before the message of an error of this package."""
    try:
        yield
    except RandbasisError as error:
        raise type(error)(f"{where}: {error}") from error


def _method(document: Mapping[str, Any], where: str) -> Method:
    options = _object(document, "options", where)
    common = {"seed": _whole(document, "seed", where), "law": _text(document["law"], "law", where)}
    with naming(where):
        chosen = method_class(_text(document["method"], "method", where))
    return _build(chosen, {**options, **common}, where, complete=True)


def _build(chosen: type[Method], options: Mapping[str, Any], where: str, *, complete: bool = False) -> Method:
    """A method of checked hyper-parameters; ``complete`` asks for each of them."""
    kinds: dict[str, Any] = {f.name: f.type for f in fields(chosen) if f.name != "basis_storage"}
    _check_keys(options, set(kinds) if complete else set(), set(kinds), f"the options of {chosen.name}", where)
    values: dict[str, Any] = {}
    for name, value in options.items():
        if not _fits(value, kinds[name]):
            raise _wrong(f"options.{name}", f"of kind {_kind_name(kinds[name])}", value, where)
        values[name] = float(value) if type(value) is int and _is_real(kinds[name]) else value
    with naming(where):
        return chosen(**values)


def _fits(value: object, kind: Any) -> bool:
    if get_origin(kind) in (Union, types.UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind is float:
        return type(value) in (int, float) and abs(cast("float", value)) < 1e300 and math.isfinite(cast("float", value))
    return value is None if kind is type(None) else type(value) is kind


def _is_real(kind: Any) -> bool:
    return kind is float or float in get_args(kind)


def _kind_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def _base(document: dict[str, Any], where: str, *, weights: bool, short: bool) -> tuple[Base, str | None]:
    """The base of an adapter; ``weights`` says whether its method makes frozen matrices of the base's weights."""
    must = ({"weights"} if weights else set[str]()) | (set[str]() if short else {"fingerprint"})
    _check_keys(document, must, {"name", "architecture"}, "base", where)
    for key in ("name", "architecture"):
        if key in document:
            check_name(_text(document[key], f"base.{key}", where), f"base.{key}", where)
    if weights and not _WEIGHTS.fullmatch(_text(document["weights"], "base.weights", where)):
        raise _wrong("base.weights", "16 hexadecimal digits", document["weights"], where)
    base = Base(document.get("name"), document.get("architecture"), document.get("weights"))
    return base, None if short else _digest(document, "fingerprint", where)


def _long_entries(entry: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(entry, dict):
        raise _wrong("matrices", "a list of objects", entry, where)
    document = cast("dict[str, Any]", entry)
    _check_keys(document, {"of"}, {"at", "layers", "options"}, "an entry of matrices", where)
    if "at" in document:
        _text(document["at"], "at of an entry of matrices", where)
    of = _list(document, "of", where)
    try:
        return long_entries(document)
    except (TypeError, ValueError):
        rule = "a list of matrices, each [name, out, in] or [name, out, in, part, first row, row after the last]"
        raise _wrong("of in matrices", rule, of, where) from None


def _group(entry: object, common: Method, where: str) -> MatrixGroup:
    if not isinstance(entry, dict):
        raise _wrong("matrices", "a list of objects", entry, where)
    document = cast("dict[str, Any]", entry)
    _check_keys(document, {"name", "out", "in"}, {"layers", "part", "rows", "options"}, "an entry of matrices", where)
    name = _text(document["name"], "the name of a matrix", where)
    check_module_path(name, where)
    out, in_ = (_whole(document, key, where, least=1) for key in ("out", "in"))
    if max(out, in_) >= SIDE_LIMIT:
        raise _wrong("out and in", f"below {SIDE_LIMIT}", [out, in_], where)
    part, start, stop = _part(document, out, where)
    options = _object(document, "options", where, missing=True)
    for key in ("seed", "law"):
        if key in options:
            raise _wrong("options", "those of a matrix, which has no seed and law of its own", key, where)
    changed = {f.name: getattr(common, f.name) for f in fields(common) if f.name != "basis_storage"} | options
    method = _build(type(common), changed, where) if options else common
    return MatrixGroup(SpecMatrix(name, part, start, stop - start, out, in_, method), _layers(document, name, where))


def _part(document: Mapping[str, Any], out: int, where: str) -> tuple[str, int, int]:
    if "part" not in document and "rows" not in document:
        return "", 0, out
    part, rows = document.get("part"), document.get("rows")
    if not isinstance(part, str) or not _PART.fullmatch(part) or len(part) > 64:
        raise _wrong("part", "a name such as 'q', '1/3' or '0:192'", part, where)
    bounds = cast("list[object]", rows) if isinstance(rows, list) else []
    if len(bounds) == 2 and all(type(bound) is int for bound in bounds):
        start, stop = cast("list[int]", bounds)
        if 0 <= start < stop <= out:
            return part, start, stop
    raise _wrong("rows", f"first row and the row after the last, within 0:{out}", cast("object", rows), where)


def _layers(document: Mapping[str, Any], name: str, where: str) -> tuple[Numbers, ...]:
    stars = name.split(".").count("*")
    written = _list(document, "layers", where, missing=True)
    if len(written) != stars:
        raise _wrong("layers", f"{stars} ranges, one for each * of {name!r}", written, where)
    return tuple(parse_ranges(_text(text, "layers", where), where) for text in written)


def _task(document: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The description of a task; what is said of a task that only a newer version knows is kept as it is."""
    if "task" not in document:
        return {}
    task = _object(document, "task", where)
    if not isinstance(task.get("task"), str):
        raise SpecKeyError(
            f"{where}: task in the spec must have the key 'task' with the name of the task, such as 'causal-lm', got "
            f"{task.get('task')!r}; pack the adapter again"
        )
    for key in task.keys() & _TASK.keys():
        rule, fits = _TASK[key]
        if not fits(task[key]):
            raise _wrong(f"task.{key}", rule, task[key], where)
    return task


def _is_names(value: object) -> bool:
    """Names of at least two classes, or None for numbers."""
    if not isinstance(value, list):
        return value is None
    names = cast("list[object]", value)
    return len(names) > 1 and all(isinstance(name, str) for name in names) and len({*names}) == len(names)


def _is_columns(value: object) -> bool:
    cells = cast("dict[str, object]", value).values() if isinstance(value, dict) else [0]
    return all(cell is None or isinstance(cell, str) for cell in cells)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _is_size(value: object) -> bool:
    return _is_count(value) and value != 0


_TASK: dict[str, tuple[str, Callable[[object], bool]]] = {
    "labels": ("a list of at least two different names, or null for numbers", _is_names),
    "columns": ("an object of names of columns, each a text or null", _is_columns),
    "max_length": ("a whole number of at least 1", _is_size),
    "image_size": ("a whole number of at least 1, or null", lambda value: value is None or _is_size(value)),
    "pooling": ("text", _is_text),
    "separator": ("text", _is_text),
    "prompt_template": ("text", _is_text),
    "target_template": ("text", _is_text),
    "chat_template": ("text", _is_text),
    "loss_on": ("text", _is_text),
    "end_id": ("a whole number of at least 0", _is_count),
    "answer_length": ("a whole number of at least 0", _is_count),
}
"""Key of a task → what its value must be, in words and as a condition."""


def _check_keys(document: Mapping[str, Any], must: set[str], may: set[str], what: str, where: str) -> None:
    missing, unknown = sorted(must - document.keys()), sorted(document.keys() - must - may)
    if missing:
        raise SpecKeyError(
            f"{where}: {what} must have the keys {sorted(must)}, got none {missing[0]!r}; pack the adapter again"
        )
    if unknown:
        raise SpecKeyError(
            f"{where}: {what} may have no other keys than {sorted(must | may)}, got {unknown[0]!r} "
            f"({near(unknown[0], must | may)}); the file may be of a newer version of randbasis: upgrade it"
        )


def _wrong(key: str, rule: str, found: object, where: str) -> SpecValueError:
    shown = repr(found)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}…"
    return SpecValueError(f"{where}: {key} in the spec must be {rule}, got {shown}; pack the adapter again")


def _whole(document: Mapping[str, Any], key: str, where: str, *, least: int = 0, missing: int | None = None) -> int:
    value = document.get(key, missing)
    if type(value) is not int or not least <= value < 1 << 64:
        raise _wrong(key, f"a whole number of at least {least}", value, where)
    return value


def _text(value: object, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(key, "text", value, where)
    return value


def _digest(document: Mapping[str, Any], key: str, where: str) -> str:
    value: object = document[key]
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise _wrong(key, "64 hexadecimal digits", value, where)
    return value


def _object(document: Mapping[str, Any], key: str, where: str, *, missing: bool = False) -> dict[str, Any]:
    value: object = document.get(key, {} if missing else None)
    if not isinstance(value, dict):
        raise _wrong(key, "an object", value, where)
    return cast("dict[str, Any]", value)


def _list(document: Mapping[str, Any], key: str, where: str, *, missing: bool = False) -> list[Any]:
    value: object = document.get(key, [] if missing else None)
    if not isinstance(value, list):
        raise _wrong(key, "a list", value, where)
    return cast("list[Any]", value)

"""The list of matrices in few bytes, as files of adapters that share coefficients have it: version 2 of the format.

Such an adapter may have 64 bytes of coefficients, beside which the list of version 1 would be most of the file: here
what the names begin with, layers and options stand once for all matrices that have them in common::

    {"at": "model.layers.*", "layers": ["0-4"], "of": [["mlp.up_proj", 172, 64], ["self_attn.q_proj", 64, 64]]}

Each matrix is its name behind ``at``, rows and columns of the layer, and for a range of rows its name and bounds.
"""

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

from randbasis.adapter_file.paths import range_text
from randbasis.adapter_file.spec import MatrixGroup, canonical, changed_options
from randbasis.methods import Method


def short_matrices(groups: Iterable[MatrixGroup], common: Method) -> list[dict[str, Any]]:
    """Plain values of a list of matrices.

    Args:
        groups: in their order.
        common: what is the same for all is left out.
    """
    alike: dict[bytes, list[MatrixGroup]] = {}
    shared: dict[bytes, dict[str, Any]] = {}
    for group in groups:
        options = changed_options(group.like.method, common)
        layers = [range_text(numbers) for numbers in group.layers]
        document = {**({"layers": layers} if layers else {}), **({"options": options} if options else {})}
        key = canonical(document)
        shared[key] = document
        alike.setdefault(key, []).append(group)
    return [_entry(alike[key], shared[key]) for key in sorted(alike)]


def _entry(groups: Sequence[MatrixGroup], document: dict[str, Any]) -> dict[str, Any]:
    at = common_path([group.like.name for group in groups])
    named = [(group.like.name.removeprefix(at).removeprefix("."), group.like) for group in groups]
    of: list[list[Any]] = [
        [name, one.out_features, one.in_features, *([one.part, one.start, one.start + one.rows] if one.part else [])]
        for name, one in named
    ]
    return {**({"at": at} if at else {}), **document, "of": of}


def common_path(names: Sequence[str]) -> str:
    """The modules that all of the named ones lie in."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(column[0] for column in takewhile(lambda column: len({*column}) == 1, columns))


def long_entries(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of version 1 that one of version 2 stands for, of values that nothing is known of.

    Args:
        entry: its keys are those that it may have, and ``of`` is a list of lists.

    Raises:
        TypeError, ValueError: a matrix has not three or six values, the first of them text.
    """
    common = {key: entry[key] for key in ("layers", "options") if key in entry}
    found: list[dict[str, Any]] = []
    for name, out, in_, *rows in entry["of"]:
        if not isinstance(name, str) or len(rows) not in (0, 3):
            raise ValueError(f"a matrix {[name, out, in_, *rows]}")
        part = {"part": rows[0], "rows": rows[1:]} if rows else {}
        found.append(
            {"name": f"{entry['at']}.{name}" if "at" in entry else name, "out": out, "in": in_, **part, **common}
        )
    return found

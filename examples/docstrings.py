"""Real text that every Python installation holds: what the standard library says about its own definitions."""

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

KINDS = ("class", "function", "method")
FEWEST_WORDS = 5
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "lib2to3", "distutils"}


class Docstring(NamedTuple):
    """A docstring, the kind of what it documents, and its owner, the top-level definition that it is of or in."""

    text: str
    kind: str
    owner: str


def read_docstrings() -> list[Docstring]:
    """Every docstring of the standard library of five words or more, each text once, in the order of the files."""
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[str, Docstring] = {}
    for file in sorted(library.rglob("*.py")):
        module = file.relative_to(library)
        if LEFT_OUT.isdisjoint(module.parts):
            for top in ast.parse(file.read_bytes()).body:
                owner = f"{module.as_posix()}: {getattr(top, 'name', '')}"
                for text, kind in _texts(top, in_class=False):
                    found.setdefault(text, Docstring(text, kind, owner))
    return list(found.values())


def split_by_owner(docstrings: list[Docstring], share: float, seed: int) -> tuple[list[Docstring], list[Docstring]]:
    """Two lists with no owner in common, ``share`` of the owners in the second one."""
    owners = sorted({one.owner for one in docstrings})
    held = set(random.Random(seed).sample(owners, round(share * len(owners))))
    return [one for one in docstrings if one.owner not in held], [one for one in docstrings if one.owner in held]


def at_most(docstrings: list[Docstring], count: int, seed: int) -> list[Docstring]:
    """``count`` of each kind at most, so that no kind drowns the others."""
    chosen: list[Docstring] = []
    for kind in KINDS:
        own = [one for one in docstrings if one.kind == kind]
        chosen += random.Random(seed).sample(own, min(count, len(own)))
    return chosen


def _texts(node: ast.AST, *, in_class: bool) -> Iterator[tuple[str, str]]:
    """Docstring and kind of a definition and of all that is defined inside it."""
    is_class = isinstance(node, ast.ClassDef)
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = " ".join((ast.get_docstring(node) or "").split())
        if len(text.split()) >= FEWEST_WORDS:
            yield text, "class" if is_class else "method" if in_class else "function"
        in_class = is_class
    for child in ast.iter_child_nodes(node):
        yield from _texts(child, in_class=in_class)

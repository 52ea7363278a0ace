"""Real text that every Python installation holds: what the standard library says about itself, and where."""

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

#: Area -> the top-level modules and packages of the standard library that belong to it.
AREAS = {
    "concurrency": "asyncio concurrent multiprocessing queue sched selectors subprocess threading",
    "data types": "_collections_abc _weakrefset abc collections copy dataclasses enum functools graphlib heapq "
    "operator reprlib types typing weakref",
    "development": "ast bdb cProfile code codeop dis doctest inspect pdb profile pstats pyclbr pydoc symtable tabnanny "
    "timeit trace traceback tracemalloc unittest",
    "email": "email imaplib mailbox poplib smtplib",
    "files": "_pyio filecmp fileinput fnmatch genericpath glob gzip bz2 lzma ntpath os pathlib posixpath shutil stat "
    "tarfile tempfile zipfile",
    "import and packaging": "compileall ensurepip importlib modulefinder pkgutil runpy site sysconfig venv zipimport",
    "numbers and dates": "_pydatetime _pydecimal _strptime calendar colorsys datetime fractions numbers random "
    "statistics zoneinfo",
    "user interface": "curses idlelib tkinter turtle",
    "web and network": "ftplib html http ipaddress socket socketserver ssl urllib uuid webbrowser wsgiref xml xmlrpc",
}

FEWEST_WORDS = 8


class Docstring(NamedTuple):
    """A docstring, the area of its module, and its owner, the top-level function or class that it is of or in."""

    text: str
    area: str
    owner: str


def read_docstrings() -> list[Docstring]:
    """Every docstring of eight words or more in the modules of ``AREAS``, each text once, in the order of the files."""
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[str, Docstring] = {}
    for area, names in AREAS.items():
        for file in _sources(library, names.split()):
            module = file.relative_to(library).as_posix()
            for top in ast.parse(file.read_text(encoding="utf-8")).body:
                for text in _texts(top):
                    found.setdefault(text, Docstring(text, area, f"{module}: {getattr(top, 'name', '')}"))
    return list(found.values())


def split_by_owner(docstrings: list[Docstring], share: float, seed: int) -> tuple[list[Docstring], list[Docstring]]:
    """Two lists with no owner in common, ``share`` of each area's owners in the second one."""
    held: set[str] = set()
    for area in AREAS:
        owners = sorted({one.owner for one in docstrings if one.area == area})
        held.update(random.Random(seed).sample(owners, max(1, round(share * len(owners)))))
    return [one for one in docstrings if one.owner not in held], [one for one in docstrings if one.owner in held]


def at_most(docstrings: list[Docstring], count: int, seed: int) -> list[Docstring]:
    """``count`` of each area at most, so that no area drowns the others."""
    chosen: list[Docstring] = []
    for area in AREAS:
        own = [one for one in docstrings if one.area == area]
        chosen += random.Random(seed).sample(own, min(count, len(own)))
    return chosen


def _texts(top: ast.stmt) -> Iterator[str]:
    """The docstrings of a top-level statement and of all that is defined inside it."""
    for node in ast.walk(top):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            text = " ".join((ast.get_docstring(node) or "").split())
            if len(text.split()) >= FEWEST_WORDS:
                yield text


def _sources(library: Path, names: list[str]) -> list[Path]:
    files = [library / f"{name}.py" for name in names]
    packages = [file for name in names for file in sorted((library / name).rglob("*.py"))]
    tests = {"test", "tests", "idle_test"}
    return [file for file in files + packages if file.is_file() and not tests & set(file.relative_to(library).parts)]

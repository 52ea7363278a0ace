"""Real text that every Python installation holds: what the standard library says about itself, and where."""

import ast
import random
import sysconfig
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
    """A docstring of a function or class, the file it stands in, and the area of that file."""

    text: str
    area: str
    file: str


def read_docstrings() -> list[Docstring]:
    """Every docstring of eight words or more in the modules of ``AREAS``, each text once, in the order of the files."""
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[str, Docstring] = {}
    for area, names in AREAS.items():
        for file in _sources(library, names.split()):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    text = " ".join((ast.get_docstring(node) or "").split())
                    if len(text.split()) >= FEWEST_WORDS:
                        found.setdefault(text, Docstring(text, area, file.relative_to(library).as_posix()))
    return list(found.values())


def split_by_file(docstrings: list[Docstring], share: float, seed: int) -> tuple[list[Docstring], list[Docstring]]:
    """Two lists with no file in common, ``share`` of each area's files in the second one."""
    held: set[str] = set()
    for area in AREAS:
        files = sorted({one.file for one in docstrings if one.area == area})
        held.update(random.Random(seed).sample(files, max(1, round(share * len(files)))))
    return [one for one in docstrings if one.file not in held], [one for one in docstrings if one.file in held]


def at_most(docstrings: list[Docstring], count: int, seed: int) -> list[Docstring]:
    """``count`` of each area at most, so that no area drowns the others."""
    chosen: list[Docstring] = []
    for area in AREAS:
        own = [one for one in docstrings if one.area == area]
        chosen += random.Random(seed).sample(own, min(count, len(own)))
    return chosen


def _sources(library: Path, names: list[str]) -> list[Path]:
    files = [library / f"{name}.py" for name in names]
    packages = [file for name in names for file in sorted((library / name).rglob("*.py"))]
    tests = {"test", "tests", "idle_test"}
    return [file for file in files + packages if file.is_file() and not tests & set(file.relative_to(library).parts)]

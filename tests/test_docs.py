"""The pages and the code agree: equation numbers, and the page of the command."""

import ast
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import randbasis.cli

SOURCE = Path(__file__).resolve().parent.parent / "src" / "randbasis"
DOCSTRINGS = (ast.Module, ast.ClassDef, ast.FunctionDef)


def equations(root: Path) -> list[int]:
    """The numbers of the equations that docs/math.md states, in the order of the page."""
    return [int(n) for n in re.findall(r"^\((\d+)\)", (root / "docs" / "math.md").read_text(encoding="utf-8"), re.M)]


def test_equations_are_numbered_without_a_gap(root: Path):
    assert equations(root) == list(range(1, len(equations(root)) + 1))


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_docstrings_cite_equations_that_exist(file: Path, root: Path):
    nodes = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, DOCSTRINGS)]
    text = "\n".join(ast.get_docstring(node) or "" for node in nodes)
    cited = {int(number) for number in re.findall(r"(?<!\w)\((\d+)\)", text)}
    assert cited <= set(equations(root))


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_names_that_docstrings_cite_exist(file: Path):
    module = ".".join(["randbasis", *file.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")
    cited = set(re.findall(r":(?:func|mod|class|data):`~?([\w.]+)`", file.read_text(encoding="utf-8")))
    absent = [name for name in cited if not exists(name if name.startswith("randbasis") else f"{module}.{name}")]
    assert not absent


def exists(name: str) -> bool:
    """Whether a module has that name, or something in a module."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_the_page_of_the_command_is_up_to_date(root: Path, tmp_path: Path, console_environment: dict[str, str]):
    command = [sys.executable, "-m", "typer", "randbasis.cli", "utils", "docs", "--name", "randbasis"]
    command += ["--title", "The command", "--output", str(tmp_path / "cli.md")]
    subprocess.run(command, env=console_environment, capture_output=True, check=True)
    page = (root / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == (tmp_path / "cli.md").read_text(encoding="utf-8"), "docs/cli.md is stale: run `make docs`"


def test_the_page_of_the_command_keeps_what_stands_in_brackets(root: Path):
    # rich reads "c_attn[q,v]" as markup and drops the slices, in the page and in --help alike
    page = (root / "docs" / "cli.md").read_text(encoding="utf-8")
    commands = typer.main.get_command(randbasis.cli.app).commands.values()
    helps = [text for c in commands for text in (c.epilog, *(getattr(p, "help", "") for p in c.params)) if text]
    bracketed = {word for text in helps for word in text.split() if "[" in word}
    assert not [word for word in sorted(bracketed) if word not in page]

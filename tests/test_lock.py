"""The lock: it holds what the ranges promise, names no place, and is what these tests run on."""

import os
import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FILES = ["lock.txt", "oldest.txt"]
#: What a user of the package installs; what is left of the development environment only tests it.
FOR_USERS = ["train", "data", "remote", "s3", "gguf"]


def pins(file: str) -> list[Requirement]:
    lines = (ROOT / "requirements" / file).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.lstrip().startswith("#")]


def here(requirement: Requirement) -> bool:
    marker: Marker | None = requirement.marker
    return marker is None or marker.evaluate()


def pinned(file: str) -> dict[str, Version]:
    """Name -> version on this Python and platform."""
    return {canonicalize_name(r.name): Version(str(r.specifier).removeprefix("==")) for r in pins(file) if here(r)}


def ranges(*extras: str) -> list[Requirement]:
    texts = list(PROJECT["dependencies"]) if not extras else []
    for extra in extras:
        texts += PROJECT["optional-dependencies"][extra]
    return [r for r in map(Requirement, texts) if r.name != PROJECT["name"] and here(r)]


@pytest.mark.parametrize("file", FILES)
def test_every_range_is_pinned_inside_of_it(file: str):
    known = pinned(file)
    for wanted in [*ranges(), *ranges(*FOR_USERS, "dev", "fuzz", "demo")]:
        assert known[canonicalize_name(wanted.name)] in wanted.specifier, wanted


def test_the_oldest_are_the_lower_bounds():
    known = pinned("oldest.txt")
    for wanted in [*ranges(), *ranges(*FOR_USERS)]:
        if wanted.name == "torch":  # another release would pull gigabytes of CUDA packages
            continue
        floor = next(Version(one.version) for one in wanted.specifier if one.operator == ">=")
        assert known[canonicalize_name(wanted.name)] == floor, f"{wanted}: raise the bound to what is tested"


def test_what_is_held_back_is_held_back():
    known = pinned("lock.txt")
    for held in pins("held.txt"):
        assert known[canonicalize_name(held.name)] in held.specifier, held


@pytest.mark.parametrize("file", [*FILES, "held.txt"])
def test_pins_name_no_place(file: str):
    text = (ROOT / "requirements" / file).read_text(encoding="utf-8")
    assert not re.search(r"https?:|file:|/(root|home|tmp|opt)/|--(extra-)?index|--find-links", text)


def test_these_tests_run_on_what_is_pinned():
    file = os.environ.get("RANDBASIS_PINS")
    if not file:
        pytest.skip("not started by `make test` or `make test-oldest`, which say what must be installed")
    wrong = []
    for name, wanted in pinned(Path(file).name).items():
        try:
            found = Version(version(name))
        except PackageNotFoundError:
            continue  # a constraint installs nothing
        if Version(found.public) != wanted:
            wrong.append(f"{name} {found}, pinned {wanted}")
    assert not wrong

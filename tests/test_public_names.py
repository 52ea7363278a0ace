"""The public list, frozen: a name appears here before it appears in the package, and never leaves by accident."""

import inspect
from importlib.metadata import version

import pytest

import randbasis

PUBLIC_NAMES = [
    "AdapterBank",
    "METHODS",
    "Basis",
    "Law",
    "LoraXs",
    "LoraXsConfig",
    "Method",
    "Nola",
    "NolaConfig",
    "Pranc",
    "PrancConfig",
    "RandLora",
    "RandLoraConfig",
    "RandbasisConfig",
    "RandbasisError",
    "RandbasisLinear",
    "RandbasisModel",
    "Vera",
    "VeraConfig",
    "basis_entries",
    "load",
    "load_packed",
    "open_adapter",
    "parse_law",
    "put",
    "stream_of",
]


def test_the_public_names_are_these():
    assert sorted(randbasis.__all__) == sorted(PUBLIC_NAMES)


def test_star_import_gives_the_public_names():
    namespace: dict[str, object] = {}
    exec("from randbasis import *", namespace)
    assert sorted(namespace.keys() - {"__builtins__"}) == sorted(PUBLIC_NAMES)


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_every_public_class_and_function_has_a_docstring_of_its_own(name: str):
    value = getattr(randbasis, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert (value.__doc__ or "").strip()
        assert not value.__doc__.startswith(f"{name}(")  # what dataclasses write where nobody did


def test_the_version_is_that_of_the_installed_package():
    assert randbasis.__version__ == version("randbasis")

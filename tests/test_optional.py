"""A package that is not installed is told apart from one that is installed and cannot be imported."""

from importlib import import_module
from pathlib import Path

import pytest

from randbasis.errors import BrokenPackageError, MissingPackageError
from randbasis.optional import needing


def test_a_package_that_is_not_installed():
    with (
        pytest.raises(MissingPackageError, match=r"plots needs nowhere-lib, which is not .*randbasis\[train\]"),
        needing("plots", "nowhere_to_be_found", "train", distribution="nowhere-lib"),
    ):
        import_module("nowhere_to_be_found")


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        ("import another_that_is_nowhere", "ModuleNotFoundError: No module named 'another_that_is_nowhere'"),
        ("raise ImportError('libGL.so.1: cannot open')", "ImportError: libGL.so.1: cannot open"),
        ("from os import no_such_name", "cannot import name 'no_such_name'"),
    ],
)
def test_a_package_that_is_broken_is_not_called_missing(
    body: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "broken_lib.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BrokenPackageError) as refused, needing("plots", "broken_lib", "train"):
        import_module("broken_lib")
    assert cause in str(refused.value)
    assert "not installed" not in str(refused.value)

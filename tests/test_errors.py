"""The error classes as a set, and the near names that their messages offer."""

import inspect

import pytest

from randbasis import errors
from randbasis.errors import RandbasisError, near, not_one_of

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_each_class_is_ours_and_a_builtin(kind: type[Exception]) -> None:
    """One ``except RandbasisError`` catches all; ``except ValueError`` and its like keep working."""
    assert issubclass(kind, RandbasisError)
    assert kind.__doc__
    if kind is not RandbasisError:
        builtin = [base for base in kind.__mro__ if base.__module__ == "builtins" and base not in (Exception, object)]
        assert set(builtin) - {BaseException}


def test_near_names() -> None:
    known = ["q_proj", "k_proj", "lm_head"]
    assert near("q_porj", known) == "did you mean q_proj, k_proj?"
    assert near("zzz", known) == "there are: k_proj, lm_head, q_proj"
    assert near("zzz", []) == "there are none"
    assert near("x", [f"layer_{n:03}" for n in range(30)]).endswith("layer_019, ...")
    assert near("q_proj", ["q_proj"] * 3 + [f"q_proj{n}" for n in range(9)], limit=2).count(",") == 1


def test_what_there_is_is_listed_once() -> None:
    assert (
        not_one_of("dtype", "int8", ["float32", "float16"]) == "dtype must be one of ['float32', 'float16'], got 'int8'"
    )
    assert not_one_of("dtype", "float61", ["float16", "auto"]).endswith("got 'float61'; did you mean float16?")

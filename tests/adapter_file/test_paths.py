"""Module paths as patterns and layer numbers, and back."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from randbasis.adapter_file.paths import (
    boxes,
    check_module_path,
    check_name,
    expand,
    join_path,
    parse_ranges,
    range_text,
    split_path,
)
from randbasis.errors import SpecValueError, UnsafeNameError

NUMBERS = st.integers(1, 3).flatmap(lambda n: st.sets(st.tuples(*[st.integers(0, 6)] * n), min_size=1, max_size=30))


@given(NUMBERS)
def test_products_cover_the_numbers_once(numbers: set[tuple[int, ...]]):
    pattern = ".".join(["*"] * len(next(iter(numbers))))
    paths = [path for layers in boxes(numbers) for path in expand(pattern, layers)]
    assert len(paths) == len(numbers)
    assert {split_path(path)[1] for path in paths} == numbers


@given(NUMBERS)
def test_ranges_survive_their_text(numbers: set[tuple[int, ...]]):
    for layers in boxes(numbers):
        assert tuple(parse_ranges(range_text(part), "x") for part in layers) == layers


def test_whole_layers_are_one_product():
    grid = {(layer, expert) for layer in range(32) for expert in range(8)}
    assert [[range_text(part) for part in layers] for layers in boxes(grid)] == [["0-31", "0-7"]]
    assert len(boxes(grid - {(3, 5)})) == 2


@pytest.mark.parametrize(
    ("path", "pattern", "numbers"),
    [
        ("model.layers.31.mlp.up_proj", "model.layers.*.mlp.up_proj", (31,)),
        ("0.block.1", "*.block.*", (0, 1)),
        ("classifier", "classifier", ()),
        ("a.007.b", "a.007.b", ()),
        ("a.²", "a.²", ()),
        ("h.1234567890", "h.1234567890", ()),
    ],
)
def test_paths_with_numbers(path: str, pattern: str, numbers: tuple[int, ...]):
    assert split_path(path) == (pattern, numbers)
    assert join_path(pattern, numbers) == path


@pytest.mark.parametrize("text", ["", "1-", "2-1", "1-1", "0-3,4", "3,1", "01", "1,1", "-1", "1 ", "１", "1,,2"])
def test_ranges_that_are_none(text: str):
    with pytest.raises(SpecValueError):
        parse_ranges(text, "x")


@pytest.mark.parametrize(
    "name", ["", "/a", "\\a", "..", "a/../b", "a\\..\\b", "C:\\a", "c:/a", "~/a", "file:///a", "a\nb", "a\0", "\ud800"]
)
def test_names_that_lead_out(name: str):
    with pytest.raises(UnsafeNameError):
        check_name(name, "the name", "x")


@pytest.mark.parametrize("name", ["a", "org/model-7b", "a.b.c", "models/x.y", "hf://a/b", "größe", "a..b"])
def test_names_that_do_not(name: str):
    check_name(name, "the name", "x")


def test_a_path_of_modules_has_no_empty_name():
    with pytest.raises(SpecValueError):
        check_module_path("a..b", "x")

"""Nothing outside of `files/` writes "whole or absent" by hand, or says in words of its own what a write may not do."""

import ast
from pathlib import Path

import randbasis

PACKAGE = Path(randbasis.__file__).parent
OUTSIDE = [file for file in sorted(PACKAGE.rglob("*.py")) if file.relative_to(PACKAGE).parts[0] != "files"]
ERRORS = {"SaveError", "OutputExistsError"}
BY_HAND = {"mkstemp", "mkdtemp", "NamedTemporaryFile", "rename", "renames"}


def calls(file: Path) -> list[tuple[int, ast.Call, str]]:
    """The calls in a file: line, call, last name of what is called."""
    found = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return [(call.lineno, call, ast.unparse(call.func).rpartition(".")[2]) for call in found]


def moves_a_file(call: ast.Call) -> bool:
    """`path.replace(target)` or `os.replace(path, target)`; a string's `replace` has two arguments."""
    function = call.func
    if not isinstance(function, ast.Attribute) or function.attr != "replace":
        return False
    return ast.unparse(function) == "os.replace" or (len(call.args) == 1 and not call.keywords)


def test_what_is_looked_for_is_found():
    (moved,) = ast.parse("path.replace(target)").body
    (text,) = ast.parse("path.replace('a', 'b')").body
    assert isinstance(moved, ast.Expr) and isinstance(moved.value, ast.Call) and moves_a_file(moved.value)  # noqa: PT018
    assert isinstance(text, ast.Expr) and isinstance(text.value, ast.Call) and not moves_a_file(text.value)  # noqa: PT018
    own = [(name, call) for file in (PACKAGE / "files").glob("*.py") for _, call, name in calls(file)]
    assert ERRORS | {"mkdtemp"} <= {name for name, _ in own}
    assert any(moves_a_file(call) for _, call in own)


def test_errors_of_writing_are_raised_in_one_room():
    assert not [f"{file}:{line}" for file in OUTSIDE for line, _, name in calls(file) if name in ERRORS]


def test_files_are_moved_into_place_in_one_room():
    assert not [
        f"{file}:{line}"
        for file in OUTSIDE
        for line, call, name in calls(file)
        if name in BY_HAND or moves_a_file(call)
    ]

"""Names of a package that are imported when they are asked for, PEP 562: who asks for none waits for no torch."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from randbasis.errors import near


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package; a module of it is a name of it, too.

    The package imports them under ``if TYPE_CHECKING:``, for type checkers and editors, and calls this under ``else:``.

    Args:
        package: its ``__name__``.
        homes: module → the names that it has for the package, with spaces between them.
    """
    home_of = {name: module for module, names in homes.items() for name in names.split()}

    def ask(name: str) -> Any:
        if name in home_of:
            value = getattr(import_module(home_of[name]), name)
            setattr(sys.modules[package], name, value)
            return value
        if not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
            return import_module(f"{package}.{name}")
        raise AttributeError(
            f"module {package!r} has no attribute {name!r}; {near(name, home_of)}",
            name=name,
            obj=sys.modules[package],
        )

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home_of})

    return ask, names

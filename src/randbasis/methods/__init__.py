"""BASIS + COEFFICIENTS → FACTORS: one method, one file.

A new method is its own file here, one line of :data:`METHODS`, one configuration class in
:mod:`randbasis.tuner.config` and one maker in the contract tests.
"""

from randbasis.errors import UnknownMethodError, near
from randbasis.methods.bound import Bound, Coefficients, Delta, Factors, Site
from randbasis.methods.method import Method, check_coefficients
from randbasis.methods.nola import Nola
from randbasis.methods.pranc import Pranc
from randbasis.methods.randlora import RandLora
from randbasis.methods.vera import Vera

METHODS: dict[str, type[Method]] = {method.name: method for method in (Nola, Vera, RandLora, Pranc)}
"""Method name → class."""


def method_class(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        UnknownMethodError: there is none.
    """
    if name not in METHODS:
        raise UnknownMethodError(f"method must be one of {list(METHODS)}, got {name!r}; {near(name, METHODS)}")
    return METHODS[name]


__all__ = [
    "METHODS",
    "Bound",
    "Coefficients",
    "Delta",
    "Factors",
    "Method",
    "Nola",
    "Pranc",
    "RandLora",
    "Site",
    "Vera",
    "check_coefficients",
    "method_class",
]

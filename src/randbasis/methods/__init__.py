"""BASIS + COEFFICIENTS → ΔW: one method, one file; a method is bound to a matrix once, and ``Bound`` makes the ΔW.

A new method is its own file here, one line of the table below, one configuration class in
:mod:`randbasis.tuner.config` and one maker in the contract tests. What asks for the names alone loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from randbasis.errors import UnknownMethodError, not_one_of
from randbasis.lazy import lazy_names

if TYPE_CHECKING:
    from randbasis.methods.bound import Bound, Coefficients, Delta, Factors, Site, WeightedSum, no_weights
    from randbasis.methods.loraxs import LoraXs
    from randbasis.methods.method import Method, check_coefficients
    from randbasis.methods.nola import Nola
    from randbasis.methods.pranc import Pranc
    from randbasis.methods.randlora import RandLora
    from randbasis.methods.table import METHODS
    from randbasis.methods.vera import Vera

CLASSES = {
    "nola": "randbasis.methods.nola.Nola",
    "vera": "randbasis.methods.vera.Vera",
    "randlora": "randbasis.methods.randlora.RandLora",
    "pranc": "randbasis.methods.pranc.Pranc",
    "loraxs": "randbasis.methods.loraxs.LoraXs",
}
"""Method name → class."""

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "randbasis.methods.bound": "Bound Coefficients Delta Factors Site WeightedSum no_weights",
            "randbasis.methods.method": "Method check_coefficients",
            "randbasis.methods.table": "METHODS",
            **dict(path.rsplit(".", 1) for path in CLASSES.values()),
        },
    )


def check_method(name: str) -> None:
    """Raise unless there is a method of that name.

    Raises:
        UnknownMethodError: there is none.
    """
    if name not in CLASSES:
        raise UnknownMethodError(not_one_of("method", name, CLASSES))


def method_class(name: str) -> "type[Method]":
    """The method of that name.

    Raises:
        UnknownMethodError: there is none.
    """
    check_method(name)
    module, _, kind = CLASSES[name].rpartition(".")
    return getattr(import_module(module), kind)


__all__ = [
    "CLASSES",
    "METHODS",
    "Bound",
    "Coefficients",
    "Delta",
    "Factors",
    "LoraXs",
    "Method",
    "Nola",
    "Pranc",
    "RandLora",
    "Site",
    "Vera",
    "WeightedSum",
    "check_coefficients",
    "check_method",
    "method_class",
    "no_weights",
]

"""The methods by name, all of them imported."""

from randbasis.methods import CLASSES, method_class
from randbasis.methods.method import Method

METHODS: dict[str, type[Method]] = {name: method_class(name) for name in CLASSES}
"""Method name → class."""

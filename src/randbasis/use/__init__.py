"""TRAINED ADAPTER → ANSWERS: ``evaluate``, ``predict`` and ``generate`` use what a run left."""

from typing import TYPE_CHECKING

from randbasis.lazy import lazy_names

if TYPE_CHECKING:
    from randbasis.use.evaluation import Found, evaluate, find, generate, predict, write_lines
    from randbasis.use.settings import UseSettings
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "randbasis.use.evaluation": "Found evaluate find generate predict write_lines",
            "randbasis.use.settings": "UseSettings",
        },
    )

__all__ = ["Found", "UseSettings", "evaluate", "find", "generate", "predict", "write_lines"]

"""TRAINED ADAPTER → ANSWERS: ``load`` makes it ready; ``evaluate``, ``predict`` and ``generate`` use it on files."""

from typing import TYPE_CHECKING

from randbasis.lazy import lazy_names

if TYPE_CHECKING:
    from randbasis.use.answer_files import write_lines, write_rows
    from randbasis.use.evaluation import Found, evaluate, find, generate, predict
    from randbasis.use.loading import LoadedAdapter, load
    from randbasis.use.settings import UseSettings
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "randbasis.use.answer_files": "write_lines write_rows",
            "randbasis.use.evaluation": "Found evaluate find generate predict",
            "randbasis.use.loading": "LoadedAdapter load",
            "randbasis.use.settings": "UseSettings",
        },
    )

__all__ = [
    "Found",
    "LoadedAdapter",
    "UseSettings",
    "evaluate",
    "find",
    "generate",
    "load",
    "predict",
    "write_lines",
    "write_rows",
]

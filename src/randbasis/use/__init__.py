"""TRAINED ADAPTER → ANSWERS: ``evaluate``, ``predict`` and ``generate`` use what a run left."""

from randbasis.use.evaluation import Found, UseSettings, evaluate, find, generate, predict, write_lines

__all__ = ["Found", "UseSettings", "evaluate", "find", "generate", "predict", "write_lines"]

"""How a training step grows as k, r, depth, width or tokens double, the others staying as they are."""

from collections.abc import Iterator
from dataclasses import replace

from benchmarks import bases, training_step
from benchmarks.adapters import FLOOR
from benchmarks.case import Case

START = {"k": 128, "r": 8, "depth": 4, "width": 256, "tokens": 1024}
VALUES = {
    "k": (32, 128, 512, 2048),
    "r": (4, 8, 16, 32, 64),
    "depth": (2, 4, 8, 16),
    "width": (64, 128, 256, 512),
    "tokens": (256, 1024, 4096),
}
TINY_START = {"k": 8, "r": 4, "depth": 1, "width": 64, "tokens": 64}
TINY_VALUES = {"k": (8, 16), "width": (64, 128)}
VOCABULARY = 1024


def cases(*, tiny: bool = False, everything: bool = False) -> Iterator[Case]:
    """A step of a small GPT-2-like model at every value of every axis."""
    del everything
    start, values = (TINY_START, TINY_VALUES) if tiny else (START, VALUES)
    for axis, points in values.items():
        for value in points:
            at = start | {axis: value}
            base = bases.gpt2(at["depth"], at["width"], VOCABULARY)
            made = training_step.case(base, at["tokens"], _sides(axis, at), seconds=4)
            size = ", ".join(f"{name} {number}" for name, number in at.items())
            yield replace(made, family="growth", name=f"growth of {axis}: {size}", parameters={"axis": axis, **at})


def _sides(axis: str, at: dict[str, int]) -> tuple[str, ...]:
    """NOLA always; the methods that know the axis beside it."""
    nola = f"NOLA r={at['r']} k={at['k']}"
    if axis == "k":
        return FLOOR, nola, f"{nola} unique"
    if axis == "r":
        return FLOOR, nola, f"PEFT LoRA r={at['r']}", f"VeRA r={at['r']}", f"RandLoRA r={at['r']}"
    return FLOOR, nola, "PEFT LoRA r=8", "VeRA r=256", "RandLoRA r=32"

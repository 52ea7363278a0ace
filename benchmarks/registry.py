"""All families of cases. A family is a module with ``cases(*, tiny, everything)``."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, cast

from benchmarks.case import Case

FAMILIES = (
    "basis_rate", "sums", "training_step", "step_parts", "peak_memory", "inference", "kept_factors", "expansion",
    "switching", "growth", "host_time", "packed_sizes", "adding", "bank", "serving",
)  # fmt: skip
GPU_FAMILIES = (
    "gpu_step", "gpu_model", "gpu_decode", "gpu_bank", "gpu_host", "gpu_expansion", "gpu_adding", "gpu_basis",
    "gpu_project",
)  # fmt: skip
"""In the order of what is asked first: where the time is used up, the last are left."""


class Family(Protocol):
    """What a module of cases offers."""

    cases: Callable[..., Iterator[Case]]


def all_cases(*, tiny: bool = False, everything: bool = False, device: str = "cpu") -> list[Case]:
    """Every case for a kind of device, in the order in which they run.

    Args:
        tiny: at sizes that say nothing about speed.
        everything: with all sides, and with the cases that do not run unless asked for.
        device: ``cpu`` or ``cuda``.
    """
    modules = FAMILIES if device == "cpu" else GPU_FAMILIES
    found: list[Case] = []
    for name in modules:
        family = cast("Family", importlib.import_module(f"benchmarks.{name}"))
        found += family.cases(tiny=tiny, everything=everything)
    return found


def select(
    cases: Sequence[Case], *, only: Sequence[str] = (), everything: bool = False, **parameters: str | int | None
) -> list[Case]:
    """Some of the cases.

    Args:
        cases: to choose from.
        only: families, with or without "gpu", or words of which one is in the name; a family without usual cases runs
            when it is named.
        everything: also those that do not run unless asked for.
        parameters: values that the case must have; None for any.
    """
    families = {case.family for case in cases}
    only = [f"gpu {word}" if f"gpu {word}" in families else word for word in only]
    unusual = families - {case.family for case in cases if case.usual}
    wanted = {name: value for name, value in parameters.items() if value is not None}
    return [
        case
        for case in cases
        if (case.usual or everything or wanted or case.family in unusual.intersection(only))
        and (not only or any(case.family == word if word in families else word in case.name for word in only))
        and all(_fits(case.parameters.get(name), value) for name, value in wanted.items())
    ]


def _fits(found: str | int | None, wanted: str | int) -> bool:
    return wanted in found if isinstance(found, str) and isinstance(wanted, str) else found == wanted

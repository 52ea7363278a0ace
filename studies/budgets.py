"""Budgets to configurations: which rank or basis gives a method as many coefficients as another one has."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from peft import get_peft_model
from torch import nn

from randbasis import NolaConfig
from randbasis.errors import UnknownMethodError, near
from randbasis.methods import RandLora, Vera
from randbasis.train.settings import AdapterSettings
from randbasis.tuner.layer import RandbasisLinear
from studies.study import Row

Shape = tuple[int, int]
"""``(out, in)`` of one adapted matrix."""

NOLA_RANK = 8
"""Rank of NOLA's factors at every budget: it costs no coefficients."""


def adapted_shapes(model: nn.Module, targets: tuple[str, ...], head: Iterable[str] = ()) -> list[Shape]:
    """The matrices that an adapter on these targets has.

    Args:
        model: adapted in place; give one that is not used again.
        targets: names of modules, slices included, or ``("all-linear",)``.
        head: modules that are trained whole instead.
    """
    wanted = "all-linear" if targets == ("all-linear",) else list(targets)
    config = NolaConfig(r=1, num_basis=1, target_modules=wanted, exclude_modules=list(head) or None)
    adapted = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    return [
        (one.part.rows, layer.in_features)
        for layer in adapted.modules()
        if isinstance(layer, RandbasisLinear)
        for one in layer.matrices("default")
    ]


def lora_count(shapes: list[Shape], rank: int) -> int:
    """Coefficients of LoRA."""
    return sum(rank * (out + in_) for out, in_ in shapes)


def configure(row: Row, shapes: list[Shape], targets: tuple[str, ...]) -> AdapterSettings:
    """The hyper-parameters whose count comes closest to the row's budget.

    LoRA's and NOLA's scale (alpha / r) is 1 at every budget; VeRA and RandLoRA have the scales of their papers' code.
    PEFT's LoRA has no option for the bits that it is trained at: :mod:`studies.precision` sees to those.

    Args:
        row: method and budget.
        shapes: the adapted matrices.
        targets: the modules they are in.

    Returns:
        The adapter in the words of the command, without its seed.

    Raises:
        UnknownMethodError: there is no such method here.
    """
    if row.method == "lora":
        return _configure(row, shapes, targets)
    return replace(_configure(row, shapes, targets), quantize_coefficients=row.bits)


def _configure(row: Row, shapes: list[Shape], targets: tuple[str, ...]) -> AdapterSettings:
    budget = row.share * lora_count(shapes, 1)
    smallest = min(min(shape) for shape in shapes)
    if row.method == "none":
        return AdapterSettings(method="none", targets=targets)
    if row.method == "lora":
        rank = _closest(budget, range(1, smallest + 1), lambda r: lora_count(shapes, r))
        return AdapterSettings(method="lora", rank=rank, alpha=float(rank), targets=targets)
    if row.method == "nola":
        basis = max(1, round(budget / (2 * len(shapes))))
        return AdapterSettings(method="nola", rank=NOLA_RANK, basis=basis, alpha=float(NOLA_RANK), targets=targets)
    if row.method == "vera":
        fixed = sum(Vera(r=1).count(*shape) - 1 for shape in shapes)
        rank = max(1, round((budget - fixed) / len(shapes)))
        return AdapterSettings(method="vera", rank=rank, targets=targets)
    if row.method == "randlora":
        ranks = range(1, smallest + 1)
        rank = _closest(budget, ranks, lambda r: sum(RandLora(r=r).count(*shape) for shape in shapes))
        return AdapterSettings(method="randlora", rank=rank, targets=targets)
    raise UnknownMethodError(f"method {row.method!r} has no budget; {near(row.method, ('lora', 'nola', 'vera'))}")


def _closest(budget: float, candidates: Iterable[int], count: Callable[[int], int]) -> int:
    """The smallest candidate whose count is closest to the budget."""
    return min(candidates, key=lambda value: (abs(count(value) - budget), value))

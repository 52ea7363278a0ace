"""BUDGET → SIZE: which rank or basis gives a method as many coefficients, or bytes, as a row may have."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import get_peft_model
from torch import nn

from randbasis.adapters.budget import counted, stored_bytes
from randbasis.compare.study import Row
from randbasis.errors import StudyError
from randbasis.ties import UNTIED
from randbasis.tuner.config import VeraConfig
from randbasis.tuner.layer import RandbasisLinear

Shape = tuple[int, int]
"""``(out, in)`` of one adapted matrix."""

NOLA_RANK = 8
"""Rank of NOLA's factors where a row names none: it costs no coefficients."""


def adapted_shapes(model: nn.Module, targets: tuple[str, ...], head: Iterable[str] = ()) -> list[Shape]:
    """The matrices that an adapter on these targets has.

    Args:
        model: adapted in place; give one that is not used again.
        targets: names of modules, slices included, or ``("all-linear",)``.
        head: modules that are trained whole instead.
    """
    wanted = "all-linear" if targets == ("all-linear",) else list(targets)
    config = VeraConfig(r=1, target_modules=wanted, exclude_modules=list(head) or None, basis_storage="recompute")
    adapted = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    return [
        (one.part.rows, layer.in_features)
        for layer in adapted.modules()
        if isinstance(layer, RandbasisLinear)
        for one in layer.matrices("default")
    ]


@dataclass(frozen=True)
class Size:
    """How large a method is, by the one number that decides it.

    Attributes:
        word: option that the number is given as.
        count: ``(number, shapes, options) → (coefficients, vectors)``; each vector has a scale where it is quantized.
        largest: of the number.
        rises: whether a larger number has more coefficients; else all numbers are looked at.
    """

    word: str
    count: Callable[[int, Sequence[Shape], Mapping[str, Any]], tuple[int, int]]
    largest: Callable[[Sequence[Shape]], int]
    rises: bool = True


def _smallest(shapes: Sequence[Shape]) -> int:
    return min(min(shape) for shape in shapes)


def _ours(method: str) -> Callable[[int, Sequence[Shape], Mapping[str, Any]], tuple[int, int]]:
    return lambda size, shapes, options: counted(method, size, shapes)


def _each(size: int, shapes: Sequence[Shape], options: Mapping[str, Any]) -> tuple[int, int]:
    return size * len(shapes), len(shapes)


def _lora(size: int, shapes: Sequence[Shape], options: Mapping[str, Any]) -> tuple[int, int]:
    return sum(size * (out + in_) for out, in_ in shapes), 2 * size * len(shapes)


def _any(shapes: Sequence[Shape]) -> int:
    return 1 << 16


SIZED: Mapping[str, Size] = {
    "nola": Size("basis", _ours("nola"), _any),
    "pranc": Size("basis", _ours("pranc"), _any),
    "vera": Size("rank", _ours("vera"), _any),
    "randlora": Size("rank", _ours("randlora"), _smallest, rises=False),
    "loraxs": Size("rank", _ours("loraxs"), _smallest),
    "lora": Size("rank", _lora, _smallest),
    "dora": Size("rank", lambda r, shapes, o: (_lora(r, shapes, o)[0] + sum(s[0] for s in shapes), 0), _smallest),
    "unilora": Size("theta_d_length", lambda n, shapes, o: (n, 1), _any),
    "fourierft": Size("n_frequency", _each, lambda shapes: min(out * in_ for out, in_ in shapes)),
    "tinylora": Size("u", _each, _any),
}
"""Methods that a budget can be asked of."""


def sized(row: Row, shapes: Sequence[Shape]) -> dict[str, Any]:
    """The options of a row with the size that its budget means: the largest that fits.

    Args:
        row: a method at a budget.
        shapes: the adapted matrices.

    Raises:
        StudyError: not even the smallest fits.
    """
    options = dict(row.options)
    if row.budget is None:
        return options
    size = SIZED[row.method]
    if size.word in options:
        raise StudyError(f"row {row.name!r} has a budget and {size.word}, which the budget decides; keep one")
    budget, tie = row.budget, str(options.get("tie", UNTIED))
    if tie not in (UNTIED, "model"):
        raise StudyError(
            f"row {row.name!r}: a budget decides the size of an adapter with tie={UNTIED!r} or 'model', got {tie!r}; "
            f"name {size.word} instead"
        )
    counted = shapes if tie == UNTIED else shapes[:1]  # one vector serves them all, math (26)

    def cost(number: int) -> int:
        coefficients, vectors = size.count(number, counted, options)
        return coefficients if budget.unit == "coefficients" else stored_bytes(coefficients, vectors, budget.bits)

    numbers: Sequence[int] = range(1, size.largest(shapes) + 1)
    if not size.rises:
        numbers = sorted(numbers, key=lambda number: (cost(number), number))
    fitting = bisect_right(numbers, budget.amount, key=cost)
    if not fitting:
        raise StudyError(
            f"row {row.name!r}: {row.method} has no configuration of {budget.amount:,} {budget.unit}: the smallest, "
            f"{size.word} {numbers[0]}, has {cost(numbers[0]):,}"
        )
    return options | {size.word: numbers[fitting - 1]}

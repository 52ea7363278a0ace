"""BUDGET → CONFIGURATIONS: what fits into so many bytes, for each method, law and precision; no weights are read.

The modules of the base are looked at once. A packed file is a header, which hardly depends on the size of an adapter,
and coefficients with their scales: so the largest size that fits is found by formula, and its bytes are then those of
the file itself, written to memory with zeros for coefficients.
"""

import json
import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from randbasis.adapters.plan import AdaptedBase, adapted_base, safetensors_bytes
from randbasis.contraction import choose_order
from randbasis.errors import BudgetError
from randbasis.methods import Bound
from randbasis.precision import BITS, CODED
from randbasis.ties import UNTIED
from randbasis.tuner import config_class
from randbasis.tuner.config import RandbasisConfig

UNITS = {"": 1, "b": 1, "kb": 1000, "kib": 1024, "mb": 1000**2, "mib": 1024**2}
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)
TOKENS = 512
"""Tokens of the training step that costs are told of."""
WITHOUT = "without a head and the description of the task"
"""What the bytes of a configuration leave out, since no plan knows it."""
BYTES_OF_A_COEFFICIENT = 16
"""In training: value, gradient and the two moments of Adam, in float32."""
TIED_LAWS = ("hashed", "sign")
"""Laws that are told of with one vector of coefficients for all matrices, the recommended first: a sum under ``hashed``
costs one pass however many coefficients there are."""
LAWS = ("sign", "uniform", "normal", "sparse(6)", "hashed")
"""Laws that are told of, the recommended first; ``hashed`` of methods that sum basis matrices alone."""


@dataclass(frozen=True)
class Preference:
    """A place in the list.

    Attributes:
        method: its method.
        least: the smallest size (rank or basis) that stands here.
        why: as a user reads it.
        tie: what the configuration must have; None for any.
    """

    method: str
    least: int
    why: str
    tie: str | None = None


PREFERRED: tuple[Preference, ...] = (
    Preference("randlora", 1, "the highest mean at its bytes where its smallest file fits, within the seeds"),
    Preference("lora", 8, "the highest mean where a budget has room for rank 8"),
    Preference(
        "nola",
        1,
        "ahead of a vector for each matrix on four data sets, within the seeds, and a shorter file",
        tie="model",
    ),
    Preference("nola", 1, "the best below RandLoRA's smallest file, of those with a vector for each matrix"),
    Preference("loraxs", 1, "level with NOLA within the seeds, and bound to the weights of its base"),
    Preference("lora", 1, "behind NOLA of 4 bits at equal bytes, as PEFT stores it"),
    Preference("vera", 1, "behind NOLA at equal bytes, within the seeds"),
    Preference("pranc", 1, "level with NOLA at small sizes, and dearer at large ones"),
)
"""The best first. One vector for all matrices: four data sets of docs/results/beyond; the others: E2E of
docs/results/budgets. On SST-2 no two of them are told apart by the seeds."""
PRECISION_ORDER = (4, 8, 16, 32, 3, 2)
"""Bits of a coefficient at one size of file, the best first: more coefficients of 4 bits beat fewer of 16 for
every method that docs/results/budgets has at two sizes, on E2E; what 3 bits cost is in docs/results.md, "Coefficients
of few bits"."""


@dataclass(frozen=True)
class _Size:
    """The number that decides how large a method is.

    Its option, what a user calls it, what else is set, and whether the coefficients rise with it.
    """

    option: str
    word: str
    fixed: Callable[[int], Mapping[str, Any]] = lambda size: {}
    rises: bool = True


_SIZES: Mapping[str, _Size] = {
    "nola": _Size("num_basis", "basis", lambda k: {"r": 8, "alpha": 8.0}),
    "vera": _Size("r", "rank"),
    "randlora": _Size("r", "rank", rises=False),
    "pranc": _Size("num_basis", "basis"),
    "loraxs": _Size("r", "rank", lambda r: {"alpha": float(r)}),
}
_WORDS = {"r": "rank", "num_basis": "basis"}
LARGEST = 1 << 16
"""Largest size that is looked for."""
PLACES = 8
"""Places that a coefficient has under ``hashed`` at the largest size: a share e⁻⁸ of them has none and never learns."""


@dataclass(frozen=True)
class Configuration:
    """One adapter that fits.

    Attributes:
        method: its method.
        law: of its basis; None where there is none.
        bits: of a coefficient, at which the packed file fits.
        options: size and scale, in the words of the command.
        coefficients: of all matrices.
        bytes: precision → bytes of the whole packed file, without a head and without the description of a task that
            ``train`` adds; of LoRA, of PEFT's file at 32 and 16 bits.
        training_bytes: that training takes beside the base model and its activations: coefficients, gradients,
            moments, factors and stored bases.
        cost: multiply-adds of a training step of :data:`TOKENS` tokens above the adapted layers' own, as a share of
            those; math (19)-(20).
        why: the reason for its place.
    """

    method: str
    law: str | None
    bits: int
    options: Mapping[str, Any]
    coefficients: int
    bytes: Mapping[int, int]
    training_bytes: int
    cost: float
    why: str

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "method": self.method,
            "law": self.law,
            "bits": self.bits,
            **self.options,
            "coefficients": self.coefficients,
            "bytes": {str(bits): size for bits, size in self.bytes.items()},
            "training_bytes": self.training_bytes,
            "cost": round(self.cost, 4),
            "why": self.why,
        }


def byte_count(text: str | int) -> int:
    """Bytes of ``64``, ``"512 B"``, ``"16KB"`` (of 1,000) or ``"16KiB"`` (of 1,024).

    Raises:
        BudgetError: it is none of these.
    """
    match = _BYTES.fullmatch(str(text).strip())
    if match is None or match.group(2).lower() not in UNITS or not 1 <= float(match.group(1)) < 1e18:
        raise BudgetError(f"a budget must be bytes, such as 512, 16KB (of 1,000) or 16KiB (of 1,024), got {text!r}")
    return int(float(match.group(1)) * UNITS[match.group(2).lower()])


def stored_bytes(coefficients: int, vectors: int, bits: int) -> int:
    """Bytes of coefficients, and of the scales of those that are codes, without header and head.

    Args:
        coefficients: how many.
        vectors: each has one scale.
        bits: of a coefficient.
    """
    return math.ceil(coefficients * bits / 8) + (4 * vectors if bits in CODED else 0)


def configurations(model: str | Path, budget: int, targets: str | list[str]) -> list[Configuration]:
    """What fits into a budget, the best first by :data:`PREFERRED` and :data:`PRECISION_ORDER`.

    Args:
        model: folder with a ``config.json``, or a hub name.
        budget: bytes of a packed file, without a head and the description of a task.
        targets: modules to adapt, as in a configuration of PEFT.

    Raises:
        BudgetError: nothing fits; it names what comes closest.
        RandbasisError: what putting an adapter on the model would raise.
    """
    base = adapted_base(model, targets)
    found = [one for method in _SIZES for one in _of_method(base, method, budget)]
    found += _loras(base, budget)
    if not found:
        smallest = min(_smallest(base), key=lambda one: one[0])
        raise BudgetError(
            f"budget {budget:,} bytes is less than any adapter on these {len(base.matrices)} matrices has; the "
            f"smallest is {smallest[1]} with {smallest[0]:,} bytes: give at least that, or fewer targets"
        )
    return sorted(found, key=_place)


def config_lines(one: Configuration, model: str | Path, targets: Sequence[str]) -> str:
    """A file for ``randbasis train --config``: the adapter and its base; data, task and output are the caller's.

    Args:
        one: the configuration.
        model: folder or hub name of the base.
        targets: modules, in the words of the command.
    """
    size = one.bytes[one.bits]
    told = {"model": str(model), "method": one.method, **one.options, "law": one.law, "targets": ",".join(targets)}
    lines = [f"{key}: {json.dumps(value)}" for key, value in told.items() if value is not None]
    comment = f"# {one.coefficients:,} coefficients; {size:,} bytes as a packed file of {one.bits} bits, {WITHOUT}"
    packing = f"# after training: randbasis pack FOLDER FILE.safetensors --bits {one.bits}"
    return "\n".join((comment, packing, *lines)) + "\n"


def _place(one: Configuration) -> tuple[int, ...]:
    reasons = [preference.why for preference in PREFERRED]
    laws = TIED_LAWS if "tie" in one.options else LAWS
    law = 0 if one.law is None else laws.index(one.law)
    # PEFT stores a LoRA at no fewer bits than 16: it stands among those of the recommended precision.
    precision = 0 if (one.method, one.bits) == ("lora", 16) else PRECISION_ORDER.index(one.bits)
    return law, precision, reasons.index(one.why), -one.coefficients


def _why(method: str, size: int, tie: str = UNTIED) -> str:
    return next(one.why for one in PREFERRED if one.method == method and size >= one.least and one.tie in (None, tie))


def counted(method: str, size: int, shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Coefficients of an adapter, and the vectors that they are in: math (9), (13), (16), (18), (26).

    Args:
        method: its method.
        size: the number that decides how large it is: rank or basis.
        shapes: ``(out, in)`` of each matrix that has coefficients of its own.
    """
    told = _SIZES[method]
    options: dict[str, Any] = {told.option: size, **told.fixed(size)}
    made = config_class(method).method_cls(**options)
    vectors = [(vector, n) for one, n in Counter(shapes).items() for vector in made.coefficient_shapes(*one).values()]
    return sum(n * math.prod(vector) for vector, n in vectors), sum(n for _, n in vectors)


class _Sizes:
    """Bytes of packed files of one method, law and tie on one base.

    The header of a file depends on the size of its adapter by the digits of the numbers in it alone, so one file of
    each length of numbers is made, and no other.
    """

    def __init__(self, base: AdaptedBase, method: str, law: str | None, tie: str = UNTIED) -> None:
        self.base, self.method, self.law, self.tie = base, method, law, tie
        self._headers: dict[tuple[int, ...], int] = {}
        self._counts: dict[int, tuple[int, int]] = {}

    def config(self, size: int) -> RandbasisConfig:
        """The configuration of that size."""
        told = _SIZES[self.method]
        given: dict[str, Any] = {told.option: size, **told.fixed(size)}
        given |= {} if self.law is None else {"law": self.law}
        given |= {} if self.tie == UNTIED else {"tie": self.tie}
        return config_class(self.method)(target_modules=self.base.targets, task_type="CAUSAL_LM", **given)

    def counts(self, size: int) -> tuple[int, int]:
        """Coefficients, and the vectors that they are in."""
        if size not in self._counts:
            shapes = [(out, in_) for _, out, in_ in self.base.matrices]
            # One vector for all, of whatever shape they are.
            self._counts[size] = counted(self.method, size, shapes if self.tie == UNTIED else shapes[:1])
        return self._counts[size]

    def bytes(self, size: int, bits: int) -> int:
        """Of the whole file, without a head."""
        coefficients, vectors = self.counts(size)
        payload = stored_bytes(coefficients, vectors, bits)
        codes = stored_bytes(coefficients, 0, bits)
        key = (bits, *(len(str(number)) for number in (size, coefficients, codes, payload)))
        if key not in self._headers:
            self._headers[key] = self.base.file_bytes(self.config(size), bits) - payload
        return self._headers[key] + payload

    @cached_property
    def sizes(self) -> Sequence[int]:
        """From the smallest file to the largest; those of more numbers than they make have no use."""
        if _SIZES[self.method].rises:
            return range(1, self._most + 1)
        every = sorted(range(1, self._most + 1), key=lambda size: (self.counts(size)[0], size))
        return [size for size in every if self.counts(size)[0] < self.base.entries] or every[:1]

    @cached_property
    def _most(self) -> int:
        """Of NOLA and PRANC, as many as the numbers of the smallest sum; of VeRA, of which papers take up to 4/3 of a
        side, two sides; of the others a side."""
        if self.method == "vera":
            return min(2 * _shortest(self.base), LARGEST)
        if self.method not in ("nola", "pranc"):
            return _shortest(self.base)
        rank = _SIZES["nola"].fixed(1)["r"]
        sums = [rank * min(out, in_) if self.method == "nola" else out * in_ for _, out, in_ in self.base.matrices]
        numbers = min(sums) if self.tie == UNTIED else sum(sums)
        return max(1, min(numbers // (PLACES if self.law == "hashed" else 1), LARGEST))

    def largest(self, bits: int, budget: int) -> int | None:
        """The size of the largest file that fits."""

        def payload(size: int) -> int:
            return stored_bytes(*self.counts(size), bits)

        header = self.bytes(self.sizes[0], bits) - payload(self.sizes[0])
        at = bisect_right(self.sizes, budget - header, key=payload) - 1
        while at >= 0 and self.bytes(self.sizes[at], bits) > budget:  # the numbers in its header are longer
            at -= 1
        return self.sizes[at] if at >= 0 else None


def _forms(method: str) -> dict[str, tuple[str | None, ...]]:
    """Tie → laws that are told of with it, the recommended first."""
    kind = config_class(method).method_cls
    if kind.sums_its_basis:
        return {UNTIED: LAWS, "model": TIED_LAWS}
    return {UNTIED: tuple(law for law in LAWS if law != "hashed") if kind.roles else (None,)}


def _of_method(base: AdaptedBase, method: str, budget: int) -> Iterator[Configuration]:
    for tie, law in ((tie, law) for tie, laws in _forms(method).items() for law in laws):
        sizes = _Sizes(base, method, law, tie)
        for bits in BITS:
            size = sizes.largest(bits, budget)
            if size is not None:
                yield _configuration(sizes, bits, size)


def _configuration(sizes: _Sizes, bits: int, size: int) -> Configuration:
    bounds = sizes.base.bounds(sizes.config(size))
    told, (coefficients, _) = _SIZES[sizes.method], sizes.counts(size)
    words = {_WORDS.get(name, name): value for name, value in told.fixed(size).items()} | {told.word: size}
    words |= {} if sizes.tie == UNTIED else {"tie": sizes.tie}
    memory = BYTES_OF_A_COEFFICIENT * coefficients + _factor_bytes(bounds) + _basis_bytes(bounds)
    of_file = {one: sizes.bytes(size, one) for one in BITS}
    why = _why(sizes.method, size, sizes.tie)
    return Configuration(sizes.method, sizes.law, bits, words, coefficients, of_file, memory, step_cost(bounds), why)


def _factor_bytes(bounds: Sequence[Bound[Any]]) -> int:
    """Factors of all matrices, or ΔW where there are none, with their gradients, in float32."""
    return 8 * sum(
        bound.out_features * bound.in_features
        if bound.method.name == "pranc"
        else bound.rank * (bound.out_features + bound.in_features)
        for bound in bounds
    )


def _basis_bytes(bounds: Sequence[Bound[Any]]) -> int:
    """Stored bases, each once."""
    kept = {(one.slab, one.storage) for bound in bounds for one in bound.bases}
    return sum(
        0 if storage == "recompute" else slab.packed_bytes if storage == "packed" or slab.disjoint else 4 * slab.entries
        for slab, storage in kept
    )


def step_cost(bounds: Sequence[Bound[Any]], tokens: int = TOKENS) -> float:
    """Multiply-adds of a training step above the adapted layers' own, as a share of those; math (19)-(20).

    Of the order that a layer would choose, and of the sums with the basis, forward and back.

    Args:
        bounds: the method on each adapted matrix.
        tokens: of the step.
    """
    above = own = 0.0
    for bound in bounds:
        own += 2 * tokens * bound.out_features * bound.in_features  # forward, and the gradient of the input
        order = choose_order("auto", bound, tokens, training=True, fused=True)
        if order == "token":
            above += bound.token_cost(tokens, training=True) + bound.token_cost(tokens, training=False)
        elif order == "pair":
            above += bound.pair_cost(tokens)
        else:
            above += bound.weight_cost(tokens, training=True, fused=True)
        slabs = [one.basis.slab for one in bound.sums.values()]
        above += sum(2 * slab.summands * slab.rows * slab.cols for slab in slabs)
    return above / own


def lora_step_cost(base: AdaptedBase, rank: int) -> float:
    """:func:`step_cost` of LoRA: both factors forward, the gradients of both, and that of the input."""
    return 3 * rank * base.lora_rank_1 / (2 * base.entries)


def _loras(base: AdaptedBase, budget: int) -> Iterator[Configuration]:
    """PEFT's LoRA in float32 and in 16 bits, as PEFT saves it."""

    def sizes(rank: int) -> dict[int, int]:
        return {bits: safetensors_bytes(base.lora(rank, bits)) for bits in (32, 16)}

    for bits in (16, 32):
        rank = 0
        while rank < _shortest(base) and sizes(rank + 1)[bits] <= budget:
            rank += 1
        if rank:
            coefficients, words = rank * base.lora_rank_1, {"rank": rank, "alpha": float(rank)}
            memory, cost = BYTES_OF_A_COEFFICIENT * coefficients, lora_step_cost(base, rank)
            yield Configuration("lora", None, bits, words, coefficients, sizes(rank), memory, cost, _why("lora", rank))


def _shortest(base: AdaptedBase) -> int:
    """The shortest side of all matrices."""
    return min(min(out, in_) for _, out, in_ in base.matrices)


def _smallest(base: AdaptedBase) -> Iterator[tuple[int, str]]:
    for method in _SIZES:
        for tie, laws in _forms(method).items():
            sizes, told = _Sizes(base, method, laws[0], tie), "" if tie == UNTIED else f" with tie {tie}"
            yield from ((sizes.bytes(sizes.sizes[0], bits), f"{method}{told} at {bits} bits") for bits in BITS)

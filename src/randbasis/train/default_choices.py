"""What a run takes where nothing is said: size of the adapter, learning rates and schedule, each with its reason.

By method, task and width of the base. The numbers are those that the sweep of ``studies/sweep.py`` measured
(``make sweep-defaults``; docs/defaults.md shows how far each is from the best of its row), so they are written here
alone. Data and arithmetic only, so that the command can show them without loading anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from randbasis.errors import UnknownMethodError, near
from randbasis.train.loop_settings import LoopSettings
from randbasis.train.settings import AdapterSettings, TrainSettings

Part = TypeVar("Part", AdapterSettings, LoopSettings)

SWEPT: Mapping[str, tuple[str, int]] = {
    "sequence-classification": ("SST-2 and STS-B", 384),
    "image-classification": ("flowers12", 192),
    "causal-lm": ("E2E", 64),
}
"""Task → the data that its rates were swept on, and the width of the model that was used."""
LIKE: Mapping[str, tuple[str, float]] = {"embedding": ("sequence-classification", 0.03)}
"""Task without a sweep of its own and without a head → the task whose rates it takes, and the share of them: cosines
that are good already are soon lost. On STS-B, NOLA falls from Spearman .867 to .854 in 150 steps at 3e-3, and gets .868
after 100 at 3e-4 (all-MiniLM-L6).
"""


@dataclass(frozen=True)
class MethodDefaults:
    """What is known of a method.

    Args:
        rates: task → learning rate at the width of :data:`SWEPT`.
        falls: the power of the width by which the rate falls in wider models.
        rank: the rank.
        basis: the number of basis matrices.
        basis_for: task → another number.
        few: the size (rank, or basis matrices) below which the rate rises; None where one rate carries over.
        scale: alpha in units of the rank, so that a learning rate fits every rank.
    """

    rates: Mapping[str, float]
    falls: float
    rank: int | None = None
    basis: int | None = None
    scale: float | None = None
    few: int | None = None
    basis_for: Mapping[str, int] = field(default_factory=dict[str, int])


def _rates(text: float, images: float, language: float) -> dict[str, float]:
    return dict(zip(SWEPT, (text, images, language), strict=True))


METHODS: Mapping[str, MethodDefaults] = {
    "nola": MethodDefaults(
        _rates(1e-2, 3e-2, 3e-2), 0.7, rank=8, basis=128, scale=1.0, few=16, basis_for={"causal-lm": 512}
    ),
    "vera": MethodDefaults(_rates(3e-2, 5e-2, 1e-1), 0.7, rank=256),
    "randlora": MethodDefaults(_rates(3e-4, 1e-3, 3e-3), 0.8, rank=32),
    "pranc": MethodDefaults(_rates(3e-3, 3e-3, 1e-2), 0.8, basis=128),
    "loraxs": MethodDefaults(_rates(5e-3, 1e-2, 3e-2), 1.0, rank=16, scale=1.0, few=16),
    "lora": MethodDefaults(_rates(2e-3, 5e-3, 1e-2), 1.0, rank=8, scale=1.0, few=8),
}
"""Half a decade above these NOLA and VeRA learn nothing on SST-2 and STS-B, nor does LoRA at 1e-2 on SST-2
(docs/defaults.md). Where data sets disagree a rate between theirs is taken: LoRA at 1e-3 is 3 points behind on STS-B,
at 3e-3 2 points behind on SST-2 in 375 steps; LoRA-XS learns at 1e-2 on SST-2 and not on STS-B. With 512 basis
matrices NOLA takes 9 % more off the loss of E2E than with 128, and with 1,024 no more than that. RTE decides nothing:
LoRA answers by chance after three epochs of it.
"""
SIZED_BY: Mapping[str, str] = {
    **dict.fromkeys(("nola", "pranc"), "basis"),
    **dict.fromkeys(("vera", "randlora", "loraxs", "lora"), "rank"),
}
"""Method → the setting that decides how many coefficients it has."""
RISE = 10**0.5
"""By which a rate rises at most."""
HEAD_RATES: Mapping[str, float] = {"sequence-classification": 3e-3, "image-classification": 3e-3}
"""Task → learning rate of a head beside an adapter."""
HEAD_ALONE = 1e-2
"""Learning rate of a head on a frozen base."""
SCHEDULE = "linear"
WARMUP = 0.06


@dataclass(frozen=True)
class Choice:
    """A value that was chosen because none was given, and why it is this one."""

    value: float | int | str
    reason: str

    def __str__(self) -> str:
        return f"{self.value:g} ({self.reason})" if isinstance(self.value, float) else f"{self.value} ({self.reason})"


Choices = Mapping[str, Choice]
"""Setting → what was chosen for it."""


def choose(method: str, task: str, width: int | None, size: int | None = None) -> Choices:
    """The settings of a run where nothing is said.

    Args:
        method: of the adapter, or ``none`` for a head alone.
        task: name of the task.
        width: of the hidden states of the base; ``None`` where its configuration does not tell.
        size: rank or basis matrices, as :data:`SIZED_BY` has it; ``None`` for the usual.

    Raises:
        UnknownMethodError: nothing is known of the method.
    """
    known = (*METHODS, "none")
    if method not in known:
        raise UnknownMethodError(f"method {method!r} is unknown; {near(method, known)}")
    of, share = LIKE.get(task, (task if task in SWEPT else next(iter(SWEPT)), 1.0))
    data, swept_at = SWEPT[of]
    found = {"schedule": Choice(SCHEDULE, "as in the sweep"), "warmup": Choice(WARMUP, "as in the sweep")}
    if method == "none":
        return found | {"learning_rate": Choice(HEAD_ALONE, f"a head alone, {of}, swept on {data}")}
    if of in HEAD_RATES and task not in LIKE:
        found["head_learning_rate"] = Choice(HEAD_RATES[of], f"a head beside an adapter, {of}, swept on {data}")
    own = METHODS[method]
    for name, value in (("rank", own.rank), ("basis", own.basis)):
        if value is not None:
            found[name] = Choice(value, f"{method}'s own")
    if of in own.basis_for:
        found["basis"] = Choice(own.basis_for[of], f"{method}, {of}, swept on {data}")
    if own.scale is not None and own.rank is not None:
        found["alpha"] = Choice(own.scale * own.rank, f"{own.scale:g} times the rank")
    rate, why = own.rates[of], f"{method}, {of}, swept on {data} at width {swept_at}"
    if width is not None and width != swept_at:
        rate *= (swept_at / width) ** own.falls
        why += f", for width {width}"
    if own.few is not None and size is not None and size < own.few:
        # Fewer terms move ΔW less in a step: the square root, as far as the trials of all comparisons bear it out.
        rate *= min(RISE, (own.few / size) ** 0.5)
        why += f", for {SIZED_BY[method]} {size} below {own.few}"
    if task in LIKE:
        rate, why = rate * share, f"{share:g} of the rate of {why}"
    return found | {"learning_rate": Choice(float(f"{rate:.1g}"), why)}


def filled(settings: TrainSettings, width: int | None) -> tuple[TrainSettings, dict[str, str]]:
    """The settings with a value for what was left open, and setting → value and reason of each.

    Raises:
        UnknownMethodError: nothing is known of the method.
    """
    size = getattr(settings.adapter, SIZED_BY.get(settings.adapter.method, ""), None)
    choices = choose(settings.adapter.method, settings.task, width, size)
    adapter, of_adapter = filled_adapter(settings.adapter, choices)
    loop, of_loop = filled_loop(settings.loop, choices)
    return replace(settings, adapter=adapter, loop=loop), of_adapter | of_loop


def filled_loop(loop: LoopSettings, choices: Choices) -> tuple[LoopSettings, dict[str, str]]:
    """As :func:`filled`, of the loop alone; nothing is chosen that would mean nothing."""
    needless = {
        "learning_rate": "head_learning_rate" not in choices and loop.head_learning_rate is not None,
        "warmup": loop.schedule == "constant",
    }
    return _filled(loop, {name: choice for name, choice in choices.items() if not needless.get(name)})


def filled_adapter(adapter: AdapterSettings, choices: Choices) -> tuple[AdapterSettings, dict[str, str]]:
    """As :func:`filled`, of the adapter alone; alpha follows a rank that was given."""
    own = METHODS.get(adapter.method)
    if own is not None and own.scale is not None and adapter.rank is not None:
        choices = {**choices, "alpha": replace(choices["alpha"], value=own.scale * adapter.rank)}
    return _filled(adapter, choices)


def _filled(part: Part, choices: Choices) -> tuple[Part, dict[str, str]]:
    names = [one.name for one in fields(part) if one.name in choices and getattr(part, one.name) is None]
    values: dict[str, Any] = {name: choices[name].value for name in names}
    return replace(part, **values), {name: str(choices[name]) for name in names}

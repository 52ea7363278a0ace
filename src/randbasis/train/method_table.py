"""From the words of the command to a PEFT configuration, by one table."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from peft import LoraConfig, PeftConfig

from randbasis.adapters.saved import SavedAdapter
from randbasis.errors import HyperparameterError, UnknownMethodError, near
from randbasis.ties import UNTIED
from randbasis.train.default_choices import SIZED_BY
from randbasis.train.settings import AdapterSettings
from randbasis.tuner import config_class
from randbasis.tuner.config import RandbasisConfig

_COMMON = {word: word for word in ("dropout", "quantize_coefficients")}
_OF_A_SEED = {"seed": "seed", "law": "law", **_COMMON}
_METHODS: dict[str, dict[str, str]] = {
    "nola": {
        "rank": "r",
        "basis": "num_basis",
        "basis_b": "num_basis_b",
        "alpha": "alpha",
        "parametrization": "parametrization",
        "unique_basis": "share_basis",
        "tie": "tie",
        **_OF_A_SEED,
    },
    "vera": {"rank": "r", **_OF_A_SEED},
    "randlora": {"rank": "r", "alpha": "alpha", **_OF_A_SEED},
    "pranc": {"basis": "num_basis", "unique_basis": "share_basis", "tie": "tie", **_OF_A_SEED},
    "loraxs": {"rank": "r", "alpha": "alpha", **_COMMON},
    "lora": {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
}
"""Method → what the words of the command are called in its configuration."""

_ALLOTS = ("nola", "pranc")
"""Methods whose basis matrices can be allotted by layer; how many each gets is known when a run begins."""

METHOD_NAMES = (*_METHODS, "none")


def method_words() -> dict[str, set[str]]:
    """Method → the words of the command that mean something to it."""
    words = {name: {*names, "targets", *(["allot"] if name in _ALLOTS else [])} for name, names in _METHODS.items()}
    return words | {"none": set()}


def method_of(config: PeftConfig | None) -> str:
    """The method of a configuration, of ours or PEFT's LoRA; ``none`` for a head alone, else PEFT's name of it."""
    if config is None:
        return "none"
    if isinstance(config, RandbasisConfig):
        return config.method
    return "lora" if isinstance(config, LoraConfig) else str(config.peft_type)


def size_of(config: PeftConfig | None) -> int | None:
    """The rank or number of basis matrices that decides the coefficients of a configuration; None where none does."""
    method = method_of(config)
    return None if method not in SIZED_BY else getattr(config, _METHODS[method][SIZED_BY[method]])


def is_of_targets(error: ValueError) -> bool:
    """Whether PEFT says that a base does not have the modules to adapt, or has others in their place."""
    return str(error).startswith(("Target module", "No modules were targeted"))


def peft_config(
    settings: AdapterSettings, *, task_type: str | None, head: list[str], unused: Sequence[str] = ()
) -> PeftConfig | None:
    """The configuration of the adapter.

    Args:
        settings: the words of the command.
        task_type: PEFT's name of the task.
        head: modules that are trained and saved whole.
        unused: modules that are left alone.

    Returns:
        A configuration of ours or PEFT's LoRA; ``None`` for the method ``none``.

    Raises:
        UnknownMethodError: there is no such method.
        HyperparameterError: the method has no such hyper-parameter.
        RankError: a rank or a number of basis matrices below 1.
    """
    settings.check()
    if settings.method not in METHOD_NAMES:
        raise UnknownMethodError(f"method {settings.method!r} is unknown; {near(settings.method, METHOD_NAMES)}")
    if settings.method == "none":
        return None
    names = _METHODS[settings.method]
    arguments = {names[word]: value for word, value in _given(settings, names).items()}
    if "share_basis" in arguments:
        arguments["share_basis"] = not arguments["share_basis"]
    if settings.targets:
        arguments["target_modules"] = target_modules(settings.targets)
    arguments |= {"modules_to_save": head or None, "exclude_modules": [*head, *unused] or None}
    arguments["task_type"] = task_type
    return LoraConfig(**arguments) if settings.method == "lora" else config_class(settings.method)(**arguments)


def words_of(adapter: SavedAdapter) -> AdapterSettings:
    """The words that an adapter was made by: :func:`peft_config` backwards.

    Raises:
        UnknownMethodError: its method is one of PEFT's that the command has no word for.
        RandbasisError: its configuration is not what it has to be.
    """
    method = adapter.method.lower()
    if method not in METHOD_NAMES:
        raise UnknownMethodError(
            f"{adapter.where} has the method {method!r}, which cannot be trained here; there are: "
            f"{', '.join(METHOD_NAMES)}"
        )
    if adapter.is_head:
        return AdapterSettings(method="none")
    options = adapter.options if method == "lora" else vars(adapter.ours().config)
    words = {word: options[name] for word, name in _METHODS[method].items()}
    if "unique_basis" in words:
        words["unique_basis"] = not words["unique_basis"] and words["tie"] == UNTIED
    return AdapterSettings(method=method, targets=targets_of(options), **words)


def targets_of(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The targets of a configuration, in the words of the command."""
    names: str | list[str] | None = options["target_modules"]
    if isinstance(names, str):
        return (names if names == "all-linear" else f"re:{names}",)
    slices: dict[str, list[str]] = options.get("target_slices") or {}
    return tuple(f"{one}[{','.join(slices[one])}]" if one in slices else one for one in sorted(names or ()))


def _given(settings: AdapterSettings, names: dict[str, str]) -> dict[str, Any]:
    """The words that differ from their defaults; each must mean something to the method."""
    given: dict[str, Any] = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name in ("method", "targets") or value == field.default:
            continue
        if field.name not in names:
            if field.name == "seed" or (field.name == "allot" and settings.method in _ALLOTS):
                continue
            raise HyperparameterError(f"method {settings.method!r} has no {field.name}; it takes {', '.join(names)}")
        given[field.name] = value
    return given


def target_modules(targets: tuple[str, ...]) -> str | list[str]:
    """What a configuration of PEFT calls the targets of the command."""
    if targets == ("all-linear",):
        return "all-linear"
    if len(targets) == 1 and targets[0].startswith("re:"):
        return targets[0].removeprefix("re:")
    return list(targets)

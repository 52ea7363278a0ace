"""SPEC ↔ PEFT CONFIGURATION: the same adapter in the words of a packed file and in those of a directory."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from randbasis.adapter_file import PackedAdapter, Spec, SpecMatrix
from randbasis.errors import RandbasisError, SpecValueError
from randbasis.methods import Method
from randbasis.ties import UNTIED
from randbasis.tuner.base_shapes import compress_shapes
from randbasis.tuner.config import RandbasisConfig, config_class
from randbasis.tuner.meaning import meaning_tensor
from randbasis.tuner.registration import PREFIX
from randbasis.tuner.saved_files import SAVED_PREFIX
from randbasis.tuner.targets import Part, parts_of
from randbasis.tuner.tied import holders

STREAMS = f"{PREFIX}streams"
_ELSEWHERE = {
    *("method", "seed", "law", "peft_type", "peft_version", "inference_mode"),
    *("base_model_name_or_path", "base_shapes", "base_rows", "base_model_type", "base_weights"),
    *("quantize_coefficients", "tie"),
}
"""Keys of a PEFT configuration that the spec holds in its own words, or that PEFT fills in when it writes.

The values in a file are what the adapter computes with, so that what quantized them in training has no place in it.
"""
_UNORDERED = ("target_modules", "exclude_modules")


def peft_options(config: RandbasisConfig, matrices: Iterable[SpecMatrix]) -> dict[str, Any]:
    """The options that are not the usual ones and that the spec does not hold in its own words.

    Args:
        config: of the adapter.
        matrices: those that it adapts; patterns that name each of them by its path are not said again.
    """
    mine, usual = (_plain(one.to_dict()) for one in (config, config_class(config.method)()))
    held = _ELSEWHERE | config.hyperparameters().keys()
    patterns = patterns_of(config, config.method_for(""), matrices)
    held |= {key for key, pattern in patterns.items() if pattern == mine[key]}
    options = {key: value for key, value in mine.items() if key not in held and value != usual[key]}
    for key in _UNORDERED:
        if isinstance(options.get(key), list):
            options[key].sort()
    return options


def patterns_of(
    config: RandbasisConfig | type[RandbasisConfig], common: Method, matrices: Iterable[SpecMatrix]
) -> dict[str, dict[str, Any]]:
    """Name of a pattern → regular expression → value: every matrix by its path, where some differ from the others."""
    listed = sorted(matrices, key=lambda one: -len(one.name))  # a path may end in another
    found: dict[str, dict[str, Any]] = {}
    for key, option in config.patterns:
        values = {re.escape(one.name): getattr(one.method, option) for one in listed}
        found[key] = values if {*values.values()} - {getattr(common, option)} else {}
    return found


def short_options(config: RandbasisConfig, matrices: Sequence[SpecMatrix]) -> dict[str, Any]:
    """As :func:`peft_options`; where coefficients are shared, without targets that are the last names of all layers.

    Args:
        config: of the adapter.
        matrices: all of them.
    """
    options = peft_options(config, matrices)
    if config.tie != UNTIED and options.get("target_modules") == _last_names(one.name for one in matrices):
        del options["target_modules"]
    return options


def _last_names(paths: Iterable[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(options, default=sorted))


def bare(method: Method) -> Method:
    """The method without how its basis is kept, which a file does not say."""
    return replace(method, basis_storage="auto")


def named_tensors(adapter: PackedAdapter) -> dict[str, Tensor]:
    """The tensors of a packed adapter, under the names that they have in a directory."""
    tensors = dict(adapter.extra)
    streams: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    kept = holders(adapter.spec.matrices, adapter.spec.tie)
    for place, (one, delta) in enumerate(adapter.matrices()):
        suffix = Part(one.part, one.start, one.start + one.rows).suffix
        for name, values in delta.coefficients.items() if kept[place] == place else ():
            tensors[f"{SAVED_PREFIX}{one.name}.{PREFIX}{name}{suffix}.weight"] = values.clone()
        streams.setdefault(one.name, []).append((one.start, delta.bound.site.streams))
    if adapter.streams is not None:
        for name, rows in streams.items():
            stored = torch.tensor([values for _, values in sorted(rows)], dtype=torch.int64)
            tensors[f"{SAVED_PREFIX}{name}.{STREAMS}.weight"] = stored
    spec = adapter.spec
    return tensors | meaning_tensor(spec.method, None, spec.matrices, spec.base.weights, tie=spec.tie)


def config_of(spec: Spec, where: str, base_name: str | None = None) -> RandbasisConfig:
    """The PEFT configuration of a spec.

    Args:
        spec: of a packed adapter.
        where: what it was read from, for messages.
        base_name: folder or hub name of the base; None takes the spec's.

    Raises:
        SpecValueError: the options for PEFT mean other matrices, methods or values than the spec lists.
        RandbasisError: an option is one that the method cannot take.
    """
    common = spec.method
    rows = {f"{one.name}[{one.part}]": (one.start, one.start + one.rows) for one in spec.matrices if one.part}
    told: dict[str, Any] = {
        **{key: value for key, value in vars(common).items() if key != "basis_storage"},
        "method": common.name,
        "tie": spec.tie,
        "base_model_name_or_path": base_name or spec.base.name,
        "base_model_type": spec.base.architecture,
        "base_weights": spec.base.weights,
        "base_shapes": compress_shapes(spec.shapes),
        "base_rows": compress_shapes(rows) if rows else None,
        "inference_mode": True,
    }
    # A file may not say how PEFT picks the layers: by their paths, then, or as `short_options` leaves it out.
    names = list(spec.shapes) if spec.tie == UNTIED else _last_names(spec.shapes)
    picked: dict[str, Any] = {"target_modules": names}
    try:
        if any(one.method is not common and one.method != common for one in spec.matrices):
            patterns = patterns_of(config_class(common.name), common, spec.matrices)
            picked |= {key: pattern for key, pattern in patterns.items() if pattern}
        config = RandbasisConfig(**(picked | deepcopy(dict(spec.peft)) | told))  # PEFT writes into lists
        agrees = not (spec.peft.keys() & told.keys()) and _means(config, spec)
    except RandbasisError as error:
        raise type(error)(f"{where}: {error}") from error
    except (TypeError, KeyError, AttributeError, ValueError, re.error) as error:
        raise SpecValueError(
            f"{where}: peft in the spec must hold options of {common.name}, but {type(error).__name__}: {error}; "
            "pack the adapter again"
        ) from error
    if not agrees:
        raise SpecValueError(
            f"{where}: peft in the spec must mean the matrices and hyper-parameters that the spec lists, got "
            f"{dict(spec.peft)}; pack the adapter again"
        )
    return config


def _means(config: RandbasisConfig, spec: Spec) -> bool:
    """Whether a configuration gives each matrix of a spec the same method, and each layer the same parts."""
    parts: dict[str, set[str]] = {}
    for one in spec.matrices:
        parts.setdefault(one.name, set()).update([one.part] if one.part else [])
    return (
        config.quantize_coefficients is None
        and all(set(parts_of(name, config.target_slices)) == named for name, named in parts.items())
        and all((m := config.method_for(one.name)) == one.method or bare(m) == one.method for one in spec.matrices)
    )

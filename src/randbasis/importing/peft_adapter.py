"""An adapter directory of PEFT's own LoRA, VeRA or RandLoRA as what it does: a ΔW for each layer, as factors.

Only files are read, never a pickle, and no model is built. What a directory does beside adding a ΔW to linear layers is
refused, not left out.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

from randbasis.adapters.base_model import linear_shapes, meta_model, read_config, shape_of
from randbasis.adapters.saved import AdapterLocation, SavedAdapter, open_adapter
from randbasis.errors import (
    AdapterFilesError,
    BaseMismatchError,
    DataMissingError,
    ProjectionsMissingError,
    UnsupportedAdapterError,
)
from randbasis.methods import Factors
from randbasis.tuner.registration import TYPE_NAME
from randbasis.tuner.saved_files import (
    CONFIG_FILE,
    SAVED_PREFIX,
    WEIGHTS_FILE,
    natural_order,
)

REPLACED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starts of LoRA that put other weights in the place of the base model's."""
OTHER_FORMS = (
    *("use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "layer_replication", "arrow_config"),
    *("alora_invocation_tokens", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "megatron_config"),
)
"""Options with which an adapter is more, or other, than ``W0 + B A``."""


@dataclass(frozen=True)
class PeftAdapter(ABC):
    """A directory whose files are there and mean a ΔW of linear layers and, perhaps, a head.

    Attributes:
        saved: the directory as it was read.
    """

    kind: ClassVar[str]
    tensors: ClassVar[tuple[str, ...]]
    full_rank: ClassVar[bool] = False

    saved: SavedAdapter

    @property
    def path(self) -> Path:
        """The directory."""
        return self.saved.weights.parent

    @property
    def options(self) -> Mapping[str, Any]:
        """Its configuration, as the file holds it."""
        return self.saved.options

    @property
    def stored(self) -> Mapping[str, tuple[int, ...]]:
        """Tensor name → shape, as in the file."""
        return self.saved.shapes

    @property
    def layers(self) -> list[str]:
        """Paths of the adapted layers in the base model, in their order."""
        ends = tuple(f".{name}" for name in self.tensors)
        found = dict.fromkeys(name.removesuffix(end) for name in self.stored for end in ends if name.endswith(end))
        return sorted((name.removeprefix(SAVED_PREFIX) for name in found), key=natural_order)

    @property
    def head(self) -> list[str]:
        """Names of the tensors of modules that were trained whole beside the adapter."""
        modules = cast("list[str]", self.options.get("modules_to_save") or [])
        return [name for name in self.stored if set(name.split(".")) & set(modules) and not self._is_own(name)]

    def load(self, names: Collection[str]) -> dict[str, Tensor]:
        """Tensors by their names in the file."""
        with cast("Any", safe_open)(self.saved.weights, "pt") as file:
            return {name: file.get_tensor(name) for name in names}

    @abstractmethod
    def shape(self, key: str) -> tuple[int, int]:
        """``(out, in)`` of a layer."""

    @abstractmethod
    def factors(self, key: str) -> Factors:
        """``ΔW = up @ down`` of a layer in float64, ``[out, q]`` and ``[q, in]``."""

    def check(self) -> None:
        """Raise if the adapter does anything that its ΔW and its head do not say.

        Raises:
            UnsupportedAdapterError: it does.
            AdapterFilesError: a tensor is missing.
        """
        bias = self.options.get("bias", "none")
        if bias != "none":
            raise self.refused(f"trains biases (bias={bias!r})")
        rest = [name for name in self.stored if not self._is_own(name)]
        unknown = sorted(set(rest) - set(self.head))
        if unknown:
            raise self.refused(f"has the tensor {unknown[0]!r}, of shape {list(self.stored[unknown[0]])}")
        for key in self.layers:
            missing = [name for name in self.tensors if f"{SAVED_PREFIX}{key}.{name}" not in self.stored]
            if missing:
                raise AdapterFilesError(
                    f"{self.path / WEIGHTS_FILE} must have {' and '.join(self.tensors)} of each layer, it has no "
                    f"{missing[0]} of {key!r}; copy it again from where the adapter was saved"
                )
        if not self.layers:
            raise AdapterFilesError(
                f"{self.path / WEIGHTS_FILE} has no tensor of {self.kind} ({', '.join(self.tensors)}); "
                f"{CONFIG_FILE} and {WEIGHTS_FILE} do not belong together"
            )

    def refused(self, what: str) -> UnsupportedAdapterError:
        """The error for what cannot be brought into another form."""
        return UnsupportedAdapterError(
            f"{self.path} must be a {self.kind} adapter that adds a ΔW to linear layers and may have a head; it {what}"
            ", which is no such change; merge it into its base model with PEFT (merge_and_unload)"
        )

    def _is_own(self, name: str) -> bool:
        return name.endswith(tuple(f".{own}" for own in self.tensors))

    def _shapes(self, key: str) -> list[tuple[int, ...]]:
        return [self.stored[f"{SAVED_PREFIX}{key}.{name}"] for name in self.tensors]

    def _number(self, option: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise AdapterFilesError(
                f"{self.path / CONFIG_FILE}: {option} must be a finite number, got {value!r}; take the file from where "
                "the adapter was saved"
            )
        return float(value)

    def _wrong_shapes(self, key: str, found: object) -> AdapterFilesError:
        return AdapterFilesError(
            f"{self.path / WEIGHTS_FILE}: the tensors of {key!r} must fit each other, got the shapes {found} of "
            f"{', '.join(self.tensors)}; copy it again from where the adapter was saved"
        )

    def _tensors(self, key: str) -> list[Tensor]:
        names = [f"{SAVED_PREFIX}{key}.{name}" for name in self.tensors]
        found = self.load(names)
        return [found[name].double() for name in names]


@dataclass(frozen=True)
class LoraAdapter(PeftAdapter):
    """PEFT's LoRA: ``alpha / r · B A``, or ``alpha / √r · B A`` with rsLoRA; alpha may differ by layer."""

    kind = "LoRA"
    tensors = ("lora_A.weight", "lora_B.weight")

    def check(self) -> None:
        """As above, and refuse LoRA's other forms: DoRA, LoRA of embeddings and convolutions, PiSSA, ...

        Raises:
            UnsupportedAdapterError: it is another form.
        """
        for option in OTHER_FORMS:
            if self.options.get(option):
                raise self.refused(f"was made with {option}={self.options[option]!r}")
        start = self.options.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(REPLACED_BASE):
            raise UnsupportedAdapterError(
                f"{self.path} must be a LoRA of the base model, it is one of what init_lora_weights={start!r} left; "
                "save it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), which makes it one"
            )
        super().check()
        for name, shape in self.stored.items():
            if self._is_own(name) and len(shape) != 2:
                raise self.refused(f"adapts {name!r} of shape {list(shape)}, a convolution")
        for key in self.layers:
            down, up = self._shapes(key)
            if down[0] != up[1]:
                raise self._wrong_shapes(key, [down, up])

    def shape(self, key: str) -> tuple[int, int]:
        """Rows of B, columns of A."""
        down, up = self._shapes(key)
        return up[0], down[1]

    def factors(self, key: str) -> Factors:
        """``alpha / r · B`` and ``A``, whichever way round the layer keeps its weight."""
        down, up = self._tensors(key)
        patterns = cast("Mapping[str, float]", self.options.get("alpha_pattern") or {})
        said = patterns.get(get_pattern_key(list(patterns), key), self.options.get("lora_alpha", 8))
        rank, alpha = down.shape[0], self._number("lora_alpha", said)
        return Factors(up * (alpha / (rank**0.5 if self.options.get("use_rslora") else rank)), down)


@dataclass(frozen=True)
class ProjectedAdapter(PeftAdapter):
    """What PEFT's VeRA and RandLoRA have in common: one frozen pair, drawn for the largest layer, cut for the others.

    Attributes:
        shapes: layer → ``(out, in)``, which the files do not tell.
    """

    pair: ClassVar[tuple[str, str]]

    shapes: Mapping[str, tuple[int, int]]

    def check(self) -> None:
        """As above, and refuse a checkpoint without its projections.

        Raises:
            ProjectionsMissingError: the random matrices are not in it.
        """
        missing = [name for name in self.pair if f"base_model.{name}" not in self.stored]
        if missing:
            key, saved = self.options.get("projection_prng_key", 0), self.options.get("save_projection")
            raise ProjectionsMissingError(
                f"{self.path} must carry its random matrices {' and '.join(self.pair)}, it was saved without them"
                f" (save_projection={saved}). PEFT draws them from projection_prng_key={key} with torch's generator; "
                "machine, versions and model decide what comes out, so they cannot be drawn here. Load the adapter "
                "with the PEFT, and on the kind of machine, that trained it, with save_projection=True in its "
                "configuration, and save it again"
            )
        super().check()

    def shape(self, key: str) -> tuple[int, int]:
        """As in the base model."""
        return self.shapes[key]

    @cached_property
    def frozen(self) -> tuple[Tensor, Tensor]:
        """The frozen pair in float64."""
        first, second = (f"base_model.{name}" for name in self.pair)
        found = self.load((first, second))
        return found[first].double(), found[second].double()

    def _is_own(self, name: str) -> bool:
        own = (*self.tensors, *self.pair)
        return name.endswith(tuple(f".{end}" for end in own))

    def _cut(self, key: str, tensor: Tensor, sizes: Mapping[int, int]) -> Tensor:
        """The first rows or columns of a frozen matrix, axis by axis."""
        for axis, size in sizes.items():
            if tensor.shape[axis] < size:
                raise self._misfit(key, f"is cut out of {list(tensor.shape)}")
            tensor = tensor.narrow(axis, 0, size)
        return tensor

    def _misfit(self, key: str, what: str) -> BaseMismatchError:
        out, in_ = self.shapes[key]
        return BaseMismatchError(
            f"{self.path}: {key!r} is {out}×{in_} (out×in) in the base model, but {what} in the adapter; "
            "name the base model that it was made for"
        )


@dataclass(frozen=True)
class VeraAdapter(ProjectedAdapter):
    """PEFT's VeRA: ``Λ_b B Λ_d A`` with the first rows of B and columns of A, in the scale of the largest layer."""

    kind = "VeRA"
    tensors = ("vera_lambda_b", "vera_lambda_d")
    pair = ("vera_A", "vera_B")

    def factors(self, key: str) -> Factors:
        """``Λ_b B`` and ``Λ_d A``."""
        out, in_ = self.shapes[key]
        rows, ranks = self._tensors(key)
        if rows.shape[0] != out:
            raise self._misfit(key, f"has {rows.shape[0]} rows")
        a, b = self.frozen
        if {a.shape[0], b.shape[1]} != {ranks.shape[0]}:
            raise self._wrong_shapes(key, self._shapes(key))
        wide = self._cut(key, b, {0: out})
        return Factors(rows.unsqueeze(1) * wide, ranks.unsqueeze(1) * self._cut(key, a, {1: in_}))


@dataclass(frozen=True)
class RandLoraAdapter(ProjectedAdapter):
    """PEFT's RandLoRA, ``alpha / r · Σ Bⱼ Λⱼ A Γⱼ`` as it is coded there.

    PEFT flattens the terms of A as (rank, term) and those of B as (term, rank): its product is a fixed other pairing
    than the paper's, equal in distribution. Here it is repeated, since it decides the values.
    """

    kind = "RandLoRA"
    full_rank = True
    tensors = ("randlora_lambda", "randlora_gamma")
    pair = ("randlora_A", "randlora_B")

    def factors(self, key: str) -> Factors:
        """``[out, n r]`` and ``[n r, in]``: the side with coefficients is the smaller one."""
        out, in_ = self.shapes[key]
        lam, gamma = self._tensors(key)
        terms, small = gamma.shape
        if small != min(out, in_):
            raise self._misfit(key, f"has a smaller side of {small}")
        a, b = self.frozen
        if lam.shape != (a.shape[0], terms) or b.shape[2] != a.shape[0]:
            raise self._wrong_shapes(key, self._shapes(key))
        narrow = lam.unsqueeze(-1) * self._cut(key, a, {2: small}) * gamma
        wide = self._cut(key, b, {0: max(out, in_), 1: terms}).flatten(1)
        scaling = self._number("randlora_alpha", self.options.get("randlora_alpha", 640)) / lam.shape[0]
        if small == in_:
            return Factors(scaling * wide, narrow.flatten(0, 1))
        return Factors(scaling * narrow.flatten(0, 1).T, wide.T)


def read_peft_adapter(adapter: AdapterLocation, model: str | None = None) -> PeftAdapter:
    """Check a directory of PEFT's LoRA, VeRA or RandLoRA; tensors are read when they are needed.

    Args:
        adapter: the directory, or what :func:`randbasis.adapters.saved.open_adapter` made of it.
        model: folder or hub name of the base, of which only the configuration is read. VeRA and RandLoRA need it, since
            their files do not tell the shapes of the layers; None takes the one that the adapter names.

    Raises:
        AdapterMissingError: there is nothing.
        AdapterFilesError: a file is missing or damaged, or the adapter is of this package.
        UnsupportedAdapterError: it is of another method of PEFT, or does more than to add a ΔW to linear layers.
        ProjectionsMissingError: VeRA or RandLoRA without its random matrices.
        BaseMismatchError: a layer is not in the base model, or has another shape there.
        DataMissingError: the configuration of the base model is needed and cannot be read.
    """
    saved = open_adapter(adapter)
    kind = saved.kind
    if kind == TYPE_NAME:
        raise AdapterFilesError(
            f"{saved.where} must be an adapter of PEFT's LoRA, VeRA or RandLoRA, it is one of randbasis already; "
            "`randbasis export` brings it into other forms"
        )
    if kind not in _KINDS:
        raise UnsupportedAdapterError(
            f"{saved.where} must be an adapter of PEFT's {', '.join(one.kind for one in _KINDS.values())}, it is of "
            f"peft_type {kind!r}; convert it to LoRA with PEFT first (peft.convert_to_lora)"
        )
    if kind == "LORA":
        found: PeftAdapter = LoraAdapter(saved)
        found.check()
        return found
    bare = _KINDS[kind](saved, {})
    bare.check()
    return replace(bare, shapes=_base_shapes(bare, model))


_KINDS: dict[str, Any] = {"LORA": LoraAdapter, "VERA": VeraAdapter, "RANDLORA": RandLoraAdapter}


def _base_shapes(found: PeftAdapter, model: str | None) -> dict[str, tuple[int, int]]:
    name = model or found.options.get("base_model_name_or_path")
    if not name:
        raise DataMissingError(
            f"{found.path} does not name its base model, whose configuration tells the shapes of the layers that a "
            f"{found.kind} adapter has no record of; name the base model"
        )
    known = linear_shapes(meta_model(read_config(name)))
    return {key: shape_of(key, known) for key in found.layers}

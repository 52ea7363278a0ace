"""WHAT COEFFICIENTS MEAN, as one small tensor an adapter: who loads a state dict alone can tell seed 42 from seed 7.

The tensor is text of a fixed width in bytes: the options that all layers share in plain sight, so that both values can
be named, and digests of the rest. Streams that are stored are not part of it: they travel as they are.
"""

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, cast

import torch
from torch import Tensor, nn

from randbasis.adapter_file import SpecMatrix
from randbasis.errors import AdapterFilesError, MeaningError
from randbasis.methods import Method
from randbasis.ties import UNTIED
from randbasis.tuner.registration import PREFIX
from randbasis.tuner.saved_files import SAVED_PREFIX, natural_order

MEANING = f"{PREFIX}meaning"
"""Name of the attribute of a layer, and so of the tensor, that holds the meaning."""
WIDTH = 160
"""Bytes of the tensor: one size for all, so that no loader finds two that do not fit."""
_DIGEST = 12


@dataclass(frozen=True)
class Meaning:
    """All that fixes ΔW once the coefficients, and streams that are stored beside them, are given.

    Attributes:
        options: name → value of the options that all layers share; the method is the first, the seed the second.
        layers: digest of the shapes and rows of the adapted matrices.
        patterns: digest of the options of single layers, and of the streams that all layers share.
    """

    options: Mapping[str, Any]
    layers: str
    patterns: str

    def tensor(self) -> Tensor:
        """``[160]`` bytes, on the CPU."""
        text = json.dumps([*self.options.values(), self.layers, self.patterns], separators=(",", ":"))
        return torch.tensor(list(text.encode("ascii").ljust(WIDTH)), dtype=torch.uint8, device="cpu")

    def check(self, found: Tensor, adapter: str) -> None:
        """Raise unless coefficients that come with a tensor mean what they would mean here.

        Args:
            found: the tensor beside the coefficients.
            adapter: name of the adapter that they are put on.

        Raises:
            MeaningError: they do not; names what differs, both values.
            AdapterFilesError: the tensor is not one that this package wrote.
        """
        # Who casts a whole file to half precision keeps these numbers: they are below 128.
        if found.is_meta or torch.equal(found.detach().to("cpu", torch.uint8), self.tensor()):
            return
        raise MeaningError(
            f"the coefficients must be those of an adapter like {adapter!r}, on other frozen matrices they are noise: "
            f"{self._differences(_read(found, adapter))}; nothing of them was loaded: load them under a name that is "
            "not taken, or on an adapter with the options that they were saved with"
        )

    def _differences(self, theirs: list[Any]) -> str:
        names = [*self.options, "shapes and rows of the layers", "options of single layers (patterns)"]
        ours = [*self.options.values(), self.layers, self.patterns]
        if theirs[0] == ours[0] and abs(len(theirs) - len(ours)) == 1:  # one side says which matrices share, the other
            shorter = min(theirs, ours, key=len)  # that none do by saying nothing
            shorter.insert(-2, UNTIED)
            names[-2:-2] = [] if "tie" in self.options else ["tie"]
        if theirs[0] != ours[0] or len(theirs) != len(ours):  # the rest has other names
            theirs, ours = theirs[:2], ours[:2]
        told = [(name, there, here) for name, there, here in zip(names, theirs, ours, strict=False) if there != here]
        return ", ".join(f"{name} {there!r} there and {here!r} here" for name, there, here in told) or (
            "options that this version of randbasis does not know"
        )


def meaning_of(
    common: Method,
    bits: int | None,
    matrices: Iterable[SpecMatrix],
    weights: str | None = None,
    *,
    tie: str = UNTIED,
) -> Meaning:
    """The meaning of the coefficients of an adapter.

    Args:
        common: its method with the options that all layers share.
        bits: of coefficients that are rounded before they are used, math (11); None where they are not.
        matrices: all that it adapts, in any order.
        weights: digest of the base weights, for a method that needs them.
        tie: which matrices share coefficients; told where some do.
    """
    listed = list(matrices)
    shared = _identity(common) | {"quantize_coefficients": bits}
    if common.needs_base:
        shared["base_weights"] = weights
    first = ("method", "seed")
    options = {name: shared[name] for name in (*first, *sorted(shared.keys() - set(first)))}
    options |= {} if tie == UNTIED else {"tie": tie}
    layers = sorted([(one.out_features, one.in_features, one.start, one.rows) for one in listed])
    apart = len(_common_path([one.name for one in listed]))
    patterns = sorted(
        # Without what stands before all of them: a head more or less changes that.
        (".".join(one.name.split(".")[apart:]), one.part, json.dumps(_identity(one.method)))
        for one in listed
        if one.method != common and one.method.identity() != common.identity()
    )
    streams = common.streams() if common.shares_basis else ()
    return Meaning(options, _digest(layers), _digest([streams, patterns]))


def holder_of(layers: Iterable[str]) -> str:
    """The layer that holds the meaning of an adapter for all of them: the first, layer 2 before layer 10.

    Args:
        layers: module paths, not none.
    """
    return min(layers, key=natural_order)


def meaning_tensor(
    common: Method,
    bits: int | None,
    matrices: Iterable[SpecMatrix],
    weights: str | None = None,
    *,
    tie: str = UNTIED,
) -> dict[str, Tensor]:
    """Name in an adapter directory → tensor; arguments as for :func:`meaning_of`."""
    listed = list(matrices)
    name = f"{SAVED_PREFIX}{holder_of(one.name for one in listed)}.{MEANING}.weight"
    return {name: meaning_of(common, bits, listed, weights, tie=tie).tensor()}


def warn_of_no_meaning(meaning: Meaning, adapter: str) -> None:
    """Say, once a load, that nothing could be compared.

    Args:
        meaning: what the coefficients are taken for.
        adapter: name of the adapter, or its directory.
    """
    told = ", ".join(f"{name}={value!r}" for name, value in meaning.options.items())
    warnings.warn(
        f"the coefficients of adapter {adapter!r} do not say what they mean, as those saved by older versions of "
        f"randbasis: they are taken for coefficients of {told}; save them again, and it will be compared",
        stacklevel=2,
    )


class HeldMeaning(nn.Module):
    """The meaning of an adapter as a tensor of the model, which every state dict and loader sees.

    What is loaded is compared, never taken: what the adapter computes with is fixed when it is made.

    Args:
        adapter: its name.
        meaning: what its coefficients mean.
    """

    weight: Tensor

    def __init__(self, adapter: str, meaning: Meaning) -> None:
        super().__init__()
        self.adapter = adapter
        self.meaning = meaning
        self.register_buffer("weight", meaning.tensor())

    def check(self, found: Tensor | None = None) -> None:
        """Raise what :meth:`Meaning.check` raises of a tensor, or of what a loader has put in the place of the own."""
        try:
            self.meaning.check(self.weight if found is None else found, self.adapter)
        finally:
            if found is None and not self.weight.is_meta:
                self.weight = self.meaning.tensor().to(self.weight.device)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Made anew: what `to_empty` or an average over ranks left in the buffer is no meaning.
        device = "cpu" if self.weight.is_meta else self.weight.device
        destination[f"{prefix}weight"] = self.meaning.tensor().to(device)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Missing is no error, also where torch is strict: older files do not have it.
        found = state_dict.get(f"{prefix}weight")
        if found is not None:
            self.check(found)
        if self.weight.is_meta:
            self.weight = self.meaning.tensor()


def _read(found: Tensor, adapter: str) -> list[Any]:
    try:
        content: object = json.loads(bytes(cast("list[int]", found.detach().to("cpu", torch.uint8).tolist())))
    except (ValueError, TypeError):
        content = None
    if not isinstance(content, list) or len(cast("list[Any]", content)) < 4:
        raise AdapterFilesError(
            f"the tensor {MEANING} beside the coefficients for {adapter!r} must be text that says what they mean, got "
            "bytes that say nothing; it is no number to be averaged, rounded or cast: take it from where the adapter "
            "was saved"
        )
    return cast("list[Any]", content)


def _identity(method: Method) -> dict[str, Any]:
    """Values that are equal as text when they are equal as numbers: 8 for 8.0."""
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in method.identity().items()
    }


def _common_path(names: list[str]) -> list[str]:
    """The modules that all of the layers lie in."""
    paths = [name.split(".")[:-1] for name in names]
    first, last = min(paths), max(paths)
    same = next((index for index, one in enumerate(first) if index >= len(last) or last[index] != one), len(first))
    return first[:same]


def _digest(content: Any) -> str:
    return sha256(json.dumps(content).encode("ascii")).hexdigest()[:_DIGEST]

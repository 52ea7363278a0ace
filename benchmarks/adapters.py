"""Adapters by name, put on a base model: ours, PEFT's, and NOLA as it was published.

A name says everything: ``PEFT LoRA r=4``, ``NOLA r=8 k=256``, ``NOLA r=8 k=256 unique``, ``VeRA r=256``,
``PEFT VeRA r=256``, ``RandLoRA r=32``, ``PEFT RandLoRA r=32``, ``published NOLA r=8 k=1000``, ``PRANC k=16``.
"""

import re
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import nn

import randbasis
from benchmarks.bases import Base
from benchmarks.published_nola import put_published_nola

FLOOR = "PEFT LoRA r=1"
"""What overheads are counted from: the same graph, next to no work of its own."""
_NAME = re.compile(
    r"(?P<kind>PEFT LoRA|(PEFT )?VeRA|(PEFT )?RandLoRA|(published )?NOLA|PRANC(?! r))"
    r"( r=(?P<r>\d+))?( k=(?P<k>\d+))?(?P<unique> unique)?"
)


@dataclass(frozen=True)
class Adapter:
    """What a name says."""

    kind: str
    r: int
    k: int
    unique: bool

    @classmethod
    def named(cls, name: str) -> "Adapter":
        """The adapter of a name.

        Raises:
            ValueError: it is no such name.
        """
        found = _NAME.fullmatch(name)
        if found is None or (found["r"] is None) != (found["kind"] == "PRANC"):
            raise ValueError(f"an adapter's name must look like 'NOLA r=8 k=256' or 'PEFT LoRA r=4', got {name!r}")
        return cls(found["kind"], int(found["r"] or 0), int(found["k"] or 0), found["unique"] is not None)

    @property
    def is_ours(self) -> bool:
        """Whether this package makes it."""
        return self.kind in ("NOLA", "VeRA", "RandLoRA", "PRANC")

    def config(self, base: Base, *, started: bool = False, **options: Any) -> peft.PeftConfig:
        """Its PEFT configuration.

        Args:
            base: for its targets.
            started: random coefficients, so that ΔW is not 0.
            options: more of the configuration.
        """
        targets = base.targets if isinstance(base.targets, str) else list(base.targets)
        options = {"r": self.r, "target_modules": targets, **options}
        if self.kind == "PEFT LoRA":
            options["fan_in_fan_out"] = base.transposed
            return peft.LoraConfig(init_lora_weights=not started, **options)
        options["init_weights"] = not started
        if self.kind == "NOLA":
            return randbasis.NolaConfig(num_basis=self.k, share_basis=not self.unique, **options)
        if self.kind == "PRANC":
            del options["r"]
            return randbasis.PrancConfig(num_basis=self.k, **options)
        if self.kind == "VeRA":
            return randbasis.VeraConfig(**options)
        if self.kind == "RandLoRA":
            return randbasis.RandLoraConfig(**options)
        options["fan_in_fan_out"] = base.transposed
        return peft.VeraConfig(**options) if self.kind == "PEFT VeRA" else peft.RandLoraConfig(**options)


def put(name: str, model: nn.Module, base: Base, *, started: bool = False, **options: Any) -> nn.Module:
    """The model with an adapter on it; only the adapter trains.

    Args:
        name: of the adapter; ``base`` for none.
        model: it is changed.
        base: its architecture.
        started: random coefficients, so that ΔW is not 0.
        options: more of the configuration.
    """
    if name == "base":
        return model
    adapter = Adapter.named(name)
    if adapter.kind == "published NOLA":
        return put_published_nola(model, base.matches, rank=adapter.r, count=adapter.k, started=started)
    if adapter.kind == "PEFT LoRA":
        options["rank_pattern"] = _limited_ranks(model, base, adapter.r)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(model, adapter.config(base, started=started, **options))


def _limited_ranks(model: nn.Module, base: Base, rank: int) -> dict[str, int]:
    """Ranks of the layers whose smaller side is below a rank: that side."""
    sides = {path: min(layer.weight.shape) for path, layer in model.named_modules() if base.matches(path)}
    return {path: side for path, side in sides.items() if side < rank}

"""The check before the clock: an adapted model against the same model with ΔW added to its weights in float64.

ΔW comes from the formulas of each method over the plain torch reference of the basis, so that the loss and every
gradient of the fast paths are held against a run that shares none of them. PEFT's own methods are held against what
PEFT merges.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from benchmarks.adapters import Adapter, put
from benchmarks.bases import Base
from benchmarks.case import CheckFailed
from benchmarks.published_nola import PublishedNolaLinear
from randbasis import RandbasisLinear
from randbasis.ops.backends import ENVIRONMENT

LOSS, GRADIENT, OUTPUT = 1e-5, 2e-4, 1e-4
"""Largest relative differences allowed."""


@contextmanager
def plain_torch() -> Iterator[None]:
    """Bases and their products by the reference alone."""
    before = os.environ.get(ENVIRONMENT)
    os.environ[ENVIRONMENT] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENVIRONMENT]
        else:
            os.environ[ENVIRONMENT] = before


def check_training(base: Base, adapters: Sequence[str], tokens: int) -> str:
    """Check one training step of each adapter on one layer as wide and with as many tokens as are timed.

    Raises:
        CheckFailed: an adapter gives another loss or other gradients than its formula.
    """
    return _worst(base, adapters, tokens, gradients=True)


def check_inference(base: Base, adapters: Sequence[str], tokens: int) -> str:
    """The same without gradients, in evaluation mode.

    Raises:
        CheckFailed: an adapter gives another output than its formula.
    """
    return _worst(base, adapters, tokens, gradients=False)


def _worst(base: Base, adapters: Sequence[str], tokens: int, *, gradients: bool) -> str:
    batch = base.batch(tokens, small=True)
    worst: dict[str, float] = {}
    for name in adapters:
        if name == "base":
            continue
        model = put(name, base.model(small=True), base, started=True).train(gradients)
        errors = _against_merged(model, batch) if _is_peft(name) else _against_formula(model, base, batch, gradients)
        for what, limit in (("loss", LOSS), ("gradient", GRADIENT), ("output", OUTPUT)):
            if not errors.get(what, 0.0) <= limit:
                raise CheckFailed(
                    f"{name}: {what} differs from the reference by {errors[what]:.1e} of its size, allowed {limit:.0e}"
                )
        for what, error in errors.items():
            worst[what] = max(worst.get(what, 0.0), error)
    found = ", ".join(f"{what} within {error:.1e}" for what, error in worst.items())
    return f"float64 reference: {found}" if found else "nothing to check"


def _is_peft(name: str) -> bool:
    return Adapter.named(name).kind.startswith("PEFT")


def _against_merged(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, float]:
    with torch.no_grad():
        own = model.eval()(**batch).logits
        if not isinstance(model, PeftModel):
            raise CheckFailed(f"an adapter of PEFT must be in a PeftModel, got {type(model).__name__}")
        merged = cast("Any", model).merge_and_unload()(**batch).logits
    return {"output": _distance(own, merged)}


def _against_formula(model: nn.Module, base: Base, batch: dict[str, Tensor], gradients: bool) -> dict[str, float]:
    with torch.set_grad_enabled(gradients):
        output = cast("Any", model)(**batch)
        if gradients:
            output.loss.backward()
    changes, pairs = _reference_changes(model)
    plain = base.model(small=True).double().train(gradients)
    weights = dict(plain.named_parameters())
    changed = {name: weights[name] + change for name, change in changes.items()}
    expected_count = sum(base.matches(path) for path, _ in plain.named_modules())
    if len(changes) != expected_count:
        raise CheckFailed(f"{expected_count} layers must be adapted, {len(changes)} are")
    with torch.set_grad_enabled(gradients):
        wanted = functional_call(plain, changed, kwargs=batch)
    errors = {"output": _distance(output.logits, wanted.logits)}
    if gradients:
        errors["loss"] = _distance(output.loss, wanted.loss)
        reference = torch.autograd.grad(wanted.loss, [double for _, double in pairs])
        own = torch.cat([cast("Tensor", single.grad).reshape(-1) for single, _ in pairs])
        errors["gradient"] = _distance(own, torch.cat([one.reshape(-1) for one in reference]))
    return errors


def _reference_changes(model: nn.Module) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """Changes of the base model's weights in float64 by name, and the coefficients beside those that they come from."""
    changes: dict[str, Tensor] = {}
    pairs: list[tuple[Tensor, Tensor]] = []

    def widened(coefficients: Tensor) -> Tensor:
        double = coefficients.detach().double().requires_grad_()
        pairs.append((coefficients, double))
        return double

    for path, layer in model.named_modules():
        if isinstance(layer, RandbasisLinear):
            (one,) = layer.matrices("default")
            coefficients = {name: widened(c) for name, c in layer.coefficients("default", one).items()}
            with plain_torch():
                change = one.bound.factors(coefficients).matrix()
        elif isinstance(layer, PublishedNolaLinear):
            down, up = (factor.reference(widened(factor.coefficients)) for factor in (layer.lora_A, layer.lora_B))
            change = layer.scale * up @ down
        else:
            continue
        inner = layer.base_layer
        name = path.removeprefix("base_model.model.")
        changes[f"{name}.weight"] = change.T if isinstance(inner, Conv1D) else change
    return changes, pairs


def _distance(own: Tensor, wanted: Tensor) -> float:
    return float((own.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm())

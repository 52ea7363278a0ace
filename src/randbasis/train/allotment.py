"""Basis matrices by layer: each adapted matrix gets a share of them by the size of its gradient before training.

``k_m ∝ ‖∂loss/∂ΔW_m‖``, at least one and ``Σ k_m`` as it was: coefficients go to where the loss falls fastest at the
start. The gradient is that of the base model, ΔW being 0 there; nothing of the model changes.
"""

import math
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, cast

import torch
from peft import get_peft_model
from torch import Tensor, nn

from randbasis.errors import HyperparameterError, NonFiniteLossError, SettingError
from randbasis.train.task import Batch
from randbasis.tuner.config import RandbasisConfig
from randbasis.tuner.layer import RandbasisLinear
from randbasis.tuner.targets import Part

PATTERN = "num_basis_pattern"
"""Option of a configuration that says the number by module."""

Loss = Callable[[nn.Module, Batch], Tensor]


def allot(
    model: nn.Module, config: RandbasisConfig, batches: Iterable[Batch], *, loss: Loss | None = None
) -> dict[str, int]:
    """Module → number of basis matrices, by the gradients of a few batches.

    ``num_basis_pattern`` of NOLA and PRANC takes the result as :func:`as_pattern` writes it. Parts of one fused
    projection have one number. With ``num_basis_b``, NOLA's B keeps that number for every matrix.

    Args:
        model: the base, not adapted yet; one backward pass a batch is made on it, in evaluation mode.
        config: NOLA or PRANC; ``num_basis`` is the mean of the numbers.
        batches: on the device of the model.
        loss: of a batch; None takes the model's own.

    Raises:
        HyperparameterError: the method has no basis matrices, or has numbers by module already.
        NonFiniteLossError: a gradient is not finite.
        SettingError: there is no batch.
        TargetError: the configuration names no module of the model.
    """
    if PATTERN not in vars(config):
        raise HyperparameterError(
            f"basis matrices can be allotted for nola and pranc, got {config.method!r}; use one of these"
        )
    if getattr(config, PATTERN):
        raise HyperparameterError(
            f"{PATTERN} must be empty where basis matrices are allotted, got {getattr(config, PATTERN)}; leave it out"
        )
    parts = adapted_parts(model, config)
    norms = gradient_norms(model, parts, batches, loss=loss)
    total = sum(map(len, parts.values())) * cast("Any", config).num_basis
    return shares(norms, total, {key: len(rows) for key, rows in parts.items()})


def as_pattern(numbers: Mapping[str, int]) -> dict[str, int]:
    """The same as regular expressions; longer paths first, since a path may end in another."""
    return {re.escape(key): numbers[key] for key in sorted(numbers, key=len, reverse=True)}


def shares(weights: Mapping[str, float], total: int, parts: Mapping[str, int] | None = None) -> dict[str, int]:
    """Whole numbers ``k ≥ 1``, as proportional to the weights as can be, with ``Σ parts · k = total``.

    By largest remainders, after those below one were given one. Where every module has several parts, what is left of
    the total may be too little for any of them, and stays.

    Args:
        weights: not negative; all 0 counts as all equal.
        total: to be shared.
        parts: matrices of each; None for one.

    Raises:
        HyperparameterError: the total is below the number of matrices.
    """
    count = {key: 1 if parts is None else parts[key] for key in weights}
    if total < sum(count.values()):
        raise HyperparameterError(
            f"num_basis must give each matrix one, got {total} for {sum(count.values())} matrices; use a larger one"
        )
    weight = dict(weights) if any(weights.values()) else dict.fromkeys(weights, 1.0)
    exact, free, left = dict.fromkeys(weight, 1.0), set(weight), total
    while free:
        whole = math.fsum(count[key] * weight[key] for key in free)
        exact |= {key: left * weight[key] / whole if whole else 0.0 for key in free}
        low = {key for key in free if exact[key] < 1}
        if not low:
            break
        exact |= dict.fromkeys(low, 1.0)
        free -= low
        left -= sum(count[key] for key in low)
    found = {key: math.floor(value) for key, value in exact.items()}
    left = total - sum(count[key] * number for key, number in found.items())
    for key in sorted(found, key=lambda key: (found[key] - exact[key], key)):
        if count[key] <= left:
            found[key] += 1
            left -= count[key]
    smallest = min(count, key=lambda key: (count[key], -exact[key], key))
    found[smallest] += left // count[smallest]
    return found


def adapted_parts(model: nn.Module, config: RandbasisConfig) -> dict[str, list[Part]]:
    """The rows that an adapter would change, by module; the model is left alone.

    Raises:
        RandbasisError: what putting the adapter on would raise.
    """
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(one): one.data.to("meta") for one in tensors}
    for one in model.parameters():
        memo[id(one)] = nn.Parameter(torch.empty(one.shape, dtype=one.dtype, device="meta"), requires_grad=False)
    bare = deepcopy(config)
    bare.basis_storage, bare.modules_to_save, bare.task_type = "recompute", None, None
    adapted = get_peft_model(cast("Any", deepcopy(model, memo)), bare).get_base_model()
    modules = cast("Iterator[tuple[str, nn.Module]]", adapted.named_modules())
    return {
        key: [one.part for one in module.matrices("default")]
        for key, module in modules
        if isinstance(module, RandbasisLinear)
    }


def gradient_norms(
    model: nn.Module, parts: Mapping[str, list[Part]], batches: Iterable[Batch], *, loss: Loss | None = None
) -> dict[str, float]:
    """Module → root mean square over the batches of ``‖∂loss/∂ΔW‖``, the Frobenius norm over the rows of its parts.

    The gradient is ``Σ δ xᵀ`` over the tokens of a batch, made for one module at a time.

    Args:
        model: the base.
        parts: as :func:`adapted_parts` gives them.
        batches: on the device of the model.
        loss: of a batch; None takes the model's own.
    """
    watches = {key: _Watch(rows) for key, rows in parts.items()}
    number = 0
    with _watched(model, watches), torch.enable_grad():
        for batch in batches:
            number += 1
            value = model(**batch).loss if loss is None else loss(model, batch)
            value.backward()
            for watch in watches.values():
                watch.end_pass()
    if not number:
        raise SettingError("allotting needs a batch of rows, got none; give some")
    bad = next((key for key, watch in watches.items() if not math.isfinite(watch.square)), None)
    if bad is not None:
        raise NonFiniteLossError(
            f"the gradient of {bad!r} must be finite before the first step, it is not; look at the rows and the base"
        )
    return {key: math.sqrt(watch.square / number) for key, watch in watches.items()}


@contextmanager
def _watched(model: nn.Module, watches: Mapping[str, "_Watch"]) -> Generator[None]:
    """Let modules be seen meanwhile, in evaluation mode; modes and what is trained are put back."""
    trained = [one for one in model.parameters() if one.requires_grad]
    modes = [module for module in model.modules() if module.training]
    hooks = [model.get_submodule(key).register_forward_hook(watch) for key, watch in watches.items()]
    model.requires_grad_(False).eval()
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for one in trained:
            one.requires_grad_(True)
        for module in modes:
            module.training = True


class _Watch:
    """Sees the tokens of one module, and the gradients of its outputs; a module may be called more than once a pass.

    Args:
        rows: those of its outputs that count.

    Attributes:
        square: sum over the passes of the squared norm.
    """

    def __init__(self, rows: list[Part]) -> None:
        self.rows = rows
        self.square = 0.0
        self.calls = 0
        self.gradient: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:  # nothing before it trains
            output = output.detach().requires_grad_(True)
        tokens = inputs[0].detach().flatten(0, -2)
        self.calls += 1

        def back(of_output: Tensor) -> None:
            made = of_output.flatten(0, -2).float().T @ tokens.float()
            self.gradient = made if self.gradient is None else self.gradient + made
            self.calls -= 1
            if self.calls == 0:  # so that no two modules keep one
                self.end_pass()

        output.register_hook(back)
        return output

    def end_pass(self) -> None:
        """Count what was seen."""
        if self.gradient is not None:
            parts = [self.gradient[part.start : part.stop] for part in self.rows]
            self.square += sum(float(part.double().square().sum()) for part in parts)
        self.calls, self.gradient = 0, None

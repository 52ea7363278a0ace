"""FACTORS → h: one contraction, two orders, math (19)-(20).

Token order multiplies the tokens by the factors one after the other. Weight order forms ΔW first: ``fused`` into the
base weight when that loses nothing, else as a product of its own. Both give the same h and the same gradients; they
differ in cost, and the cheaper one is chosen unless the user forces one.
"""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from randbasis.errors import ContractionError, near
from randbasis.methods import Matrix, Method

Order = Literal["token", "weight"]
OrderChoice = Literal["auto", "token", "weight"]

WORK_OF_A_BYTE = 8
"""Multiply-adds that a processor does in the time of writing and reading back one byte: about 100 G/s at 12 GB/s."""


def check_order(name: str) -> OrderChoice:
    """The order of that name.

    Raises:
        ContractionError: there is no such order.
    """
    for order in get_args(OrderChoice):
        if name == order:
            return order
    raise ContractionError(
        f"contraction must be one of {list(get_args(OrderChoice))}, got {name!r}; {near(name, get_args(OrderChoice))}"
    )


def choose_order(
    wanted: OrderChoice, method: Method, matrix: Matrix, tokens: int, *, training: bool, fused: bool
) -> Order:
    """The order that costs less above the base layer; ``wanted`` unless it is ``"auto"``.

    Cost is multiply-adds, plus the bytes that training keeps for the backward pass at :data:`WORK_OF_A_BYTE` each.

    Without training, ΔW is formed once and kept, so weight order must pay for itself by its product alone, and that
    product is counted even where it could be fused: a second copy of every base weight is not worth a thin pair.
    """
    if wanted != "auto":
        return wanted
    token = method.token_cost(tokens, matrix, training=training)
    weight = method.weight_cost(tokens, matrix, training=training, fused=fused and training)
    if training:
        token += WORK_OF_A_BYTE * 4 * tokens * method.rank(matrix.out_features, matrix.in_features)
        weight += WORK_OF_A_BYTE * 4 * matrix.out_features * matrix.in_features
    return "token" if token <= weight else "weight"


def token_order(x: Tensor, prepared: Mapping[str, Tensor], method: Method, matrix: Matrix) -> Tensor:
    """``ΔW x`` by the factors, math (19), the same coefficients for every row.

    Args:
        x: ``[..., in]``.
        prepared: from :meth:`Method.prepare`, without a batch dimension.
        method: the method.
        matrix: shape and streams.

    Returns:
        ``[..., out]``.
    """
    flat = x.reshape(1, -1, matrix.in_features)
    h = method.apply(flat, {name: value.unsqueeze(0) for name, value in prepared.items()}, matrix)
    return h.view(*x.shape[:-1], matrix.out_features)


def weight_order(x: Tensor, delta: Tensor) -> Tensor:
    """``ΔW x`` by the formed matrix, math (20), beside the base layer's own product."""
    return functional.linear(x, delta)


def fused_weight_order(x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor) -> Tensor:
    """``(W0 + ΔW) x + bias``, math (20).

    Args:
        x: ``[..., in]``.
        weight: ``W0``, ``[out, in]``.
        bias: ``[out]`` or None.
        delta: ``ΔW``, ``[out, in]``.
    """
    return functional.linear(x, weight + delta, bias)


def fusing_refusal(weight: Tensor, dtype: torch.dtype) -> str | None:
    """Why ``W0 + ΔW`` may not be formed as one matrix; None when it may.

    Args:
        weight: the base weight.
        dtype: dtype that the product is computed in.
    """
    if weight.dtype not in (torch.float32, torch.float64):
        return f"the base weight is {weight.dtype}: adding ΔW would round most of it away"
    if dtype != weight.dtype:
        return f"the product is computed in {dtype}, the base weight is {weight.dtype}"
    return None

"""ΔW → h: one contraction, two orders, math (19)-(20).

Token order multiplies the tokens by the factors one after the other. Weight order forms ΔW first: ``fused`` into the
base weight when that loses nothing, else as a product of its own. Where it is fused, training has two ways back:
through the gradient of ΔW, T·in·out multiply-adds, or through those of its factors, T·q·(in + out) for each factor that
is trained ("pair"). All give the same h and the same gradients; they differ in cost, and the cheapest is chosen unless
the user forces an order.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional

from randbasis.errors import ContractionError, not_one_of
from randbasis.methods import Bound
from randbasis.ops import check_differentiated_once, recorded

Summed = Callable[[Tensor, Tensor], Tensor]
"""``W0 + ΔW`` of both, where it has to be rounded: :class:`randbasis.rounding.RoundedSum`. Called again it is the same.
"""

Order = Literal["token", "weight", "pair"]
OrderChoice = Literal["auto", "token", "weight"]

WORK_OF_A_BYTE = 8
"""Multiply-adds that a processor does in the time of writing and reading back one byte: about 100 G/s at 12 GB/s."""

WORK_OF_A_NUMBER = 4 * WORK_OF_A_BYTE
"""The same for one number of float32. A sum W0 + B A of a smaller rank is formed again rather than kept."""


_WORK_OF_A_NUMBER_ON_CUDA = {torch.float32: 65.0}
_WORK_OF_A_NUMBER_ON_CUDA_IN_HALF = 450.0
"""The same on an NVIDIA H100, 2026-11-27. In half precision: two products of 16,384 tokens with 4096 × 4096 in 1.58
ms, 348 T/s, beside 0.18 GB written in 58 µs, 3.1 TB/s. In float32, without tensor cores, by three quarters of what the
card's maker states for products."""

HALF = torch.bfloat16, torch.float16

SMALL_WORK = 1 << 21
"""Multiply-adds of a product below which a backward pass of our own costs more than it saves: a call of a Function of
torch written in Python, forward and back, takes the time of about as many (20 µs at 100 G/s)."""


def check_order(name: str) -> OrderChoice:
    """The order of that name.

    Raises:
        ContractionError: there is no such order.
    """
    if name not in get_args(OrderChoice):
        raise ContractionError(not_one_of("contraction", name, get_args(OrderChoice)))
    return cast("OrderChoice", name)


def work_of_a_number(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds that a device does in the time of writing and reading back one number of a dtype."""
    if device.type != "cuda":
        return WORK_OF_A_NUMBER
    return _WORK_OF_A_NUMBER_ON_CUDA.get(dtype, _WORK_OF_A_NUMBER_ON_CUDA_IN_HALF)


def choose_order(
    wanted: OrderChoice,
    bound: Bound[Any],
    tokens: int,
    *,
    training: bool,
    fused: bool,
    pairs: bool = True,
    kept: bool = True,
    number: float = WORK_OF_A_NUMBER,
) -> Order:
    """The order that costs least above the base layer, among those that ``wanted`` allows.

    Cost is multiply-adds, plus ``number`` for each number that is written and read back: what training keeps for the
    backward pass, what is added to the base layer's result and to its gradient, the sum of weights.

    Without training, ΔW is formed once and kept, so weight order must pay for itself by its product alone, and that
    product is counted even where it could be fused: a second copy of every base weight is not worth a thin pair.

    Args:
        wanted: what the user allows.
        bound: the method there.
        tokens: rows of x.
        training: whether the coefficients get gradients.
        fused: whether ``W0 + ΔW`` may be one matrix.
        pairs: whether the gradient of a fused sum may go to the factors.
        kept: whether, without training, ΔW is there for the passes to come; otherwise forming it counts.
        number: from :func:`work_of_a_number`.
    """
    costs: dict[Order, float] = {}
    out, in_, rank = bound.out_features, bound.in_features, bound.rank
    fused = fused and training
    if wanted != "weight":
        saved = tokens * (rank + out + in_) if training else 0
        costs["token"] = bound.token_cost(tokens, training=training) + number * saved
    if wanted != "token":
        saved = (out * in_ + (0 if fused else tokens * (out + in_))) if training else 0
        costs["weight"] = bound.weight_cost(tokens, training=training, fused=fused) + number * saved
        if not training and not kept:
            costs["weight"] += rank * out * in_
    if wanted != "token" and fused and pairs:
        costs["pair"] = bound.pair_cost(tokens) + min(rank, number) * out * in_
    return min(costs, key=lambda order: costs[order])


def token_order(x: Tensor, prepared: Mapping[str, Tensor], bound: Bound[Any]) -> Tensor:
    """``ΔW x`` by the factors, math (19), the same coefficients for every row.

    Args:
        x: ``[..., in]``.
        prepared: from :meth:`Bound.prepare`, with a leading dimension of 1.
        bound: the method there.

    Returns:
        ``[..., out]``.
    """
    h = bound.apply(x.reshape(1, -1, bound.in_features), prepared)
    return h.view(*x.shape[:-1], bound.out_features)


def weight_order(x: Tensor, delta: Tensor) -> Tensor:
    """``ΔW x`` by the formed matrix, math (20), beside the base layer's own product."""
    return functional.linear(x, delta)


def fused_weight_order(
    x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, summed: Summed | None = None
) -> Tensor:
    """``(W0 + ΔW) x + bias``, math (20).

    Args:
        x: ``[..., in]``.
        weight: ``W0``, ``[out, in]``.
        bias: ``[out]`` or None.
        delta: ``ΔW``, ``[out, in]``.
        summed: how the two are added, where that is not exact; the gradients are those of a plain sum.

    Raises:
        DifferentiationError: in the backward pass, when a graph of it is wanted.
    """
    if summed is None and (x.numel() * weight.shape[0] <= SMALL_WORK or recorded()):
        return functional.linear(x, weight + delta, bias)
    return cast("Tensor", _FusedSum.apply(x, weight, bias, delta, summed))  # pyright: ignore[reportUnknownMemberType]


class _FusedSum(torch.autograd.Function):
    """``(W0 + ΔW) x + bias``, with the gradient of ΔW in the layout that is made fastest."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, summed: Summed | None
    ) -> Tensor:
        total = weight + delta if summed is None else summed(weight, delta)
        ctx.save_for_backward(x, total)
        return functional.linear(x, total, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        check_differentiated_once()
        x, total = ctx.saved_tensors
        for_x = gradient @ total if ctx.needs_input_grad[0] else None
        tokens, for_output = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        for_bias = for_output.sum(0) if ctx.needs_input_grad[2] else None
        # A product of many tokens runs up to an eighth faster with the longer axis last.
        long = total.shape[0] > total.shape[1]
        for_sum = (tokens.T @ for_output).T if long else for_output.T @ tokens
        return for_x, for_sum, for_bias, for_sum, None


class _FusedPairs(torch.autograd.Function):
    """``(W0 + Σ Bₚ Aₚ) x + bias``, whose gradient goes to the factors without forming that of ΔW.

    ``∂L/∂B = gᵀ (A x)`` and ``∂L/∂A = (g B)ᵀ x``: a factor that is frozen costs nothing. A sum of large rank is kept
    for the backward pass, one of small rank is formed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        starts: tuple[int, ...],
        summed: Summed | None,
        *factors: Tensor,
    ) -> Tensor:
        total = _summed(weight, starts, factors, summed)
        rank, ranges = 0, list[tuple[int, int]]()
        for start, up, down in zip(starts, factors[::2], factors[1::2], strict=True):
            rank += down.shape[0]
            ranges.append((start, start + up.shape[0]))
        again = rank <= WORK_OF_A_NUMBER
        ctx.formed_again, ctx.starts, ctx.ranges, ctx.summed = again, starts, ranges, summed
        kept: list[Tensor | None] = []
        wanted = ctx.needs_input_grad[5:]
        for place, factor in enumerate(factors):
            partner = place + 1 - 2 * (place % 2)  # the gradient of a factor is made with the other one of its pair
            kept.append(factor if again or wanted[partner] else None)
        ctx.save_for_backward(x, weight if again else total, *kept)
        return functional.linear(x, total, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        check_differentiated_once()
        x, weight, *factors = ctx.saved_tensors
        for_x = None
        if ctx.needs_input_grad[0]:
            total = _summed(weight, ctx.starts, factors, ctx.summed) if ctx.formed_again else weight
            for_x = gradient @ total
        tokens = x.reshape(-1, x.shape[-1])
        for_output = gradient.reshape(-1, gradient.shape[-1])
        found: list[Tensor | None] = []
        for place, (start, stop) in enumerate(ctx.ranges):
            part = for_output[:, start:stop]
            up, down = factors[2 * place : 2 * place + 2]
            up_trained, down_trained = ctx.needs_input_grad[5 + 2 * place : 7 + 2 * place]
            # Thin products run several times faster with the long axis last.
            found.append(((tokens @ down.T).T @ part).T if up_trained else None)
            found.append((part @ up).T @ tokens if down_trained else None)
        return for_x, None, None, None, None, *found


def _summed(weight: Tensor, starts: Sequence[int], factors: Sequence[Tensor], summed: Summed | None) -> Tensor:
    """``W0 + Σ Bₚ Aₚ`` in the layout of the weight, each pair in the rows from its start."""
    if summed is not None:
        return summed(weight, _summed(torch.zeros_like(weight), starts, factors, None))
    if len(starts) == 1 and factors[0].shape[0] == weight.shape[0]:
        up, down = factors
        if weight.is_contiguous():
            return torch.addmm(weight, up, down)
        return torch.addmm(weight.T, down.T, up.T).T
    if not weight.is_contiguous() and weight.T.is_contiguous():
        total = weight.T.clone()
        for start, up, down in zip(starts, factors[::2], factors[1::2], strict=True):
            total[:, start : start + up.shape[0]].addmm_(down.T, up.T)
        return total.T
    total = weight.clone()
    for start, up, down in zip(starts, factors[::2], factors[1::2], strict=True):
        total[start : start + up.shape[0]].addmm_(up, down)
    return total


def _plain_sum(weight: Tensor, pairs: Sequence[tuple[int, Tensor, Tensor]]) -> Tensor:
    """:func:`_summed` in operations that write to nothing."""
    for start, up, down in pairs:
        weight = weight + functional.pad(up @ down, (0, 0, start, weight.shape[0] - start - up.shape[0]))
    return weight


def fused_pair_order(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pairs: Sequence[tuple[int, Tensor, Tensor]],
    summed: Summed | None = None,
) -> Tensor:
    """``(W0 + Σ Bₚ Aₚ) x + bias``, math (20), with the gradient of the factors taken from the tokens.

    Args:
        x: ``[..., in]``.
        weight: ``W0``, ``[out, in]``, frozen.
        bias: ``[out]``, frozen, or None.
        pairs: first output row, ``B`` of ``[rows, q]`` and ``A`` of ``[q, in]`` of each.
        summed: as of :func:`fused_weight_order`.

    Raises:
        DifferentiationError: in the backward pass, when a graph of it is wanted.
    """
    small = x.numel() * weight.shape[0] <= SMALL_WORK
    if summed is None and len(pairs) == 1 and pairs[0][1].shape[0] == weight.shape[0] and small:
        return functional.linear(x, torch.addmm(weight, *pairs[0][1:]), bias)
    if summed is None and recorded():
        return functional.linear(x, _plain_sum(weight, pairs), bias)
    starts, factors = list[int](), list[Tensor]()
    for start, up, down in pairs:
        starts.append(start)
        factors += up, down
    return cast("Tensor", _FusedPairs.apply(x, weight, bias, tuple(starts), summed, *factors))  # pyright: ignore[reportUnknownMemberType]


def fusing_refusal(weight: Tensor, dtype: torch.dtype, *, rounded: bool = False) -> str | None:
    """Why ``W0 + ΔW`` may not be formed as one matrix; None when it may.

    Args:
        weight: the base weight.
        dtype: dtype that the product is computed in.
        rounded: whether the sum may be rounded to half precision.
    """
    exact = torch.float32, torch.float64
    if weight.dtype not in (*exact, *(HALF if rounded else ())):
        return f"the base weight is {weight.dtype}: adding ΔW would round most of it away"
    if dtype != weight.dtype:
        return f"the product is computed in {dtype}, the base weight is {weight.dtype}"
    return None

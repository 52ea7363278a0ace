"""The bank on a GPU: decoding of a model of the 1.1B shape in bfloat16, 32 rows of 1, 8 and 32 users.

Beside it stands the plain model; ``in a CUDA graph`` replays one recorded step, whose rows may be given other users.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks import bank, bases
from benchmarks.bases import Base
from benchmarks.case import Built, Case, CheckFailed, Side
from benchmarks.gpu import device, wall_seconds
from benchmarks.gpu_decode import PROMPT, ROWS, small_llama, token_of
from benchmarks.gpu_step import frozen_model
from randbasis.bank import AdapterBank

METHODS = ("NOLA r=8 k=64", "VeRA r=256")
PLAIN, GRAPH = "base", "in a CUDA graph"
TOLERANCE = 4e-2
"""Of outputs in bfloat16, relative to their size."""


def cases(*, tiny: bool = False, everything: bool = False) -> Iterator[Case]:
    """A case a method."""
    del everything
    base = small_llama(2, 64, 160) if tiny else small_llama(22, 2048, 5632)
    rows = 4 if tiny else ROWS
    counts = (1, rows) if tiny else bank.DISTINCT
    for method in METHODS[:1] if tiny else METHODS:
        graphs = [f"{PLAIN}, {GRAPH}", f"{rows} distinct, {GRAPH}"] if torch.cuda.is_available() else []
        yield Case(
            family="gpu bank",
            name=f"bank: decode of {base.name}, {rows} rows, {PROMPT} tokens in the cache: {method}",
            sides=(PLAIN, *(f"{count} distinct" for count in counts), *graphs),
            build=partial(_build, base, method, rows),
            parameters={"model": base.name, "rows": rows, "method": method},
            work=rows,
            unit="tokens/s",
            measure=wall_seconds,
            seconds=8,
            device=str(device()),
        )


def _build(base: Base, method: str, rows: int, sides: Sequence[str]) -> Built:
    frozen = frozen_model(base)
    words = base.batch(rows * PROMPT, length=PROMPT)["input_ids"].to(device())
    plain, model = (bases.twin(frozen).eval() for _ in range(2))
    bank_ = AdapterBank(model, expanded_bytes=1 << 32)
    for number, adapter in enumerate(bank.users(method, base, rows)):
        bank_.load(f"u{number}", adapter)
    step = token_of(model, words, {})
    made: dict[str, Callable[[], object]] = {PLAIN: token_of(plain, words, {})}
    for side in sides:
        if side == f"{PLAIN}, {GRAPH}":
            made[side] = _recorded(plain, words)
        elif side.endswith(GRAPH):
            plan = bank_.hold([f"u{row}" for row in range(rows)])
            with bank_.using(plan):
                made[side] = _recorded(model, words)
        elif side != PLAIN:
            count = int(side.partition(" ")[0])
            made[side] = partial(_banked, bank_, [f"u{row % count}" for row in range(rows)], step)
    return Built({name: Side(made[name]) for name in sides}, partial(_check, bank_, model, plain, words))


def _banked(bank_: AdapterBank, names: list[str], step: Callable[[], Tensor]) -> Tensor:
    with bank_.rows(names):
        return step()


def _recorded(model: nn.Module, words: Tensor) -> Callable[[], None]:
    """A step without a cache over one token a row, recorded and replayed."""
    last = words[:, -1:].clone()
    side = torch.cuda.Stream()
    with torch.no_grad():
        with torch.cuda.stream(side):
            cast("Any", model)(input_ids=last, use_cache=False)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            cast("Any", model)(input_ids=last, use_cache=False)
    return graph.replay


@torch.no_grad()
def _check(bank_: AdapterBank, model: nn.Module, plain: nn.Module, words: Tensor) -> str:
    """Rows are those of the same rows alone; rows of the base are the base's."""
    names = ["__base__" if row % 2 else f"u{row}" for row in range(words.shape[0])]
    found = cast("Any", model)(input_ids=words, adapter_names=names).logits
    wanted = cast("Any", plain)(input_ids=words).logits
    own = cast("Any", model)(input_ids=words[:1], adapter_names=names[:1]).logits[0]
    error = float((found[0] - own).norm() / own.norm())
    if not torch.equal(found[1], wanted[1]) or not error <= TOLERANCE:
        raise CheckFailed(f"a row differs from itself alone by {error:.1e}, allowed {TOLERANCE:.0e}, or the base does")
    return f"rows within {error:.1e} of themselves alone, rows of the base to the bit"

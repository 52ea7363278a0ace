"""The two orders of one contraction: equal in value and gradient, chosen by cost, forced or refused by name."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from randbasis.contraction import (
    check_order,
    choose_order,
    fused_pair_order,
    fused_weight_order,
    fusing_refusal,
    token_order,
    weight_order,
    work_of_a_number,
)
from randbasis.errors import ContractionError
from randbasis.methods import Coefficients, Method, Nola, Pranc, RandLora, Site, Vera

METHODS: dict[str, Callable[..., Method]] = {
    "nola": lambda **options: Nola(r=3, num_basis=6, alpha=4.0, **options),
    "nola plain": lambda **options: Nola(
        r=3, num_basis=6, num_basis_b=4, alpha=4.0, parametrization="plain", **options
    ),
    "vera": lambda **options: Vera(r=9, **options),
    "randlora": lambda **options: RandLora(r=5, **options),
    "pranc": lambda **options: Pranc(num_basis=4, **options),
}
SHAPES = [(17, 17), (12, 33), (40, 11)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def leaves(coefficients: Coefficients) -> dict[str, Tensor]:
    return {name: value.detach().clone().requires_grad_() for name, value in coefficients.items()}


# --- both orders are one ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["dense", "packed", "recompute"])
def storage(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(("shape", "leading"), list(zip(SHAPES, [(5,), (2, 3), ()], strict=True)), ids=str)
@pytest.mark.parametrize("law", ["sign", "uniform", "sparse(6)"])
def test_orders_agree(name: str, law: str, storage: str, shape: tuple[int, int], leading: tuple[int, ...]) -> None:
    """h and the gradients of tokens, coefficients and base weight: token, weight, fused weight and fused pair order."""
    method = METHODS[name](law=law, basis_storage=storage, seed=5)
    site = Site(*shape, method.streams())
    bound = method.bind(site)
    shapes = method.coefficient_shapes(*shape)
    values = {key: draw(*size, seed=place) for place, (key, size) in enumerate(shapes.items())}
    weight, bias, x = draw(*shape, seed=10), draw(shape[0], seed=11), draw(*leading, shape[1], seed=12)
    found = []
    for order in ("token", "weight", "fused", "pair"):
        coefficients, w, tokens = leaves(values), weight.clone().requires_grad_(), x.clone().requires_grad_()
        if order == "token":
            h = functional.linear(tokens, w, bias) + bound.delta(coefficients).apply(tokens)
        elif order == "weight":
            h = functional.linear(tokens, w, bias) + weight_order(tokens, method.bind(site).matrix(coefficients))
        elif order == "fused":
            h = fused_weight_order(tokens, w, bias, method.bind(site).matrix(coefficients))
        elif isinstance(method, Pranc):
            continue  # no pair
        else:
            factors = method.bind(site).factors(coefficients)
            assert factors.up is not None
            h = fused_pair_order(tokens, w.detach(), bias, [(0, factors.up, factors.down)])
        assert h.shape == (*leading, shape[0])
        trained = [tokens, *coefficients.values(), *([] if order == "pair" else [w])]
        found.append([h, *torch.autograd.grad(h, trained, draw(*h.shape, seed=13))])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=len(other) == len(found[0])):
            torch.testing.assert_close(two, one, rtol=0, atol=1e-12 * max(1.0, one.abs().max().item()))
    assert {one.storage for one in bound.bases} == {storage}


def test_token_order_of_no_tokens(name: str) -> None:
    method = METHODS[name]()
    site = Site(12, 33, method.streams())
    coefficients = {key: draw(*size) for key, size in method.coefficient_shapes(12, 33).items()}
    h = method.bind(site).delta(coefficients).apply(draw(0, 33))
    assert h.shape == (0, 12)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["auto", "token", "weight"])
def test_orders_by_name(order: str) -> None:
    assert check_order(order) == order


def test_unknown_order_names_argument_value_and_way_out() -> None:
    with pytest.raises(ContractionError) as refusal:
        check_order("wieght")
    assert "contraction must be one of ['auto', 'token', 'weight'], got 'wieght'" in str(refusal.value)
    assert "did you mean weight?" in str(refusal.value)


# --- cost -------------------------------------------------------------------------------------------------------------


class CountProducts(torch.utils._python_dispatch.TorchDispatchMode):
    """Multiply-adds of the matrix products that really run, frozen ones by their schema."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        name = function._schema.name
        if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left = args[-2]
            self.total += out.numel() * left.shape[1]
        elif name == "aten::bmm":
            self.total += out.numel() * args[0].shape[2]
        elif name == "randbasis::product":
            x, (_, _, _, count, rows, cols) = args[0], args[1]
            self.total += x.shape[0] * count * rows * cols
        elif name == "randbasis::sandwich":
            self.total += args[2][5] * args[3][3] * args[3][4] * args[3][5]
        elif name == "randbasis::sandwich_backward":
            self.total += args[3][5] * args[4][3] * args[4][4] * args[4][5]
        return out


def count(run: Callable[[], object]) -> int:
    with CountProducts() as mode:
        run()
    return mode.total


@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (64, 64)], ids=str)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", [Vera(r=32), RandLora(r=8), Nola(r=8, num_basis=3, alpha=1.0)], ids=str)
def test_costs_are_the_multiply_adds_that_run(method: Method, shape: tuple[int, int], training: bool) -> None:
    """(19) and (20) as estimated, against the products of one pass; NOLA's basis is not among them."""
    tokens, (out, in_) = 100, shape
    site = Site(out, in_, method.streams())
    shapes = method.coefficient_shapes(out, in_)
    coefficients = {key: draw(*size).requires_grad_(training) for key, size in shapes.items()}
    x = draw(tokens, in_, seed=1).requires_grad_(training)
    prepared = method.bind(site).prepare(coefficients)
    if training:
        prepared = {key: value.detach().requires_grad_() for key, value in prepared.items()}

    def by_token() -> None:
        h = token_order(x, {key: value.unsqueeze(0) for key, value in prepared.items()}, method.bind(site))
        if training:
            h.backward(torch.ones_like(h))

    # RandLoRA projects each token once for each of its terms on the narrow side.
    terms = method.rank(out, in_) // method.r if isinstance(method, RandLora) else 1
    assert count(by_token) == pytest.approx(
        method.bind(site).token_cost(tokens, training=training), rel=0.01 if terms == 1 else 0.2
    )
    if isinstance(method, Nola):
        return

    def by_weight() -> None:
        delta = method.bind(site).matrix(coefficients)
        h = weight_order(x, delta)
        if training:
            h.backward(torch.ones_like(h))

    cost = method.bind(site).weight_cost(tokens, training=training, fused=False)
    # Without training ΔW is formed once and kept, so its making is not counted.
    making = 0 if training else method.rank(out, in_) * out * in_
    assert count(by_weight) == pytest.approx(cost + making, rel=0.05)


LAYER = (768, 768)


@pytest.mark.parametrize(
    ("method", "tokens", "training", "fused", "order"),
    [
        # a thin pair never pays for a product of its own, but its sum with the base weight is nearly free
        (Nola(r=8, num_basis=64, alpha=8.0), 16384, True, True, "pair"),
        (Nola(r=8, num_basis=64, alpha=8.0), 16384, True, False, "token"),
        (Nola(r=8, num_basis=64, alpha=8.0), 64, True, True, "token"),
        (Nola(r=8, num_basis=64, alpha=8.0), 16384, False, False, "token"),
        (Nola(r=8, num_basis=64, alpha=8.0), 1, False, False, "token"),
        (Vera(r=16), 4096, True, False, "token"),
        (Vera(r=16), 4096, True, True, "pair"),
        (Vera(r=256), 2048, True, True, "pair"),
        # full rank: weight order as soon as the tokens are a few times the smaller side
        (RandLora(r=32), 16, True, True, "token"),
        (RandLora(r=32), 8192, True, True, "weight"),
        (RandLora(r=32), 8192, True, False, "weight"),
        (RandLora(r=32), 8192, False, False, "weight"),
        (Vera(r=1024), 8192, True, True, "weight"),
    ],
    ids=str,
)
def test_auto_takes_the_cheaper(method: Method, tokens: int, training: bool, fused: bool, order: str) -> None:
    site = Site(*LAYER, method.streams())
    assert choose_order("auto", method.bind(site), tokens, training=training, fused=fused) == order


def test_a_change_that_is_not_kept_pays_for_its_forming() -> None:
    """Rank 768 and 700 tokens: one product of ΔW saves less than forming it in every pass costs."""
    method = RandLora(r=32)
    site = Site(*LAYER, method.streams())
    options = {"training": False, "fused": False}
    assert choose_order("auto", method.bind(site), 700, **options, kept=True) == "weight"
    assert choose_order("auto", method.bind(site), 700, **options, kept=False) == "token"


@pytest.mark.parametrize("wanted", ["token", "weight"])
@pytest.mark.parametrize("tokens", [1, 100_000])
def test_a_forced_order_stands(wanted: str, tokens: int) -> None:
    for make in METHODS.values():
        method = make()
        site = Site(*LAYER, method.streams())
        found = choose_order(wanted, method.bind(site), tokens, training=True, fused=True)  # type: ignore[arg-type]
        assert (found == "token") == (wanted == "token")


def test_a_number_costs_more_where_products_are_fast():
    """On tensor cores a second product beats a pair of which training would keep more; on a processor it does not."""
    bound = RandLora(r=32).bind(Site(4096, 4096, (0, 1)))
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert work_of_a_number(cpu, torch.bfloat16) < work_of_a_number(cuda, torch.float32)
    assert work_of_a_number(cuda, torch.float32) < work_of_a_number(cuda, torch.bfloat16)
    number = work_of_a_number(cuda, torch.bfloat16)
    found = [choose_order("auto", bound, n, training=True, fused=False, number=number) for n in (16, 16384)]
    assert found == ["token", "weight"]
    nola = Nola(r=16, num_basis=128, alpha=16.0).bind(Site(4096, 4096, (0, 1, 2)))
    fits = [
        [
            choose_order("auto", nola, 2**n, training=True, fused=True, number=work_of_a_number(at, torch.float32))
            for n in range(16)
        ]
        for at in (cpu, cuda)
    ]
    assert fits[0] != fits[1]


def test_more_tokens_never_lead_back_to_token_order(name: str) -> None:
    method = METHODS[name]()
    site = Site(*LAYER, method.streams())
    orders = [choose_order("auto", method.bind(site), 2**n, training=True, fused=True) for n in range(18)]
    assert orders == sorted(orders, key=lambda order: order != "token")


# --- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [3, 40], ids=["formed again", "kept"])
@pytest.mark.parametrize("transposed", [False, True])
def test_pairs_on_slices_against_one_merged_weight(rank: int, transposed: bool) -> None:
    """Two pairs on row ranges that overlap, on both layouts of the weight, whatever is trained."""
    weight = draw(20, 14, seed=1) if not transposed else draw(14, 20, seed=1).T
    x, bias = draw(2, 5, 14, seed=2).requires_grad_(), draw(20, seed=3)
    pairs = [
        (2, draw(9, rank, seed=4).requires_grad_(), draw(rank, 14, seed=5)),
        (8, draw(12, rank, seed=6), draw(rank, 14, seed=7).requires_grad_()),
    ]
    merged = weight + sum(functional.pad(up @ down, (0, 0, start, 20 - start - len(up))) for start, up, down in pairs)
    trained = [x, pairs[0][1], pairs[1][2]]
    wanted = functional.linear(x, merged, bias)
    h = fused_pair_order(x, weight, bias, pairs)
    torch.testing.assert_close(h, wanted, rtol=0, atol=1e-12)
    seen = draw(*h.shape, seed=8)
    for one, two in zip(torch.autograd.grad(wanted, trained, seen), torch.autograd.grad(h, trained, seen), strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-12 * rank * 10)


def test_pairs_pass_gradcheck() -> None:
    weight, bias = draw(4, 3), draw(4, seed=1)

    def run(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return fused_pair_order(x, weight, bias, [(1, up, down)])

    inputs = [draw(2, 3, seed=2), draw(3, 2, seed=3), draw(2, 3, seed=4)]
    assert torch.autograd.gradcheck(run, [one.requires_grad_() for one in inputs])


@pytest.mark.parametrize("method", [Vera(r=48), Nola(r=4, num_basis=3, alpha=1.0)], ids=str)
def test_pairs_keep_nothing_as_long_as_the_tokens_but_them(method: Method) -> None:
    """No tensor beside the input itself holds a number for each token; PEFT's VeRA keeps three."""
    site = Site(24, 16, method.streams())
    bound = method.bind(site)
    coefficients = {key: draw(*size).requires_grad_() for key, size in method.coefficient_shapes(24, 16).items()}
    x, weight = draw(2000, 16, seed=1).requires_grad_(), draw(24, 16, seed=2)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor
    ):
        factors = method.bind(site).factors(coefficients)
        assert factors.up is not None
        fused_pair_order(x, weight, None, [(0, factors.up, factors.down)])
    assert bound.bases
    assert [tensor.data_ptr() for tensor in kept if tensor.numel() >= 2000] == [x.data_ptr()]


# --- fusing -----------------------------------------------------------------------------------------------------------


def test_fusing_is_for_full_precision_alone() -> None:
    weight = torch.zeros(2, 3)
    assert fusing_refusal(weight, torch.float32) is None
    assert fusing_refusal(weight.double(), torch.float64) is None
    assert "bfloat16: adding ΔW would round most of it away" in str(fusing_refusal(weight.bfloat16(), torch.bfloat16))
    assert "the product is computed in torch.bfloat16" in str(fusing_refusal(weight, torch.bfloat16))
    assert "uint8" in str(fusing_refusal(weight.to(torch.uint8), torch.float32))

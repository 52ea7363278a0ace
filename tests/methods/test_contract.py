"""What every method promises, for every maker × law × storage."""

import math
from collections.abc import Callable

import pytest
import torch
from method_cases import LAWS, MAKERS, STORAGES, Maker, draw, leaves, trained
from torch import Tensor

from randbasis.contraction import token_order, weight_order
from randbasis.methods import METHODS, Matrix, Method
from randbasis.ops import Stored

Case = tuple[Method, Matrix, tuple[Stored, ...]]


@pytest.fixture(params=MAKERS.values(), ids=MAKERS.keys())
def maker(request: pytest.FixtureRequest) -> Maker:
    return request.param


@pytest.fixture(params=["reference", "auto"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANDBASIS_BACKEND", request.param)


def case(maker: Maker, **options: str) -> Case:
    """A method, its matrix, and what keeps its frozen matrices stored."""
    method = maker.method(**options)
    matrix = maker.matrix(method)
    return method, matrix, method.hold(matrix)


def gradients(h: Tensor, coefficients: dict[str, Tensor], *more: Tensor) -> list[Tensor]:
    weights = draw(*h.shape, seed=77).to(h.dtype)
    return list(torch.autograd.grad(h, [*coefficients.values(), *more], weights))


def test_every_method_has_a_maker() -> None:
    assert {maker.make for maker in MAKERS.values()} == set(METHODS.values())


# --- coefficients -----------------------------------------------------------------------------------------------------


def test_coefficients_are_counted_and_started(maker: Maker) -> None:
    method, matrix, _ = case(maker)
    shapes = method.coefficient_shapes(maker.out, maker.in_)
    assert list(shapes) == list(method.starts(maker.out, maker.in_))
    assert all(name.startswith(f"{method.name}_") for name in shapes)
    assert method.count(maker.out, maker.in_) == sum(math.prod(shape) for shape in shapes.values())
    assert len(matrix.streams) == len(method.roles)


def test_starts_change_nothing_but_for_plain_nola(maker: Maker) -> None:
    method, matrix, _held = case(maker)
    starts = method.starts(maker.out, maker.in_)
    shapes = method.coefficient_shapes(maker.out, maker.in_)
    coefficients = {name: torch.full(shape, starts[name]).requires_grad_() for name, shape in shapes.items()}
    delta = method.delta(coefficients, matrix)
    if maker.options.get("parametrization") == "plain":
        assert 0 < delta.abs().max().item() < 1
    else:
        assert not delta.any()
    # Something must be able to leave the start.
    assert any(gradient.any() for gradient in gradients(delta, coefficients))


# --- one ΔW behind every face -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("storage", STORAGES[1:])
def test_factors_delta_and_apply_are_the_same_change(maker: Maker, law: str, storage: str) -> None:
    """In value and in every gradient, that of the tokens included: token order equals weight order."""
    method, matrix, _held = case(maker, law=law, basis_storage=storage)
    values = trained(method, matrix)
    x = draw(2, 3, maker.in_, seed=5)
    found = []
    for face in ("factors", "delta", "apply"):
        coefficients, tokens = leaves(values), x.clone().requires_grad_()
        if face == "apply":
            h = token_order(tokens, method.prepare(coefficients, matrix), method, matrix)
        elif face == "delta":
            h = weight_order(tokens, method.delta(coefficients, matrix))
        else:
            factors = method.factors(coefficients, matrix)
            assert factors.down.shape == (method.rank(maker.out, maker.in_), maker.in_)
            assert factors.up is None or factors.up.shape == (maker.out, method.rank(maker.out, maker.in_))
            h = weight_order(tokens, factors.delta())
        assert h.shape == (2, 3, maker.out)
        assert h.dtype == torch.float64
        found.append([h, *gradients(h, coefficients, tokens)])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-11, atol=1e-11 * max(1.0, one.abs().max().item()))


@pytest.mark.parametrize("law", LAWS)
def test_storage_changes_no_number(maker: Maker, law: str) -> None:
    found = []
    for storage in STORAGES:
        method, matrix, held = case(maker, law=law, basis_storage=storage)
        assert bool(held) == (storage != "recompute")
        coefficients = leaves(trained(method, matrix))
        delta = method.delta(coefficients, matrix)
        found.append([delta, *gradients(delta, coefficients)])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-12 * max(1.0, one.abs().max().item()))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("law", "storage"), [("sign", "packed"), ("normal", "dense"), ("sparse(3)", "recompute")])
@pytest.mark.parametrize("face", ["factors", "delta", "apply"])
def test_gradcheck(maker: Maker, law: str, storage: str, face: str) -> None:
    method, matrix, _held = case(maker, law=law, basis_storage=storage)
    values = leaves(trained(method, matrix))
    x = draw(2, maker.in_, seed=5).requires_grad_()

    def run(x: Tensor, *coefficients: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(values, coefficients, strict=True))
        if face == "apply":
            return (token_order(x, method.prepare(named, matrix), method, matrix),)
        if face == "delta":
            return (weight_order(x, method.delta(named, matrix)),)
        factors = method.factors(named, matrix)
        return tuple(factor for factor in (factors.up, factors.down) if factor is not None and factor.requires_grad)

    assert torch.autograd.gradcheck(run, (x, *values.values()))


@pytest.mark.parametrize("face", ["factors", "apply"])
def test_gradgradcheck(maker: Maker, face: str) -> None:
    """Second derivatives exist wherever ΔW is made of products."""
    method, matrix, _held = case(maker, basis_storage="recompute")
    values = leaves(trained(method, matrix))
    x = draw(1, 2, maker.in_, seed=5).requires_grad_()

    def run(x: Tensor, *coefficients: Tensor) -> Tensor:
        named = dict(zip(values, coefficients, strict=True))
        if face == "factors":
            return weight_order(x, method.factors(named, matrix).delta())
        return token_order(x, method.prepare(named, matrix), method, matrix)

    weights = draw(1, 2, maker.out, seed=6).requires_grad_()
    assert torch.autograd.gradgradcheck(run, (x, *values.values()), weights)


# --- batches of adapters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(4,), (2, 3)], ids=str)
@pytest.mark.parametrize("face", ["factors", "delta"])
def test_batched_coefficients_are_a_loop(maker: Maker, batch: tuple[int, ...], face: str) -> None:
    method, matrix, _held = case(maker)
    values = trained(method, matrix, *batch)

    def run(coefficients: dict[str, Tensor]) -> Tensor:
        return method.delta(coefficients, matrix) if face == "delta" else method.factors(coefficients, matrix).delta()

    together = leaves(values)
    delta = run(together)
    assert delta.shape == (*batch, maker.out, maker.in_)
    alone = leaves(values)
    places = list(torch.cartesian_prod(*(torch.arange(size) for size in batch)).view(-1, len(batch)).tolist())
    looped = torch.stack([run({name: value[tuple(place)] for name, value in alone.items()}) for place in places])
    torch.testing.assert_close(delta.flatten(0, -3), looped, rtol=1e-11, atol=1e-12)
    for one, two in zip(gradients(delta.flatten(0, -3), together), gradients(looped, alone), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("storage", ["dense", "recompute"])
def test_rows_of_a_mixed_batch_are_each_alone(maker: Maker, storage: str) -> None:
    """Coefficients for each row, math (21)-(24): the numbers and gradients of one row at a time."""
    method, matrix, _held = case(maker, basis_storage=storage)
    values, x = trained(method, matrix, 3), draw(3, 4, maker.in_, seed=9)
    together = leaves(values)
    h = method.apply(x, method.prepare(together, matrix), matrix)
    assert h.shape == (3, 4, maker.out)
    alone = leaves(values)
    rows = []
    for row in range(3):
        prepared = method.prepare({name: value[row] for name, value in alone.items()}, matrix)
        rows.append(token_order(x[row], prepared, method, matrix))
    torch.testing.assert_close(h, torch.stack(rows), rtol=1e-11, atol=1e-11)
    for one, two in zip(gradients(h, together), gradients(torch.stack(rows), alone), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_one_coefficient_set_for_all_rows(maker: Maker) -> None:
    method, matrix, _held = case(maker)
    prepared = method.prepare(trained(method, matrix), matrix)
    x = draw(3, 4, maker.in_, seed=9)
    once = {name: value.unsqueeze(0) for name, value in prepared.items()}
    thrice = {name: value.expand(3, *value.shape) for name, value in prepared.items()}
    torch.testing.assert_close(method.apply(x, once, matrix), method.apply(x, thrice, matrix), rtol=1e-12, atol=1e-12)


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)], ids=str
)
def test_narrow_dtypes(maker: Maker, law: str, dtype: torch.dtype, tolerance: float) -> None:
    """Coefficients and tokens of a narrow dtype give results of that dtype, as near as it allows."""
    method, matrix, _held = case(maker, law=law)
    values, x = trained(method, matrix), draw(1, 4, maker.in_, seed=9)
    exact = weight_order(x, method.delta(values, matrix))
    narrow = {name: value.to(dtype) for name, value in values.items()}
    h = token_order(x.to(dtype), method.prepare(narrow, matrix), method, matrix)
    assert h.dtype == dtype
    torch.testing.assert_close(h.double(), exact, rtol=0, atol=tolerance * exact.abs().max().item())


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", ["vera", "randlora", "randlora transposed"])
def test_token_order_of_a_wide_layer_fits_float16(law: str, name: str) -> None:
    """Sums over thousands of integer entries would leave float16 if their real factor came only after them."""
    maker = MAKERS[name]
    method = maker.method(r=64, law=law)
    out, in_ = (512, 2048) if maker.out < maker.in_ else (2048, 512)
    matrix = Matrix(out, in_, method.streams())
    starts = method.starts(out, in_)
    values = {
        key: starts[key] + (starts[key] or 0.1) * 0.3 * draw(*shape, seed=len(key))
        for key, shape in method.coefficient_shapes(out, in_).items()
    }
    x = 8 * draw(1, 4, in_, seed=9)
    exact = weight_order(x, method.delta(values, matrix))
    narrow = {key: value.half() for key, value in values.items()}
    h = token_order(x.half(), method.prepare(narrow, matrix), method, matrix)
    torch.testing.assert_close(h.double(), exact, rtol=0, atol=5e-3 * exact.abs().max().item())


# --- what values do not depend on -------------------------------------------------------------------------------------


def test_ambience_changes_nothing(maker: Maker) -> None:
    def run() -> list[Tensor]:
        method, matrix, _held = case(maker)
        coefficients = leaves(values)
        delta = method.delta(coefficients, matrix)
        h = token_order(x, method.prepare(coefficients, matrix), method, matrix)
        return [delta, h, *torch.autograd.grad(delta.sum() + h.square().sum(), list(coefficients.values()))]

    first, first_matrix, _ = case(maker)
    values = {name: value.float() for name, value in trained(first, first_matrix).items()}
    x = draw(2, maker.in_, seed=5).float()
    expected = run()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        got = run()
    finally:
        torch.set_default_dtype(before)
        torch.use_deterministic_algorithms(False)
    for one, two in zip(got, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, two)


def test_streams_depend_on_the_path_only_when_the_basis_is_not_shared(maker: Maker) -> None:
    method = maker.method()
    same = method.streams("layers.0") == method.streams("layers.1")
    assert same == method.shares_basis == maker.options.get("share_basis", True)
    assert len(set(method.streams("layers.0"))) == len(method.roles)


def test_seed_law_and_stream_each_change_the_matrices(maker: Maker) -> None:
    method = maker.method()
    matrix = maker.matrix(method)
    values = trained(method, matrix)
    delta = method.delta(values, matrix)
    other_streams = Matrix(maker.out, maker.in_, tuple(stream ^ 1 for stream in matrix.streams))
    assert not torch.allclose(delta, maker.method(seed=1).delta(values, matrix))
    assert not torch.allclose(delta, maker.method(law="normal").delta(values, matrix))
    assert not torch.allclose(delta, method.delta(values, other_streams))


def test_a_method_is_a_value(maker: Maker) -> None:
    """Frozen, hashable, equal by its fields; it holds no tensor."""
    assert maker.method() == maker.method()
    assert hash(maker.method()) == hash(maker.method())
    assert maker.method(seed=1) != maker.method()
    assert not any(isinstance(value, Tensor) for value in vars(maker.method()).values())


FACES: dict[str, Callable[[Method, Matrix, dict[str, Tensor]], Tensor]] = {
    "delta": lambda method, matrix, values: method.delta(values, matrix),
    "token": lambda method, matrix, values: (
        token_order(
            torch.eye(matrix.in_features, dtype=torch.float64), method.prepare(values, matrix), method, matrix
        ).T
    ),
}


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", [name for name in MAKERS if name.startswith(("nola", "pranc"))])
def test_a_narrow_matrix_is_a_corner_of_a_wide_one(name: str, face: str) -> None:
    """A larger layer does not redraw what a smaller one sees; only the scale depends on the shape."""
    maker = MAKERS[name]
    method, matrix, _held = case(maker)
    wide = Matrix(2 * maker.out, 3 * maker.in_, matrix.streams)
    values = trained(method, matrix)
    if maker.options.get("parametrization", "offset") == "offset" and name.startswith("nola"):
        # A⁰ alone is scaled by the width: take it away by a difference of two coefficient sets with the same b.
        second = {**values, "nola_a": values["nola_a"] + 1}
        small = FACES[face](method, matrix, second) - FACES[face](method, matrix, values)
        large = FACES[face](method, wide, second) - FACES[face](method, wide, values)
    else:
        small, large = FACES[face](method, matrix, values), FACES[face](method, wide, values)
    corner = large[: maker.out, : maker.in_]
    scale = (corner * small).sum() / small.square().sum()
    assert 0 < scale <= 1
    torch.testing.assert_close(corner, scale * small, rtol=1e-10, atol=1e-10)

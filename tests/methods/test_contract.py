"""What every method promises, for every maker × law × storage."""

import math
from collections.abc import Callable

import pytest
import torch
from method_cases import LAWS, MAKERS, OF_LAWS, STORAGES, Maker, draw, leaves, trained
from torch import Tensor

from randbasis.contraction import weight_order
from randbasis.methods import METHODS, Bound, Method, Site

Case = tuple[Method, Site, Bound]


@pytest.fixture(params=MAKERS.values(), ids=MAKERS.keys())
def maker(request: pytest.FixtureRequest) -> Maker:
    return request.param


@pytest.fixture(params=["reference", "auto"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANDBASIS_BACKEND", request.param)


def case(maker: Maker, **options: str) -> Case:
    """A method, its place, and the method there."""
    method = maker.method(**options)
    site = maker.site(method)
    return method, site, maker.bind(method, site)


def gradients(h: Tensor, coefficients: dict[str, Tensor], *more: Tensor) -> list[Tensor]:
    weights = draw(*h.shape, seed=77).to(h.dtype)
    return list(torch.autograd.grad(h, [*coefficients.values(), *more], weights))


def test_every_method_has_a_maker() -> None:
    assert {maker.make for maker in MAKERS.values()} == set(METHODS.values())


# --- coefficients -----------------------------------------------------------------------------------------------------


def test_coefficients_are_counted_and_started(maker: Maker) -> None:
    method, site, _ = case(maker)
    shapes = method.coefficient_shapes(maker.out, maker.in_)
    assert list(shapes) == list(method.starts(maker.out, maker.in_))
    assert all(name.startswith(f"{method.name}_") for name in shapes)
    assert method.count(maker.out, maker.in_) == sum(math.prod(shape) for shape in shapes.values())
    assert len(site.streams) == len(method.roles)


def test_starts_change_nothing_but_for_plain_nola(maker: Maker) -> None:
    method, _site, bound = case(maker)
    starts = method.starts(maker.out, maker.in_)
    shapes = method.coefficient_shapes(maker.out, maker.in_)
    coefficients = {name: torch.full(shape, starts[name]).requires_grad_() for name, shape in shapes.items()}
    delta = bound.matrix(coefficients)
    if maker.options.get("parametrization") == "plain":
        assert 0 < delta.abs().max().item() < 1
    else:
        assert not delta.any()
    # Something must be able to leave the start.
    assert any(gradient.any() for gradient in gradients(delta, coefficients))


# --- one ΔW behind every face -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
@OF_LAWS
@pytest.mark.parametrize("storage", STORAGES[1:])
def test_factors_delta_and_apply_are_the_same_change(maker: Maker, law: str, storage: str) -> None:
    """In value and in every gradient, that of the tokens included: token order equals weight order."""
    method, site, bound = case(maker, law=law, basis_storage=storage)
    values = trained(method, site)
    x = draw(2, 3, maker.in_, seed=5)
    found = []
    for face in ("factors", "delta", "apply"):
        coefficients, tokens = leaves(values), x.clone().requires_grad_()
        if face == "apply":
            h = bound.delta(coefficients).apply(tokens)
        elif face == "delta":
            h = weight_order(tokens, bound.matrix(coefficients))
        else:
            factors = bound.factors(coefficients)
            assert factors.down.shape == (method.rank(maker.out, maker.in_), maker.in_)
            assert factors.up is None or factors.up.shape == (maker.out, method.rank(maker.out, maker.in_))
            h = weight_order(tokens, factors.matrix())
        assert h.shape == (2, 3, maker.out)
        assert h.dtype == torch.float64
        found.append([h, *gradients(h, coefficients, tokens)])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-11, atol=1e-11 * max(1.0, one.abs().max().item()))


@OF_LAWS
def test_storage_changes_no_number(maker: Maker, law: str) -> None:
    found = []
    for storage in STORAGES:
        method, site, bound = case(maker, law=law, basis_storage=storage)
        kept = [*bound.bases, *([] if bound.derived is None else [bound.derived])]
        assert kept
        assert all((one.storage == "recompute") == (storage == "recompute") for one in kept)
        coefficients = leaves(trained(method, site))
        delta = bound.matrix(coefficients)
        found.append([delta, *gradients(delta, coefficients)])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-12 * max(1.0, one.abs().max().item()))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("law", "storage"), [("sign", "packed"), ("normal", "dense"), ("sparse(3)", "recompute")])
@pytest.mark.parametrize("face", ["factors", "delta", "apply"])
def test_gradcheck(maker: Maker, law: str, storage: str, face: str) -> None:
    method, site, bound = case(maker, law=law, basis_storage=storage)
    values = leaves(trained(method, site))
    x = draw(2, maker.in_, seed=5).requires_grad_()

    def run(x: Tensor, *coefficients: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(values, coefficients, strict=True))
        if face == "apply":
            return (bound.delta(named).apply(x),)
        if face == "delta":
            return (weight_order(x, bound.matrix(named)),)
        factors = bound.factors(named)
        return tuple(factor for factor in (factors.up, factors.down) if factor is not None and factor.requires_grad)

    assert torch.autograd.gradcheck(run, (x, *values.values()))


@pytest.mark.parametrize("face", ["factors", "apply"])
def test_gradgradcheck(maker: Maker, face: str) -> None:
    """Second derivatives exist wherever ΔW is made of products."""
    method, site, bound = case(maker, basis_storage="recompute")
    values = leaves(trained(method, site))
    x = draw(1, 2, maker.in_, seed=5).requires_grad_()

    def run(x: Tensor, *coefficients: Tensor) -> Tensor:
        named = dict(zip(values, coefficients, strict=True))
        if face == "factors":
            return weight_order(x, bound.factors(named).matrix())
        return bound.delta(named).apply(x)

    weights = draw(1, 2, maker.out, seed=6).requires_grad_()
    assert torch.autograd.gradgradcheck(run, (x, *values.values()), weights)


# --- batches of adapters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(4,), (2, 3)], ids=str)
@pytest.mark.parametrize("face", ["factors", "delta"])
def test_batched_coefficients_are_a_loop(maker: Maker, batch: tuple[int, ...], face: str) -> None:
    method, site, bound = case(maker)
    values = trained(method, site, *batch)

    def run(coefficients: dict[str, Tensor]) -> Tensor:
        return bound.matrix(coefficients) if face == "delta" else bound.factors(coefficients).matrix()

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
    method, site, bound = case(maker, basis_storage=storage)
    values, x = trained(method, site, 3), draw(3, 4, maker.in_, seed=9)
    together = leaves(values)
    h = bound.apply(x, bound.prepare(together))
    assert h.shape == (3, 4, maker.out)
    alone = leaves(values)
    rows = []
    for row in range(3):
        rows.append(bound.delta({name: value[row] for name, value in alone.items()}).apply(x[row]))
    torch.testing.assert_close(h, torch.stack(rows), rtol=1e-11, atol=1e-11)
    for one, two in zip(gradients(h, together), gradients(torch.stack(rows), alone), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_one_coefficient_set_for_all_rows(maker: Maker) -> None:
    method, site, bound = case(maker)
    prepared = bound.prepare(trained(method, site))
    x = draw(3, 4, maker.in_, seed=9)
    once = {name: value.unsqueeze(0) for name, value in prepared.items()}
    thrice = {name: value.expand(3, *value.shape) for name, value in prepared.items()}
    torch.testing.assert_close(bound.apply(x, once), bound.apply(x, thrice), rtol=1e-12, atol=1e-12)


# --- dtypes -----------------------------------------------------------------------------------------------------------


@OF_LAWS
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)], ids=str
)
def test_narrow_dtypes(maker: Maker, law: str, dtype: torch.dtype, tolerance: float) -> None:
    """Coefficients and tokens of a narrow dtype give results of that dtype, as near as it allows."""
    method, site, bound = case(maker, law=law)
    values, x = trained(method, site), draw(1, 4, maker.in_, seed=9)
    exact = weight_order(x, bound.matrix(values))
    narrow = {name: value.to(dtype) for name, value in values.items()}
    h = bound.delta(narrow).apply(x.to(dtype))
    assert h.dtype == dtype
    torch.testing.assert_close(h.double(), exact, rtol=0, atol=tolerance * exact.abs().max().item())


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", ["vera", "randlora", "randlora transposed"])
def test_token_order_of_a_wide_layer_fits_float16(law: str, name: str) -> None:
    """Sums over thousands of integer entries would leave float16 if their real factor came only after them."""
    maker = MAKERS[name]
    method = maker.method(r=64, law=law)
    out, in_ = (512, 2048) if maker.out < maker.in_ else (2048, 512)
    site = Site(out, in_, method.streams())
    starts = method.starts(out, in_)
    values = {
        key: starts[key] + (starts[key] or 0.1) * 0.3 * draw(*shape, seed=len(key))
        for key, shape in method.coefficient_shapes(out, in_).items()
    }
    x = 8 * draw(1, 4, in_, seed=9)
    exact = weight_order(x, method.bind(site).matrix(values))
    narrow = {key: value.half() for key, value in values.items()}
    h = method.bind(site).delta(narrow).apply(x.half())
    torch.testing.assert_close(h.double(), exact, rtol=0, atol=5e-3 * exact.abs().max().item())


# --- what values do not depend on -------------------------------------------------------------------------------------


def test_ambience_changes_nothing(maker: Maker) -> None:
    def run() -> list[Tensor]:
        _method, _site, bound = case(maker)
        coefficients = leaves(values)
        delta = bound.matrix(coefficients)
        h = bound.delta(coefficients).apply(x)
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


def test_seed_law_and_stream_or_the_base_weight_change_the_matrices(maker: Maker) -> None:
    method = maker.method()
    site = maker.site(method)
    values = trained(method, site)
    delta = maker.bind(method).matrix(values)
    other_streams = Site(maker.out, maker.in_, tuple(stream ^ 1 for stream in site.streams))
    if method.needs_base:
        assert torch.equal(maker.bind(maker.method(seed=1, law="normal")).matrix(values), delta)
        assert not torch.allclose(delta, method.bind(site, maker.weight(seed=4)).matrix(values))
        return
    assert not torch.allclose(delta, maker.method(seed=1).bind(site).matrix(values))
    assert not torch.allclose(delta, maker.method(law="normal").bind(site).matrix(values))
    assert not torch.allclose(delta, method.bind(other_streams).matrix(values))


def test_a_method_is_a_value(maker: Maker) -> None:
    """Frozen, hashable, equal by its fields; it holds no tensor."""
    assert maker.method() == maker.method()
    assert hash(maker.method()) == hash(maker.method())
    assert maker.method(seed=1) != maker.method()
    assert not any(isinstance(value, Tensor) for value in vars(maker.method()).values())


FACES: dict[str, Callable[[Method, Site, dict[str, Tensor]], Tensor]] = {
    "delta": lambda method, site, values: method.bind(site).matrix(values),
    "token": lambda method, site, values: (
        method.bind(site).delta(values).apply(torch.eye(site.in_features, dtype=torch.float64)).T
    ),
}


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", [name for name in MAKERS if name.startswith(("nola", "pranc"))])
def test_a_narrow_matrix_is_a_corner_of_a_wide_one(name: str, face: str) -> None:
    """A larger layer does not redraw what a smaller one sees; only the scale depends on the shape."""
    maker = MAKERS[name]
    method, site, _bound = case(maker)
    wide = Site(2 * maker.out, 3 * maker.in_, site.streams)
    values = trained(method, site)
    if maker.options.get("parametrization", "offset") == "offset" and name.startswith("nola"):
        # A⁰ alone is scaled by the width: take it away by a difference of two coefficient sets with the same b.
        second = {**values, "nola_a": values["nola_a"] + 1}
        small = FACES[face](method, site, second) - FACES[face](method, site, values)
        large = FACES[face](method, wide, second) - FACES[face](method, wide, values)
    else:
        small, large = FACES[face](method, site, values), FACES[face](method, wide, values)
    corner = large[: maker.out, : maker.in_]
    scale = (corner * small).sum() / small.square().sum()
    assert 0 < scale <= 1 + 1e-12
    torch.testing.assert_close(corner, scale * small, rtol=1e-10, atol=1e-10)

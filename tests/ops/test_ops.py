"""Every op against the plain product with its integer entries, against gradcheck, and against torch's opcheck."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from randbasis import ops
from randbasis.basis import Basis, basis_entries
from randbasis.basis_storage import BasisStorage
from randbasis.errors import BasisShapeError, DifferentiationError, StorageError
from randbasis.ops import Slab, combine, combine_each, entries, hold, project, sandwich, weighted_sum

LAWS = ("sign", "uniform", "normal", "sparse(3)", "hashed")
POWERS = {"sign": 1.0, "uniform": 2.0**-8, "normal": 0.5, "sparse": 1.0, "hashed": 1.0}
STORAGES: tuple[BasisStorage, ...] = ("packed", "dense", "recompute")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("reference", "auto")
CPU = torch.device("cpu")
#: Rounding of a sum of a few hundred products, relative to the largest result.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RANDBASIS_BACKEND", request.param)
    return request.param


def slab_of(law: str, count: int, rows: int, cols: int, name: str = "ops/test") -> Slab:
    return Slab(Basis.named(2**40 + 5, name, law), count, rows, cols)


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def naive(slab: Slab) -> Tensor:
    """Entries of a slab times their power of two, math (5), as float64, by the specification alone."""
    basis = slab.basis
    return (
        POWERS[basis.law.kind]
        * basis_entries(basis.seed, basis.stream, basis.law, (slab.count, slab.rows, slab.cols)).double()
    )


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    assert got.shape == expected.shape
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(got.double() / scale, expected / scale, rtol=0, atol=TOLERANCE[dtype])


# --- values -----------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1, 1), (3, 2, 129), (9, 5, 63), (2, 11, 300), (70, 1, 17)]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(dtype, shape) for dtype in DTYPES[:2] for shape in SHAPES] + [(dtype, SHAPES[1]) for dtype in DTYPES[2:]],
    ids=str,
)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("storage", STORAGES)
def test_products_against_naive(law: str, shape: tuple, storage: BasisStorage, dtype: torch.dtype) -> None:
    slab = slab_of(law, *shape)
    held = hold(slab, storage)
    matrices = naive(slab)
    c, g = numbers(2, 3, slab.count, dtype=dtype), numbers(4, slab.cols, dtype=dtype)
    y = numbers(4, slab.count * slab.rows, dtype=dtype)
    assert_close(combine(c, hold(slab, storage)), torch.einsum("abk,kij->abij", c.double(), matrices), dtype)
    assert_close(project(g, hold(slab, storage)), g.double() @ matrices.flatten(0, 1).T, dtype)
    assert_close(project(y, hold(slab, storage), transpose=True), y.double() @ matrices.flatten(0, 1), dtype)
    got = entries(hold(slab, storage), dtype, CPU)
    assert got.dtype == dtype
    assert torch.equal(got.double(), matrices)
    assert held.storage == storage


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("with_columns", [True, False])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sandwich_against_naive(law: str, with_columns: bool, storage: BasisStorage, dtype: torch.dtype) -> None:
    """Value and gradients, with the gradients of the naive sum taken by autograd."""
    a, b = slab_of(law, 1, 5, 33, "ops/a"), slab_of(law, 4, 5, 47, "ops/b")
    held = hold(a, storage), hold(b, storage)
    diagonal = numbers(4, 5, dtype=dtype).requires_grad_()
    columns = numbers(4, 33, dtype=dtype, seed=1).requires_grad_() if with_columns else None
    inputs = [diagonal] if columns is None else [diagonal, columns]
    exact = [value.detach().double().requires_grad_() for value in inputs]
    ones = torch.ones(4, 33, dtype=torch.float64)
    scaled = exact[0].unsqueeze(-1) * naive(a) * (exact[1] if with_columns else ones).unsqueeze(1)
    expected = torch.einsum("jri,jro->oi", scaled, naive(b))
    got = sandwich(diagonal, columns, hold(a, storage), hold(b, storage))
    assert_close(got, expected, dtype)
    weights = numbers(47, 33, dtype=dtype, seed=2)
    for gradient, wanted in zip(
        torch.autograd.grad(got, inputs, weights), torch.autograd.grad(expected, exact, weights.double()), strict=True
    ):
        assert_close(gradient, wanted, dtype)
    assert len(held) == 2


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("storage", STORAGES)
def test_gradients_of_products_against_autograd(storage: BasisStorage) -> None:
    slab = slab_of("uniform", 6, 4, 150)
    held = hold(slab, storage)
    matrices = naive(slab)
    cases: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], int]] = [
        (lambda c: combine(c, hold(slab, storage)), lambda c: torch.einsum("nk,kij->nij", c, matrices), 6),
        (lambda x: project(x, hold(slab, storage)), lambda x: x @ matrices.flatten(0, 1).T, 150),
        (lambda x: project(x, hold(slab, storage), transpose=True), lambda x: x @ matrices.flatten(0, 1), 24),
    ]
    for ours, theirs, width in cases:
        x = numbers(3, width).requires_grad_()
        expected = theirs(x)
        weights = numbers(*expected.shape, seed=3)
        (wanted,) = torch.autograd.grad(expected, x, weights)
        (got,) = torch.autograd.grad(ours(x), x, weights)
        assert_close(got, wanted, torch.float64)
    assert held.storage == storage


def test_storage_kinds_give_the_same_entries_bit_for_bit() -> None:
    for law in LAWS:
        slab = slab_of(law, 5, 3, 140)
        held = [hold(slab, storage) for storage in STORAGES]
        first, *others = [entries(stored, torch.float32, CPU) for stored in held]
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("storage", STORAGES)
def test_no_rows(storage: BasisStorage) -> None:
    slab = slab_of("sign", 3, 2, 130)
    held = hold(slab, storage)
    assert combine(numbers(0, 3), hold(slab, storage)).shape == (0, 2, 130)
    assert project(numbers(0, 130), hold(slab, storage)).shape == (0, 6)
    assert project(numbers(0, 6), hold(slab, storage), transpose=True).shape == (0, 130)
    assert held.storage == storage


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("storage", STORAGES)
def test_tensors_that_are_not_contiguous(storage: BasisStorage) -> None:
    slab = slab_of("sign", 6, 4, 150)
    held = hold(slab, storage)
    c, x = numbers(6, 3).T, numbers(150, 5).T
    assert torch.equal(combine(c, hold(slab, storage)), combine(c.contiguous(), hold(slab, storage)))
    torch.testing.assert_close(project(x, hold(slab, storage)), project(x.contiguous(), hold(slab, storage)))
    wide = numbers(3, 4, 150).transpose(1, 2).contiguous().transpose(1, 2)
    leaf = c.clone().requires_grad_()
    (got,) = torch.autograd.grad(combine(leaf, hold(slab, storage)), leaf, wide)
    assert_close(got, torch.einsum("nij,kij->nk", wide, naive(slab)), torch.float64)
    assert held.storage == storage


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("law", ["sign", "hashed"])
def test_many_slabs_against_each_alone(law: str, storage: BasisStorage, dtype: torch.dtype) -> None:
    """Values and gradients of slabs that differ in their stream alone."""
    slabs = [slab_of(law, 6, 4, 150, name=f"ops/each/{number}") for number in range(3)]
    held = [hold(slab, storage) for slab in slabs]
    c = numbers(3, 2, 6, dtype=dtype).requires_grad_()
    weights = numbers(3, 2, 4, 150, dtype=dtype, seed=1)
    out = combine_each(c, [hold(one, storage) for one in slabs])
    (gradient,) = torch.autograd.grad(out, c, weights)
    for i, slab in enumerate(slabs):
        assert_close(out[i].detach(), torch.einsum("nk,kij->nij", c[i].detach().double(), naive(slab)), dtype)
        assert_close(gradient[i], torch.einsum("nij,kij->nk", weights[i].double(), naive(slab)), dtype)
    assert len(held) == 3


def test_gradcheck_of_many_slabs() -> None:
    slabs = [slab_of("normal", 3, 2, 5, name=f"ops/each/{number}") for number in range(2)]
    c = numbers(2, 1, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: combine_each(c, [hold(one, "recompute") for one in slabs]), c)
    weights = numbers(2, 1, 2, 5, seed=2).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda c: combine_each(c, [hold(one, "recompute") for one in slabs]).square(), c, weights
    )


# --- what values do not depend on -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("ambience", ["bfloat16 default", "meta default device", "autocast", "deterministic"])
def test_ambience_changes_nothing(storage: BasisStorage, ambience: str) -> None:
    slab, b = slab_of("normal", 6, 5, 150), slab_of("normal", 4, 5, 40, "ops/b")
    a = slab_of("normal", 1, 5, 33, "ops/a")
    c, x, diagonal = numbers(2, 6, dtype=torch.float32), numbers(3, 150, dtype=torch.float32), numbers(4, 5)

    def run() -> list[Tensor]:
        held = [hold(one, storage) for one in (slab, a, b)]
        leaf = c.clone().requires_grad_()
        out = combine(leaf, hold(slab, storage))
        (gradient,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
        values = [
            out.detach(),
            gradient,
            project(x, hold(slab, storage)),
            sandwich(diagonal, None, hold(a, storage), hold(b, storage)),
        ]
        assert len(held) == 3
        return [*values, entries(hold(slab, storage), torch.float32, CPU).clone()]

    expected = run()
    contexts: dict[str, Callable[[], AbstractContextManager]] = {
        "meta default device": lambda: torch.device("meta"),
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }
    before = torch.get_default_dtype()
    try:
        if ambience == "bfloat16 default":
            torch.set_default_dtype(torch.bfloat16)
        torch.use_deterministic_algorithms(ambience == "deterministic")
        with contexts.get(ambience, nullcontext)():
            got = run()
    finally:
        torch.set_default_dtype(before)
        torch.use_deterministic_algorithms(False)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.usefixtures("backend")
def test_thread_count_changes_nothing() -> None:
    """Entries and words bit for bit; the compiled sums too, torch's own products within rounding."""
    slab = slab_of("sign", 40, 16, 1000)
    c = numbers(2, 40, dtype=torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append((entries(hold(slab, "recompute"), torch.float32, CPU), combine(c, hold(slab, "recompute"))))
    finally:
        torch.set_num_threads(threads)
    for matrices, sums in found[1:]:
        assert torch.equal(matrices, found[0][0])
        torch.testing.assert_close(sums, found[0][1], rtol=0, atol=1e-4)


# --- half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str)
@pytest.mark.parametrize("with_columns", [True, False])
@pytest.mark.parametrize("tile", [1 << 20, 200])
@pytest.mark.parametrize("small", [1e-7, 1.0, 1e4])
def test_a_sandwich_of_half_operands(
    dtype: torch.dtype, tolerance: float, with_columns: bool, tile: int, small: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does, here in torch's own products of halves: operands rounded once, sums in float32."""
    monkeypatch.setattr(ops.backends, "wide", lambda device, wanted: wanted)
    monkeypatch.setattr(ops, "TILE_OF_SANDWICH", tile)
    monkeypatch.setattr(ops.backends, "tile_entries", lambda device: tile)
    monkeypatch.setattr(ops, "SMALL_SANDWICH", 0)
    a, b = slab_of("normal", 1, 5, 33, "ops/a"), slab_of("normal", 7, 5, 40, "ops/b")
    diagonal = numbers(7, 5, dtype=torch.float32) * small
    columns = numbers(7, 33, dtype=torch.float32, seed=1) / 33 if with_columns else None
    leaves = [one.clone().requires_grad_() for one in (diagonal, columns) if one is not None]
    gradient = numbers(40, 33, seed=2).to(dtype)
    out = sandwich(leaves[0], leaves[1] if with_columns else None, hold(a, "packed"), hold(b, "packed"), dtype)
    found = torch.autograd.grad(out, leaves, gradient)
    exact = [one.detach().double().requires_grad_() for one in leaves]
    scaled = exact[0].unsqueeze(-1) * naive(a)
    wanted = torch.einsum("jro,jri->oi", naive(b), scaled * exact[1].unsqueeze(1) if with_columns else scaled)
    expected = torch.autograd.grad(wanted, exact, gradient.double())
    assert out.dtype == dtype
    limits, wanted = torch.finfo(dtype), wanted.detach()
    if limits.smallest_normal < float(wanted.abs().max()) < limits.max:
        assert float((out.detach().double() - wanted).abs().max() / wanted.abs().max()) < tolerance
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert float((one.double() - other).abs().max() / other.abs().max()) < 2 * tolerance


# --- the way through the dispatcher ----------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_dispatcher_is_asked_only_where_something_watches(
    storage: BasisStorage, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dispatch of an op costs the host several times what a Function does."""
    slab, c, x = slab_of("sign", 6, 5, 40), numbers(6, dtype=torch.float32), numbers(3, 40, dtype=torch.float32)
    asked: list[str] = []
    op = ops._product
    monkeypatch.setattr(ops, "_product", lambda *a: (asked.append("product"), op(*a))[1])
    stored = hold(slab, storage)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        leaf = c.clone().requires_grad_()
        total = weighted_sum(leaf, stored, 0.5)
        (gradient,) = torch.autograd.grad(total.sum(), leaf)
        product = project(x, stored)
    assert not asked
    assert {one.dtype for one in (total, gradient, product)} == {torch.float32}
    assert_close(total, 0.5 * torch.einsum("i,irc->rc", c.double(), naive(slab)), torch.float32)
    assert_close(gradient, 0.5 * naive(slab).sum((1, 2)), torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = combine(c, stored)
    assert (tuple(fake.shape), bool(asked)) == ((5, 40), storage != "dense")


@pytest.mark.parametrize("storage", STORAGES)
def test_a_second_derivative_under_autocast(storage: BasisStorage) -> None:
    c = numbers(4, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = combine(c, hold(slab_of("sign", 4, 2, 9), storage)).square().sum()
        (first,) = torch.autograd.grad(out, c, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), c)
    gram = torch.einsum("irc,jrc->ij", *[naive(slab_of("sign", 4, 2, 9))] * 2)
    assert_close(second, 2 * gram.sum(0), torch.float32)


# --- gradcheck --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("law", ["sign", "sparse(3)", "hashed"])
def test_gradcheck_and_gradgradcheck_of_products(storage: BasisStorage, law: str) -> None:
    slab = slab_of(law, 3, 2, 5)
    held = hold(slab, storage)
    cases: list[tuple[Callable[[Tensor], Tensor], int]] = [
        (lambda c: combine(c, hold(slab, storage)), 3),
        (lambda x: project(x, hold(slab, storage)), 5),
        (lambda x: project(x, hold(slab, storage), transpose=True), 6),
    ]
    for function, width in cases:
        x = numbers(2, width).requires_grad_()
        assert torch.autograd.gradcheck(function, x)
        # Given, because gradgradcheck would draw it from the global generator.
        weights = numbers(*function(x).shape, seed=2).requires_grad_()
        assert torch.autograd.gradgradcheck(lambda x, f=function: f(x).square(), x, weights)
    assert held.storage == storage


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("storage", STORAGES)
def test_gradcheck_of_sandwich(storage: BasisStorage) -> None:
    a, b = slab_of("sparse(3)", 1, 2, 4, "ops/a"), slab_of("sparse(3)", 3, 2, 5, "ops/b")
    held = hold(a, storage), hold(b, storage)
    diagonal, columns = numbers(3, 2).requires_grad_(), numbers(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda d, c: sandwich(d, c, hold(a, storage), hold(b, storage)), (diagonal, columns)
    )
    assert torch.autograd.gradcheck(lambda d: sandwich(d, None, hold(a, storage), hold(b, storage)), diagonal)
    assert len(held) == 2


def test_second_derivative_of_sandwich_is_refused_not_zero() -> None:
    a, b = slab_of("sign", 1, 2, 4, "ops/a"), slab_of("sign", 3, 2, 5, "ops/b")
    diagonal = numbers(3, 2).requires_grad_()
    out = sandwich(diagonal, None, hold(a, "recompute"), hold(b, "recompute")).square().sum()
    with pytest.raises(DifferentiationError, match=r"second derivatives would be wrong.*contraction='token'"):
        torch.autograd.grad(out, diagonal, create_graph=True)


# --- torch.library.opcheck --------------------------------------------------------------------------------------------


def name_of(slab: Slab) -> list[int]:
    return [*slab.basis.key, slab.basis.stream, slab.count, slab.rows, slab.cols]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("join_rows", [True, False])
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("law", ["sign", "hashed"])
def test_opcheck_of_product(law: str, storage: str, dtype: torch.dtype, join_rows: bool, transpose: bool) -> None:
    slab = slab_of(law, 3, 2, 5)
    held = hold(slab, storage)  # type: ignore[arg-type]
    height, width = (6, 5) if join_rows else (3, 10)
    x = numbers(4, height if transpose else width, dtype=dtype).requires_grad_()
    arguments = (x, name_of(slab), slab.basis.law.name, join_rows, transpose, storage)
    torch.library.opcheck(torch.ops.randbasis.product.default, arguments)
    assert held.storage == storage


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("law", ["sign", "hashed"])
def test_opcheck_of_product_each(law: str, storage: str, transpose: bool) -> None:
    slab = slab_of(law, 3, 2, 5)
    held = hold(slab, storage)  # type: ignore[arg-type]
    x = numbers(2, 4, 3 if transpose else 10, dtype=torch.float32).requires_grad_()
    arguments = (x, name_of(slab), [slab.basis.stream, 7], slab.basis.law.name, transpose, storage)
    torch.library.opcheck(torch.ops.randbasis.product_each.default, arguments)
    assert held.storage == storage


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("with_columns", [True, False])
def test_opcheck_of_sandwich(storage: str, dtype: torch.dtype, with_columns: bool) -> None:
    a, b = slab_of("sign", 1, 2, 4, "ops/a"), slab_of("sign", 3, 2, 5, "ops/b")
    held = hold(a, storage), hold(b, storage)  # type: ignore[arg-type]
    diagonal = numbers(3, 2, dtype=dtype).requires_grad_()
    columns = numbers(3, 4, dtype=dtype, seed=1).requires_grad_() if with_columns else None
    frozen = (name_of(a), name_of(b), "sign", storage)
    for made in {dtype, torch.bfloat16}:
        torch.library.opcheck(torch.ops.randbasis.sandwich.default, (diagonal, columns, *frozen, made))
    plain = [None if value is None else value.detach() for value in (diagonal, columns)]
    gradient = numbers(5, 4, dtype=dtype, seed=2)
    torch.library.opcheck(torch.ops.randbasis.sandwich_backward.default, (gradient, *plain, *frozen))
    assert len(held) == 2


def test_ops_are_traced_whole() -> None:
    """``torch.compile`` sees one call an op and no graph break."""
    slab = slab_of("sign", 3, 2, 5)
    basis = hold(slab, "recompute")
    run = lambda c, x: project(x, basis) * combine(c, basis).sum()  # noqa: E731
    c, x = numbers(2, 3), numbers(4, 5)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="eager")(c, x), run(c, x))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
def test_vectors_of_another_width_are_refused(storage: BasisStorage) -> None:
    """Wider or narrower, also where a tile or a reshape would take them."""
    slab = slab_of("sign", 3, 2, 5)
    held = hold(slab, storage)
    cases: list[tuple[Callable[[Tensor], Tensor], int]] = [
        (lambda c: combine(c, hold(slab, storage)), 3),
        (lambda x: project(x, hold(slab, storage)), 5),
        (lambda x: project(x, hold(slab, storage), transpose=True), 6),
    ]
    for function, width in cases:
        for wrong in (width - 1, width + 1, 2 * width):
            with pytest.raises(BasisShapeError) as refusal:
                function(numbers(4, wrong))
            assert f"x must be [n, {width}] for this slab, got [4, {wrong}]; reshape it" in str(refusal.value)
    assert held.storage == storage


def test_unknown_storage_is_refused_by_every_op() -> None:
    slab, x = slab_of("sign", 3, 2, 5), numbers(4, 5)
    with pytest.raises(StorageError, match=r"basis_storage must be one of .* got 'disk'"):
        torch.ops.randbasis.product(x, name_of(slab), "sign", True, False, "disk")
    with pytest.raises(StorageError, match=r"basis_storage must be one of .* got 'disk'"):
        torch.ops.randbasis.sandwich(numbers(3, 2), None, name_of(slab), name_of(slab), "sign", "disk", torch.float64)


def test_many_slabs_must_be_alike_and_have_coefficients_each() -> None:
    slab, other = slab_of("sign", 3, 2, 5), slab_of("sign", 3, 2, 6)
    with pytest.raises(BasisShapeError, match="bases must hold at least one slab, got none"):
        combine_each(numbers(0, 3), [])
    for different in (other, slab_of("normal", 3, 2, 5), Slab(Basis(1, 2, slab.basis.law), 3, 2, 5)):
        with pytest.raises(BasisShapeError, match="bases must differ in their stream alone"):
            combine_each(numbers(2, 1, 3), [hold(one, "recompute") for one in (slab, different)])
    with pytest.raises(BasisShapeError, match=r"x must be \[2, n, 3\] for these slabs, got \[3, 1, 3\]"):
        combine_each(numbers(3, 1, 3), [hold(slab, "recompute")] * 2)

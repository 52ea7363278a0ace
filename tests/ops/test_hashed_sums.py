"""Sums of disjoint matrices, math (25): every implementation against the entries, at any k, and what they depend on."""

import copy
import math

import pytest
import torch
from torch import Tensor

from randbasis.basis import Basis, basis_entries, block_words, hashed_terms
from randbasis.basis_storage import BasisStorage
from randbasis.errors import BasisShapeError
from randbasis.ops import Slab, backends, choose_storage, combine, combine_each, cpu, hold, inner, inner_each, reference
from randbasis.ops import triton as kernels
from randbasis.ops.storage import DENSE_BYTES, PACKED, Stored

STORAGES: tuple[BasisStorage, ...] = ("packed", "dense", "recompute")
CPU = torch.device("cpu")
#: More matrices than places, about as many, and few: with rows that end within a block, a strip and a word.
SHAPES = [(65536, 3, 301), (1000, 7, 129), (7, 5, 260), (2, 1, 1)]
IMPLEMENTATIONS = {"reference": reference, "cpu": cpu, "triton": kernels}


@pytest.fixture(params=["reference", "auto"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RANDBASIS_BACKEND", request.param)
    return request.param


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest):
    """With a GPU, the kernels have tests of their own: here they run in the interpreter."""
    if request.param == "triton" and kernels.refusal(CPU, torch.float32) is not None:
        pytest.skip("the kernels run on CUDA here")
    return IMPLEMENTATIONS[request.param]


def slab_of(count: int, rows: int, cols: int, stream: int = 2**31 + 7) -> Slab:
    return Slab(Basis.named(2**63 + 12345, stream, "hashed"), count, rows, cols)


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def terms(slab: Slab) -> tuple[Tensor, Tensor]:
    """Index and sign of each place, by the specification."""
    words = block_words(slab.basis, (0, 1), (0, slab.rows), (0, slab.blocks))[0, :, : slab.cols]
    return hashed_terms(words, slab.basis.law)


def gathered(c: Tensor, slab: Slab) -> Tensor:
    owners, signs = terms(slab)
    return c.double()[:, owners] * signs


def segments(g: Tensor, slab: Slab) -> Tensor:
    owners, signs = terms(slab)
    return torch.stack([
        torch.bincount(owners.flatten(), (one.double() * signs).flatten(), minlength=slab.count) for one in g
    ])  # fmt: skip


# --- values -----------------------------------------------------------------------------------------------------------


def test_the_oracle_is_the_sum_of_the_entries() -> None:
    slab = slab_of(40, 5, 90)
    entries = basis_entries(slab.basis.seed, slab.basis.stream, slab.basis.law, (40, 5, 90)).double()
    c, g = numbers(3, 40), numbers(3, 5, 90)
    torch.testing.assert_close(gathered(c, slab), torch.einsum("nk,krc->nrc", c, entries))
    torch.testing.assert_close(segments(g, slab), torch.einsum("nrc,krc->nk", g, entries))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 9])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_any_k(implementation, shape: tuple[int, int, int], n: int, dtype: torch.dtype) -> None:
    """A sum is one term, so exact; a gradient is rounded once."""
    if implementation is kernels and dtype == torch.float64:
        pytest.skip("the kernels take no float64")
    slab = slab_of(*shape)
    c, g = numbers(n, slab.count, dtype=dtype), numbers(n, *shape[1:], dtype=dtype, seed=1)
    for packed in (None, backends.words(slab, CPU)):
        assert torch.equal(implementation.combine(c, slab, packed).double(), gathered(c, slab))
        found = implementation.inner(g, slab, packed)
        assert found.dtype == dtype
        tolerance = {torch.float32: 2.0**-22, torch.float64: 1e-13}[dtype]
        torch.testing.assert_close(found.double(), segments(g, slab), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(implementation, dtype: torch.dtype) -> None:
    if implementation is not kernels:
        implementation = backends
    slab = slab_of(1000, 7, 129)
    c, g = numbers(3, 1000, dtype=dtype), numbers(3, 7, 129, dtype=dtype, seed=1)
    assert torch.equal(implementation.combine(c, slab, None).double(), gathered(c, slab))
    found, exact = implementation.inner(g, slab, None), segments(g, slab)
    torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_a_small_number_beside_large_ones_is_not_lost(implementation) -> None:
    """2²⁶ and −2²⁶ in places of one matrix, and 1 in a third: a sum of float32 would forget the one."""
    slab = slab_of(3, 2, 400)
    owners, signs = terms(slab)
    places = (owners.flatten() == 1).nonzero().flatten()[[0, 40, 80]]
    g = torch.zeros(2 * 400)
    g[places] = torch.tensor([2.0**26, 1.0, -(2.0**26)]) * signs.flatten()[places]
    assert implementation.inner(g.view(1, 2, 400), slab).tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_numbers_of_any_size(implementation, scale: float) -> None:
    slab = slab_of(7, 3, 130)
    g = scale * numbers(2, 3, 130, dtype=torch.float32)
    exact = segments(g, slab)
    torch.testing.assert_close(implementation.inner(g, slab).double(), exact, rtol=1e-6, atol=1e-6 * scale)
    assert not implementation.inner(torch.zeros_like(g), slab).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(implementation, value: float) -> None:
    """Of the vectors, that which has it alone."""
    slab = slab_of(7, 3, 130)
    c, g = torch.ones(2, 7), torch.ones(2, 3, 130)
    c[1, 4] = g[1, 2, 100] = value
    for out in (implementation.combine(c, slab), implementation.inner(g, slab)):
        assert out[0].isfinite().all()
        assert not out[1].isfinite().all()


def test_nothing_of_nothing(implementation) -> None:
    for shape, n in (((4, 0, 5), 2), ((4, 3, 0), 2), ((4, 3, 5), 0)):
        slab = slab_of(*shape)
        assert torch.equal(implementation.combine(torch.ones(n, 4), slab), torch.zeros(n, *shape[1:]))
        assert torch.equal(implementation.inner(torch.ones(n, *shape[1:]), slab), torch.zeros(n, 4))


def test_other_shapes_and_words_are_refused(implementation) -> None:
    if implementation is reference:
        pytest.skip("the reference leaves shapes to torch")
    slab = slab_of(4, 3, 300)
    words = backends.words(slab, CPU)
    with pytest.raises(BasisShapeError, match=r"coefficients must be \[n, 4\], got \[1, 5\]"):
        implementation.combine(torch.ones(1, 5), slab)
    for wrong in (words[:, :2], words[..., :8], words.long(), words.expand(4, -1, -1)):
        with pytest.raises(BasisShapeError, match=r"packed must be int32 words of shape \[1, 3, 300\]"):
            implementation.combine(torch.ones(1, 4), slab, wrong)
        with pytest.raises(BasisShapeError, match=r"packed must be int32 words of shape \[1, 3, 300\]"):
            implementation.inner(torch.ones(1, 3, 300), slab, wrong)


def test_arguments_may_be_strided(implementation) -> None:
    slab = slab_of(6, 3, 200)
    c, g = numbers(6, 4, dtype=torch.float32).T, numbers(200, 3, 3, dtype=torch.float32).permute(2, 1, 0)
    assert torch.equal(implementation.combine(c, slab), implementation.combine(c.contiguous(), slab))
    assert torch.equal(implementation.inner(g, slab), implementation.inner(g.contiguous(), slab))


# --- an isometry ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "rows", "cols"), [(64, 16, 1024), (1024, 16, 4096)])
def test_a_sum_is_as_long_as_its_coefficients(k: int, rows: int, cols: int) -> None:
    """``‖Σ aᵢ Aᵢ‖² = k Σ nᵢ aᵢ²`` to rounding, ``nᵢ`` the places of each matrix: about ``rows · cols · ‖a‖²``."""
    slab = slab_of(k, rows, cols)
    a, unit = numbers(8, k), slab.basis.law.unit
    lengths = (unit * combine(a, hold(slab, "recompute"))).flatten(1).square().sum(1)
    counts = torch.bincount(terms(slab)[0].flatten(), minlength=k).double()
    torch.testing.assert_close(lengths, k * (counts * a.square()).sum(1), rtol=1e-12, atol=0)
    # Places are dealt at random: nᵢ has the variance of a binomial.
    area = rows * cols
    expected = area * a.square().sum(1)
    deviation = k * math.sqrt(area / k) * a.pow(4).sum(1).sqrt()
    assert bool(((lengths - expected).abs() < 4 * deviation).all())
    gram = torch.stack([combine(one, hold(slab, "recompute")).flatten() for one in torch.eye(k, dtype=a.dtype)[:50]])
    assert torch.equal(gram @ gram.T, torch.diag(counts[:50]))


# --- what they do not depend on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("k", [5, 3000])
def test_the_number_of_threads_changes_no_bit(k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_INLINE", 1)
    slab = slab_of(k, 40, 1500)
    c, g = numbers(3, k, dtype=dtype), numbers(3, 40, 1500, dtype=dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append((cpu.combine(c, slab), cpu.inner(g, slab), reference.inner(g, slab)))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_the_kernels_do_not_depend_on_the_order_of_their_programs() -> None:
    """They add integers: with any number of copies to add to, the same bits."""
    if kernels.refusal(CPU, torch.float32) is not None:
        pytest.skip("the kernels run on CUDA here")
    slab, g = slab_of(5, 6, 300), numbers(2, 6, 300, dtype=torch.float32)
    flipped = torch.stack([g[1], g[0]])
    assert torch.equal(kernels.inner(g, slab).flip(0), kernels.inner(flipped, slab))
    torch.testing.assert_close(kernels.inner(g, slab), cpu.inner(g, slab), rtol=2.0**-22, atol=1e-6)


@pytest.mark.usefixtures("backend")
def test_every_storage_gives_the_same_bits() -> None:
    slab = slab_of(50, 6, 150)
    held = [hold(slab, storage) for storage in STORAGES]
    c, g = numbers(2, 50, dtype=torch.float32), numbers(2, 6, 150, dtype=torch.float32)
    sums = [(combine(c, one), inner(g, one)) for one in held]
    for others in sums[1:]:
        assert all(torch.equal(one, other) for one, other in zip(sums[0], others, strict=True))


# --- storage ----------------------------------------------------------------------------------------------------------


def test_no_storage_is_larger_than_a_word_for_each_place() -> None:
    """65,536 matrices would be 16 GiB densely."""
    slab = slab_of(65536, 16, 4096)
    for storage, kept in (("packed", 4), ("dense", 4), ("recompute", 0)):
        stored = Stored(slab, storage)
        combine(torch.ones(1, 65536), stored)
        assert stored.dense(torch.float32, CPU) is None
        assert stored.nbytes == kept * 16 * 4096
        assert copy.deepcopy(stored) is stored


def test_auto_keeps_words_where_they_fit() -> None:
    words = PACKED * DENSE_BYTES // 16
    sizes = [(1 << 10, 1, 4), (1 << 16, 1, 4 * words), (1 << 10, 1, 4 * words + 1)]
    assert [choose_storage(slab_of(*size), "auto", shared=True) for size in sizes] == ["packed", "packed", "recompute"]
    # One matrix is an ordinary one.
    assert choose_storage(slab_of(1, 8, 64), "auto", shared=True) == "dense"
    assert Stored(slab_of(1, 8, 64), "dense").dense(torch.float16, CPU).abs().unique().tolist() == [1.0]


# --- autograd and transforms ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("storage", STORAGES)
def test_transforms_of_torch_func(storage: BasisStorage) -> None:
    """They see torch's own operations; none of them is as large as the basis."""
    slab = slab_of(9, 3, 20)
    held = hold(slab, storage)
    c, g = numbers(4, 9), numbers(4, 3, 20)
    expected, wanted = gathered(c, slab), segments(g, slab)
    torch.testing.assert_close(torch.func.vmap(lambda one: combine(one, held))(c), expected)
    torch.testing.assert_close(torch.func.vmap(lambda one: inner(one, held))(g), wanted)
    loss = lambda one: combine(one, held).pow(3).sum()  # noqa: E731
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(loss))(c), segments(3 * expected.square(), slab), rtol=1e-12, atol=1e-12
    )
    by_matrix = torch.zeros(9, dtype=torch.float64)
    owners, signs = terms(slab)
    by_matrix.index_add_(0, owners.flatten(), signs.flatten().double())
    # d²/dc² of Σ (± c)³ is 6 c Σ ±.
    torch.testing.assert_close(torch.func.hessian(loss)(c[0]), torch.diag(6 * c[0] * by_matrix), rtol=1e-12, atol=1e-12)
    value, tangent = torch.func.jvp(lambda one: combine(one, held), (c[0],), (c[1],))
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(tangent, expected[1])
    with pytest.raises(BasisShapeError, match=r"coefficients must end in 9, got \[8\]"):
        torch.func.vmap(lambda one: combine(one, held))(numbers(4, 8))
    with pytest.raises(BasisShapeError, match=r"vectors must end in \(3, 20\), got \[3, 19\]"):
        torch.func.vmap(lambda one: inner(one, held))(numbers(4, 3, 19))


def test_half_precision_in_a_transform_is_added_up_in_float32() -> None:
    slab = slab_of(2, 30, 300)
    g = numbers(1, 30, 300, dtype=torch.float16)
    found = torch.func.vmap(lambda one: inner(one, hold(slab, "recompute")))(g)
    torch.testing.assert_close(found.double(), segments(g, slab), rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("storage", STORAGES)
def test_one_graph_for_the_compiler(storage: BasisStorage) -> None:
    held = hold(slab_of(9, 3, 20), storage)
    run = lambda c, g: combine(c, held).sum() * inner(g, held)  # noqa: E731
    c, g = numbers(2, 9).requires_grad_(), numbers(2, 3, 20)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(c, g)
    torch.testing.assert_close(compiled, run(c, g))
    (found,) = torch.autograd.grad(compiled.sum(), c)
    (wanted,) = torch.autograd.grad(run(c, g).sum(), c)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("by", ["auto", "triton"])
def test_many_slabs_at_once(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "triton" and kernels.refusal(CPU, torch.float32) is not None:
        pytest.skip("the kernels run on CUDA here")
    monkeypatch.setenv("RANDBASIS_BACKEND", by)
    slabs = [slab_of(9, 2, 130, stream) for stream in (0, 2**31, 2**32 - 1)]
    held = [hold(one, "recompute") for one in slabs]
    c, g = numbers(3, 2, 9, dtype=torch.float32), numbers(3, 2, 2, 130, dtype=torch.float32)
    sums, products = combine_each(c, held), inner_each(g, held)
    for at, slab in enumerate(slabs):
        assert torch.equal(sums[at].double(), gathered(c[at], slab))
        torch.testing.assert_close(products[at].double(), segments(g[at], slab), rtol=1e-6, atol=1e-6)

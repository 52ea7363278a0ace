"""The Triton kernels against the torch reference: interpreted on the CPU, or compiled where there is a GPU.

The interpreter takes milliseconds a program, so shapes are small; what a compiler may refuse is compiled for an H100 in
`test_triton_compiles.py`, and real shapes are at the end of this file, for a GPU.
"""

import pytest
import torch
from test_cpu import GOLDEN, GOLDEN_BASIS, KNOWN_ANSWERS, POWERS
from torch import Tensor

from randbasis.basis import Basis, basis_entries, block_words
from randbasis.errors import BackendError, BasisShapeError
from randbasis.ops import Slab, backends, combine, combine_each, entries, hold, project, reference, sandwich
from randbasis.ops import triton as kernels
from randbasis.ops.reference import Tile

pytest.importorskip("triton", reason="triton is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
LAWS = ("sign", "uniform", "normal", "sparse(3)")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: (count, rows, cols): one entry; less than a block; odd sizes over several strips; more lines than a tile of sums has.
SHAPES = ((1, 1, 1), (3, 2, 5), (5, 2, 140), (130, 2, 33))
#: Rounding relative to the root mean square: of a float32 sum, which tensor cores truncate at every step, and of one
#: store, which the interpreter truncates.
TOLERANCE = {torch.float32: 2e-5 if torch.cuda.is_available() else 2e-6, torch.bfloat16: 2**-5, torch.float16: 2**-8}


@pytest.fixture(autouse=True)
def _poisoned_memory(poisoned_memory: None) -> None:
    """Every test of this file."""


@pytest.fixture
def by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops run on the kernels, or fail."""
    monkeypatch.setenv("RANDBASIS_BACKEND", "triton")


@pytest.fixture
def always_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest of sums is cut into parts."""
    monkeypatch.setattr(kernels, "_PART", 1)


def slab_of(law: str, shape: tuple[int, int, int], seed: int = 2**63 + 12345, stream: int = 0xECEB6DCF) -> Slab:
    return Slab(Basis.named(seed, stream, law), *shape)


def packed_words(slab: Slab) -> Tensor:
    return block_words(slab.basis, (0, slab.count), (0, slab.rows), (0, slab.blocks), DEVICE)


def dense(slab: Slab) -> Tensor:
    basis = slab.basis
    shape = (slab.count, slab.rows, slab.cols)
    return POWERS[basis.law.name] * basis_entries(basis.seed, basis.stream, basis.law, shape, device=DEVICE).double()


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(DEVICE, dtype)


def assert_close(value: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert value.dtype == dtype
    assert value.shape == expected.shape
    scale = expected.square().mean().sqrt().clamp_min(1e-300)
    assert ((value.double() - expected).abs().max() / scale).item() < 4 * TOLERANCE[dtype]


def sums(slab: Slab, n: int, dtype: torch.dtype, packed: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Every sum of a slab, each beside its formula in float64."""
    matrices, lines = dense(slab), slab.count * slab.rows
    c, g = numbers(n, slab.count, dtype=dtype), numbers(n, slab.rows, slab.cols, dtype=dtype, seed=1)
    x, y = numbers(n, slab.cols, dtype=dtype, seed=2), numbers(n, lines, dtype=dtype, seed=3)
    rows = matrices.flatten(0, 1)
    return [
        (kernels.combine(c, slab, packed), torch.einsum("nk,krc->nrc", c.double(), matrices)),
        (kernels.inner(g, slab, packed), torch.einsum("nrc,krc->nk", g.double(), matrices)),
        (kernels.project(x, slab, packed), x.double() @ rows.T),
        (kernels.project(y, slab, packed, transpose=True), y.double() @ rows),
    ]


# --- words and entries, bit for bit -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_words_against_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    block, row, index, stream = counter
    slab = Slab(Basis(key[0] | key[1] << 32, stream, slab_of("sign", (1, 1, 1)).basis.law), 1, 1, 1)
    out = kernels.words(slab, Tile(index, 1, row, 1), DEVICE, start_block=block, blocks=1)
    assert tuple(word & 0xFFFFFFFF for word in out.flatten().tolist()) == expected


@pytest.mark.parametrize(
    ("index", "row", "block"),
    [((0, 3), (0, 2), (0, 1)), ((7, 1), (5, 11), (3, 19)), ((2**32 - 3, 3), (2**31 - 1, 2), (2**32 - 5, 5))],
)
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**64 - 1])
def test_words_against_the_reference(index: tuple, row: tuple, block: tuple, seed: int) -> None:
    """From any start, up to the last values of the generator's counters."""
    slab = slab_of("sign", (1, 1, 1), seed=seed, stream=2**31 + seed % 2)
    tile = Tile(index[0], index[1], row[0], row[1])
    out = kernels.words(slab, tile, DEVICE, start_block=block[0], blocks=block[1])
    assert torch.equal(out, block_words(slab.basis, index, row, block, DEVICE))


@pytest.mark.parametrize("law", GOLDEN)
def test_entries_against_golden_values(law: str) -> None:
    seed, stream = GOLDEN_BASIS
    slab = slab_of(law, (6, 4, 1004), seed=seed, stream=stream)
    first, later = GOLDEN[law]
    got = [kernels.expand(slab, Tile(i, 1, row, 1), torch.float32, DEVICE)[0, 0] for i, row in ((0, 0), (5, 3))]
    assert tuple((got[0][:12] / POWERS[law]).tolist()) == first
    assert tuple((got[1][1000:] / POWERS[law]).tolist()) == later


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("law", [*LAWS, "sparse(40)"])
def test_entries_against_the_reference(law: str, dtype: torch.dtype) -> None:
    for shape in SHAPES[1:]:
        slab = slab_of(law, shape)
        words = packed_words(slab)
        for tile in (Tile(0, slab.count, 0, slab.rows), Tile(1, 2, 1, 1)):
            expected = reference.part(dense(slab), tile)
            for packed in (None, reference.part(words, tile)):
                out = kernels.expand(slab, tile, dtype, DEVICE, packed)
                assert out.dtype == dtype
                assert torch.equal(out.double(), expected)


# --- sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 17])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_against_the_formula(law: str, n: int, dtype: torch.dtype) -> None:
    shape = SHAPES[2] if dtype == torch.float32 else SHAPES[1]
    slab = slab_of(law, shape)
    for packed in (None, packed_words(slab)):
        for value, expected in sums(slab, n, dtype, packed):
            assert_close(value, expected, dtype)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]])
@pytest.mark.parametrize("law", ["sign", "uniform"])
def test_sums_of_one_entry_and_of_many_lines(law: str, shape: tuple[int, int, int]) -> None:
    for n in (2, 70):
        for value, expected in sums(slab_of(law, shape), n, torch.float32, None):
            assert_close(value, expected, torch.float32)


@pytest.mark.usefixtures("always_cut")
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("law", ["sign", "normal"])
def test_sums_in_parts(law: str, n: int) -> None:
    slab = slab_of(law, (150, 2, 260 if law == "sign" else 70))
    for value, expected in sums(slab, n, torch.float32, None):
        assert_close(value, expected, torch.float32)
    for value, expected in sums(slab_of(law, SHAPES[2]), n, torch.bfloat16, None):
        assert_close(value, expected, torch.bfloat16)


@pytest.mark.parametrize("n", [1, 3])
def test_both_sources_give_the_same_bits(n: int) -> None:
    for law in ("sign", "uniform"):
        slab = slab_of(law, (20, 2, 150))
        generated, packed = (sums(slab, n, torch.float32, source) for source in (None, packed_words(slab)))
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(generated, packed, strict=True))


@pytest.mark.parametrize("n", [1, 3])
def test_a_float32_is_not_rounded_before_it_is_multiplied(n: int) -> None:
    """Coefficients that differ in their last bit, against the exact sum: half precision alone would miss it."""
    slab = slab_of("uniform", (4, 1, 40))
    base = numbers(n, 4)
    off = torch.nextafter(base, torch.full_like(base, 10.0))
    difference = kernels.combine(off, slab).double() - kernels.combine(base, slab).double()
    exact = torch.einsum("nk,krc->nrc", off.double() - base.double(), dense(slab))
    rounding = 2.0**-23 * torch.einsum("nk,krc->nrc", base.double().abs(), dense(slab).abs())
    assert bool((difference.abs() > 0).any())
    assert bool(((difference - exact).abs() <= 4 * rounding).all())


def test_sums_over_nothing() -> None:
    for shape, n in (((0, 3, 5), 2), ((4, 0, 5), 2), ((4, 3, 0), 2), ((4, 3, 5), 0)):
        slab = slab_of("uniform", shape)
        assert torch.equal(kernels.combine(numbers(n, shape[0]), slab), numbers(n, *shape[1:]).zero_())
        assert torch.equal(kernels.inner(numbers(n, *shape[1:]), slab), numbers(n, shape[0]).zero_())
        assert kernels.words(slab, Tile(0, shape[0], 0, shape[1]), DEVICE).shape == (*shape[:2], 4 * slab.blocks)


@pytest.mark.parametrize("n", [2, 5])
def test_a_value_that_is_not_finite_reaches_the_sums_that_hold_it_and_no_other(n: int) -> None:
    slab = slab_of("sign", (10, 2, 140))
    c, g = numbers(n, 10), numbers(n, 2, 140)
    c[1, 9] = g[1, 1, 139] = float("nan")
    for out in (kernels.combine(c, slab), kernels.inner(g, slab)):
        assert out[0].isfinite().all()
        assert out[1].isnan().all()


def test_arguments_are_left_as_they_were_and_may_be_strided() -> None:
    slab = slab_of("sign", (6, 3, 200))
    c, g = numbers(6, 4).T, numbers(200, 3, 3).permute(2, 1, 0)
    packed = packed_words(slab).transpose(0, 1).contiguous().transpose(0, 1)
    before = [c.clone(), g.clone(), packed.clone()]
    combined, products = kernels.combine(c, slab, packed), kernels.inner(g, slab, packed)
    assert all(torch.equal(a, b) for a, b in zip(before, (c, g, packed), strict=True))
    assert_close(combined, torch.einsum("nk,krc->nrc", c.double(), dense(slab)), torch.float32)
    assert_close(products, torch.einsum("nrc,krc->nk", g.double(), dense(slab)), torch.float32)


# --- behind the ops ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("by_triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("storage", ["packed", "recompute"])
@pytest.mark.parametrize("law", ["sign", "sparse(3)"])
def test_ops_and_their_gradients_against_float64(law: str, storage, dtype: torch.dtype) -> None:
    slab = slab_of(law, (6, 4, 150))
    held = hold(slab, storage)
    matrices = dense(slab)
    rows = matrices.flatten(0, 1)
    cases = [
        (lambda c: combine(c, hold(slab, storage)), lambda c: torch.einsum("nk,kij->nij", c, matrices), 6),
        (lambda x: project(x, hold(slab, storage)), lambda x: x @ rows.T, 150),
        (lambda x: project(x, hold(slab, storage), transpose=True), lambda x: x @ rows, 24),
    ]
    for ours, theirs, width in cases:
        x = numbers(3, width, dtype=dtype).requires_grad_()
        exact = x.detach().double().requires_grad_()
        got, expected = ours(x), theirs(exact)
        weights = numbers(*expected.shape, dtype=dtype, seed=3)
        assert_close(got.detach(), expected.detach(), dtype)
        (gradient,) = torch.autograd.grad(got, x, weights)
        (wanted,) = torch.autograd.grad(expected, exact, weights.double())
        assert_close(gradient, wanted, dtype)
    assert torch.equal(entries(hold(slab, storage), dtype, DEVICE).double(), matrices)
    assert held.storage == storage


@pytest.mark.usefixtures("by_triton")
@pytest.mark.parametrize("way", ["fused", "expanded"])
@pytest.mark.parametrize("transpose", [True, False])
def test_both_ways_to_project_agree(way: str, transpose: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANDBASIS_PROJECT", way)
    slab = slab_of("uniform", (3, 5, 70))
    rows = dense(slab).flatten(0, 1)
    x = numbers(4, 15 if transpose else 70)
    expected = x.double() @ (rows if transpose else rows.T)
    assert_close(project(x, hold(slab, "recompute"), transpose=transpose), expected, torch.float32)


@pytest.mark.usefixtures("by_triton")
def test_sandwich_on_entries_of_the_kernels() -> None:
    a, b = slab_of("sign", (1, 4, 33)), slab_of("sign", (3, 4, 40), stream=5)
    diagonal, columns = numbers(3, 4), numbers(3, 33, seed=1)
    scaled = diagonal.double().unsqueeze(-1) * dense(a) * columns.double().unsqueeze(1)
    expected = torch.einsum("jri,jro->oi", scaled, dense(b))
    assert_close(sandwich(diagonal, columns, hold(a, "recompute"), hold(b, "recompute")), expected, torch.float32)


@pytest.mark.usefixtures("by_triton")
@pytest.mark.parametrize("n", [1, 3])
def test_many_slabs_in_one_launch(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch forward, one backward, and the sums of every slab by itself."""
    slabs = [slab_of("sign", (9, 2, 130), stream=stream) for stream in (0, 2**31, 2**32 - 1)]
    launches: list[bool] = []
    once = kernels._sum
    monkeypatch.setattr(kernels, "_sum", lambda *args, **options: launches.append(True) or once(*args, **options))
    c = numbers(3, n, 9).requires_grad_()
    out = combine_each(c, [hold(one, "recompute") for one in slabs])
    weights = numbers(3, n, 2, 130, seed=1)
    (gradient,) = torch.autograd.grad(out, c, weights)
    assert len(launches) == 2
    for i, slab in enumerate(slabs):
        assert torch.equal(out[i], combine(c[i], hold(slab, "recompute")))
        expected = torch.einsum("nij,kij->nk", weights[i].double(), dense(slab))
        assert_close(gradient[i], expected, torch.float32)


@pytest.mark.usefixtures("by_triton")
@pytest.mark.parametrize("join_rows", [True, False])
@pytest.mark.parametrize("transpose", [True, False])
def test_opcheck_of_product(join_rows: bool, transpose: bool) -> None:
    slab = slab_of("sign", (3, 2, 5))
    name = [*slab.basis.key, slab.basis.stream, 3, 2, 5]
    height, width = (6, 5) if join_rows else (3, 10)
    x = numbers(4, height if transpose else width).requires_grad_()
    torch.library.opcheck(torch.ops.randbasis.product.default, (x, name, "sign", join_rows, transpose, "recompute"))


@pytest.mark.usefixtures("by_triton")
def test_opcheck_of_product_each() -> None:
    slab = slab_of("sign", (3, 2, 5))
    name = [*slab.basis.key, 0, 3, 2, 5]
    x = numbers(2, 4, 3).requires_grad_()
    torch.library.opcheck(torch.ops.randbasis.product_each.default, (x, name, [7, 8], "sign", True, "recompute"))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_wrong_shapes_are_refused_before_memory_is_read() -> None:
    slab = slab_of("sign", (4, 3, 300))
    words = packed_words(slab)
    with pytest.raises(BasisShapeError, match=r"coefficients must be \[n, 4\], got \[1, 5\]"):
        kernels.combine(numbers(1, 5), slab)
    with pytest.raises(BasisShapeError, match=r"vectors must be \[n, 3, 300\], got \[1, 3, 299\]"):
        kernels.inner(numbers(1, 3, 299), slab)
    with pytest.raises(BasisShapeError, match=r"x must be \[n, 12\] for this slab, got \[1, 300\]"):
        kernels.project(numbers(1, 300), slab, transpose=True)
    for wrong in (words[:3], words[:, :2], words[..., :8], words.long()):
        with pytest.raises(BasisShapeError, match="packed must be int32 words of shape"):
            kernels.combine(numbers(1, 4), slab, wrong)
        with pytest.raises(BasisShapeError, match="packed must be int32 words of shape"):
            kernels.expand(slab, Tile(0, 4, 0, 3), torch.float32, DEVICE, wrong)
    with pytest.raises(BasisShapeError, match=r"fewer than 2\*\*31 rows of all its matrices"):
        kernels.project(numbers(1, 1), slab_of("sign", (2**16, 2**15, 1)))


def test_float64_is_refused_by_name_and_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANDBASIS_BACKEND", "triton")
    with pytest.raises(
        BackendError, match=r"the Triton kernels take float32, bfloat16 and float16, the tensor is torch.f"
    ):
        backends.chosen(DEVICE, torch.float64)
    monkeypatch.delenv("RANDBASIS_BACKEND")
    assert backends.chosen(torch.device("cuda"), torch.float64) == "reference"


def test_kernels_that_are_not_interpreted_refuse_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("randbasis.ops.triton_kernels.INTERPRETED", False)
    for name in ("cpu", "mps"):
        reason = kernels.refusal(torch.device(name), torch.float32)
        assert reason == (
            f"the Triton kernels run on CUDA (or on the CPU with TRITON_INTERPRET=1), the tensor is on {name}"
        )


# --- a real GPU -------------------------------------------------------------------------------------------------------

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels ran in Triton's interpreter"),
]


class TestOnGpu:
    """Shapes of 7B layers, compiled."""

    pytestmark = needs_gpu

    @pytest.mark.parametrize("law", LAWS)
    def test_basis_bit_for_bit(self, law: str) -> None:
        slab = slab_of(law, (32, 16, 11008))
        whole = Tile(0, 32, 0, 16)
        words = packed_words(slab)
        assert torch.equal(backends.words(slab, DEVICE), words)
        for dtype in DTYPES:
            for packed in (None, words):
                assert torch.equal(kernels.expand(slab, whole, dtype, DEVICE, packed).double(), dense(slab))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("n", [1, 5, 192])
    @pytest.mark.parametrize("law", LAWS)
    def test_sums(self, law: str, n: int, dtype: torch.dtype) -> None:
        slab = slab_of(law, (128, 16, 4096))
        for packed in (None, packed_words(slab)):
            for value, expected in sums(slab, n, dtype, packed):
                assert_close(value, expected, dtype)

    def test_the_same_bits_every_time(self) -> None:
        slab = slab_of("sign", (128, 16, 4096))
        first = [value for value, _ in sums(slab, 5, torch.float32, None)]
        for _ in range(3):
            assert all(torch.equal(a, b) for a, (b, _) in zip(first, sums(slab, 5, torch.float32, None), strict=True))

    def test_in_a_cuda_graph(self) -> None:
        """Captured once and replayed on other numbers, forward and backward."""
        slab, own = slab_of("sign", (128, 16, 4096)), [slab_of("sign", (64, 16, 512), stream=s) for s in range(3)]
        c, each = numbers(2, 128).requires_grad_(), numbers(3, 1, 64).requires_grad_()

        def run() -> list[Tensor]:
            out, many = combine(c, hold(slab, "recompute")), combine_each(each, [hold(one, "recompute") for one in own])
            gradients = torch.autograd.grad(out.square().sum() + many.square().sum(), [c, each])
            return [out, many, *gradients]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        with torch.no_grad():
            c.copy_(numbers(2, 128, seed=7))
            each.copy_(numbers(3, 1, 64, seed=8))
        graph.replay()
        for got, expected in zip(captured, run(), strict=True):
            torch.testing.assert_close(got, expected)

    def test_compiled_by_torch(self) -> None:
        slab = slab_of("sign", (8, 4, 300))
        function = lambda c, x: project(x, hold(slab, "recompute")) + combine(c, hold(slab, "recompute")).sum()  # noqa: E731
        c, x = numbers(2, 8).requires_grad_(), numbers(5, 300).requires_grad_()
        expected = torch.autograd.grad(function(c, x).square().sum(), [c, x])
        got = torch.autograd.grad(torch.compile(function, fullgraph=True)(c, x).square().sum(), [c, x])
        for one, other in zip(got, expected, strict=True):
            # A compiler sums in another order: a few roundings of the largest terms, not of each result.
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))

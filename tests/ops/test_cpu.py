"""The compiled CPU path against a Philox written out in Python integers, the golden values and the torch reference."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numba.core import caching
from torch import Tensor

from randbasis.basis import Basis, basis_entries, block_words
from randbasis.errors import BasisShapeError
from randbasis.ops import cpu, cpu_kernels, reference
from randbasis.ops.reference import Slab, Tile

LAWS = ("sign", "uniform", "normal", "sparse(3)", "sparse(40)")
DTYPES = (torch.float32, torch.float64)
#: (count, rows, cols): one entry; one short strip; odd sizes; whole strips; more than one span of matrices.
SHAPES = ((1, 1, 1), (3, 2, 127), (9, 3, 300), (8, 2, 512), (70, 5, 257), (130, 1, 40))
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
GOLDEN_BASIS = (0x0123456789ABCDEF, 0xECEB6DCF)
#: law -> entries (0, 0, 0..11) and (5, 3, 1000..1003), the table of math.md.
GOLDEN = {
    "sign": ((1, 1, 1, -1, -1, 1, 1, -1, 1, -1, -1, 1), (-1, -1, -1, 1)),
    "uniform": ((49, 141, 193, 129, -63, -215, -255, -183, -239, 253, 1, -211), (-149, -177, 19, 49)),
    "normal": ((-1, -3, -4, -6, 0, -4, 2, -2, 3, -1, 1, 2), (-1, -3, -1, -2)),
    "sparse(3)": ((-1, -1, 1, 1, -1, 1, -1, -1, 0, -1, 1, -1), (1, 0, 1, 0)),
}
#: Law -> the greatest power of two that is not above 1/sqrt(variance), math (5), by hand.
POWERS = {"sign": 1.0, "uniform": 2.0**-8, "normal": 0.5, "sparse(3)": 1.0, "sparse(40)": 4.0}
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}


@pytest.fixture(autouse=True)
def _poisoned_memory(poisoned_memory: None) -> None:
    """Every test of this file."""


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def always_split(monkeypatch: pytest.MonkeyPatch):
    """The smallest of work is split over threads."""
    monkeypatch.setattr(cpu, "_INLINE", 1)


def slab_of(law: str, shape: tuple[int, int, int], seed: int = 0x0123456789ABCDEF, stream: int = 77) -> Slab:
    return Slab(Basis.named(seed, stream, law), *shape)


def packed_words(slab: Slab) -> Tensor:
    return block_words(slab.basis, (0, slab.count), (0, slab.rows), (0, slab.blocks))


def dense(slab: Slab) -> Tensor:
    basis = slab.basis
    shape = (slab.count, slab.rows, slab.cols)
    return POWERS[basis.law.name] * basis_entries(basis.seed, basis.stream, basis.law, shape).double()


def normal_tensor(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sources(slab: Slab) -> dict[str, Tensor | None]:
    return {"generated": None, "packed": packed_words(slab)}


def results(slab: Slab, n: int, dtype: torch.dtype, packed: Tensor | None) -> list[Tensor]:
    """What every op gives for one slab."""
    coefficients = normal_tensor(n, slab.count, dtype=dtype)
    vectors = normal_tensor(n, slab.rows, slab.cols, dtype=dtype)
    whole = Tile(0, slab.count, 0, slab.rows)
    return [
        cpu.words(*slab.basis.key, slab.basis.stream, 0, slab.count, 0, slab.rows, 0, slab.blocks),
        cpu.expand(slab, whole, dtype, packed),
        cpu.combine(coefficients, slab, packed),
        cpu.inner(vectors, slab, packed),
    ]


def assert_close(value: Tensor, expected: Tensor, dtype: torch.dtype):
    """Within rounding of the formula in float64, relative to its root mean square."""
    assert value.dtype == dtype
    assert value.shape == expected.shape
    scale = expected.square().mean().sqrt().clamp_min(1e-300)
    assert ((value.double() - expected).abs().max() / scale).item() < 8 * TOLERANCE[dtype]
    assert ((value.double() - expected).square().mean().sqrt() / scale).item() < TOLERANCE[dtype]


# --- words -------------------------------------------------------------------------------------------------------


def philox_in_python(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, int, int, int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & 0xFFFFFFFF,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def test_the_compiled_path_is_available():
    assert cpu.available() is None


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_words_against_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
):
    block, row, index, stream = counter
    assert philox_in_python(counter, key) == expected
    out = cpu.words(*key, stream, index, 1, row, 1, block, 1)
    assert out.dtype == torch.int32
    assert tuple(out.flatten().numpy().view(np.uint32)) == expected


@given(
    key=st.tuples(*[st.integers(0, 2**32 - 1)] * 2),
    stream=st.integers(0, 2**32 - 1),
    first=st.tuples(*[st.integers(0, 2**32 - 400)] * 3),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 300)),
    point=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 3),
)
def test_words_against_python_integers(
    key: tuple[int, int],
    stream: int,
    first: tuple[int, int, int],
    shape: tuple[int, int, int],
    point: tuple[float, float, float],
):
    count, rows, blocks = shape
    out = cpu.words(*key, stream, first[0], count, first[1], rows, first[2], blocks)
    assert out.shape == (count, rows, 4 * blocks)
    i, row, block = (int(fraction * size) for fraction, size in zip(point, shape, strict=True))
    expected = philox_in_python((first[2] + block, first[1] + row, first[0] + i, stream), key)
    assert tuple(out[i, row, 4 * block : 4 * block + 4].numpy().view(np.uint32)) == expected


@pytest.mark.parametrize("shape", [*SHAPES, (2, 40, 128 * 300), (0, 3, 5), (3, 0, 5), (3, 2, 0)])
def test_words_against_the_torch_reference(shape: tuple[int, int, int]):
    slab = slab_of("sign", shape)
    out = cpu.words(*slab.basis.key, slab.basis.stream, 0, slab.count, 0, slab.rows, 0, slab.blocks)
    assert torch.equal(out, packed_words(slab))


# --- entries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", GOLDEN)
def test_entries_against_golden_values(law: str):
    seed, stream = GOLDEN_BASIS
    out = cpu.expand(Slab(Basis.named(seed, stream, law), 6, 4, 1004), Tile(0, 6, 0, 4), torch.float32)
    first, later = GOLDEN[law]
    assert tuple((out[0, 0, :12] / POWERS[law]).tolist()) == first
    assert tuple((out[5, 3, 1000:] / POWERS[law]).tolist()) == later


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 3, 5), (3, 0, 5), (3, 2, 0)])
def test_entries_against_the_torch_reference(shape: tuple[int, int, int], law: str, dtype: torch.dtype):
    slab = slab_of(law, shape)
    for packed in sources(slab).values():
        out = cpu.expand(slab, Tile(0, slab.count, 0, slab.rows), dtype, packed)
        assert out.dtype == dtype
        assert torch.equal(out.double(), dense(slab))


@pytest.mark.parametrize("tile", [Tile(0, 1, 0, 1), Tile(4, 1, 3, 9), Tile(2, 5, 0, 20), Tile(6, 1, 19, 1)])
@pytest.mark.parametrize("law", LAWS)
def test_a_tile_is_a_part_of_its_slab(law: str, tile: Tile):
    slab = slab_of(law, (7, 20, 333))
    expected = reference.part(dense(slab), tile)
    for packed in sources(slab).values():
        part = None if packed is None else reference.part(packed, tile)
        assert torch.equal(cpu.expand(slab, tile, torch.float64, part), expected)


# --- sums --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_against_the_formula(shape: tuple[int, int, int], n: int, law: str, dtype: torch.dtype):
    slab = slab_of(law, shape)
    coefficients = normal_tensor(n, slab.count, dtype=dtype)
    vectors = normal_tensor(n, slab.rows, slab.cols, dtype=dtype)
    entries = dense(slab)
    for packed in sources(slab).values():
        combined = cpu.combine(coefficients, slab, packed)
        assert_close(combined, torch.einsum("nk,krc->nrc", coefficients.double(), entries), dtype)
        assert_close(cpu.inner(vectors, slab, packed), torch.einsum("nrc,krc->nk", vectors.double(), entries), dtype)


@pytest.mark.parametrize("packed", [False, True])
def test_sums_over_spans_lose_nothing_that_float64_holds(packed: bool):
    """2²⁶ ± 1 ∓ 2²⁶: a sum of float32 forgets the one, a sum of float64 does not."""
    spans, strips = slab_of("sign", (3 * cpu_kernels.SPAN, 1, 300)), slab_of("sign", (40, 1, 3 * cpu_kernels.STRIP))
    coefficients, vectors = torch.zeros(1, spans.count), torch.zeros(1, 1, strips.cols)
    coefficients[0, :: cpu_kernels.SPAN] = torch.tensor([2.0**26, 1.0, -(2.0**26)])
    vectors[0, 0, :: cpu_kernels.STRIP] = torch.tensor([2.0**26, 1.0, -(2.0**26)])
    combined = cpu.combine(coefficients, spans, packed_words(spans) if packed else None)
    assert torch.equal(combined, torch.einsum("nk,krc->nrc", coefficients.double(), dense(spans)).float())
    products = cpu.inner(vectors, strips, packed_words(strips) if packed else None)
    assert torch.equal(products, torch.einsum("nrc,krc->nk", vectors.double(), dense(strips)).float())
    assert bool((combined.abs() == 1).any())  # where the large terms cancel, the small one is left
    assert bool((products.abs() == 1).any())


@pytest.mark.parametrize("n", [130, 300])
def test_more_vectors_than_share_a_pass(n: int):
    slab = slab_of("sign", (5, 2, 140))
    coefficients, vectors = normal_tensor(n, 5, dtype=torch.float32), normal_tensor(n, 2, 140, dtype=torch.float32)
    expected = torch.einsum("nk,krc->nrc", coefficients.double(), dense(slab))
    assert_close(cpu.combine(coefficients, slab), expected, torch.float32)
    assert_close(cpu.inner(vectors, slab), torch.einsum("nrc,krc->nk", vectors.double(), dense(slab)), torch.float32)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("equal_signs", [False, True])
def test_long_sums_keep_the_precision_of_float32(law: str, equal_signs: bool):
    many, large = slab_of(law, (4096, 2, 200)), slab_of(law, (3, 1000, 1000))
    coefficients, vectors = normal_tensor(1, 4096, dtype=torch.float32), normal_tensor(1, 1000, 1000).float()
    if equal_signs:
        coefficients, vectors = coefficients.abs() + 1, vectors.abs() + 1
    expected = coefficients.double() @ dense(many).flatten(1)
    assert_close(cpu.combine(coefficients, many), expected.view(1, 2, 200), torch.float32)
    expected = vectors.flatten(1).double() @ dense(large).flatten(1).T
    assert_close(cpu.inner(vectors, large), expected, torch.float32)


def test_sums_over_nothing():
    for shape, n in (((0, 3, 5), 2), ((4, 0, 5), 2), ((4, 3, 0), 2), ((4, 3, 5), 0)):
        slab = slab_of("uniform", shape)
        for packed in sources(slab).values():
            assert torch.equal(cpu.combine(torch.ones(n, shape[0]), slab, packed), torch.zeros(n, *shape[1:]))
            assert torch.equal(cpu.inner(torch.ones(n, *shape[1:]), slab, packed), torch.zeros(n, shape[0]))


def test_both_sources_give_the_same_bits():
    for law in LAWS:
        slab = slab_of(law, (70, 3, 700))
        generated, packed = (results(slab, 2, torch.float32, source) for source in sources(slab).values())
        assert all(torch.equal(a, b) for a, b in zip(generated, packed, strict=True))


def test_arguments_are_left_as_they_were_and_may_be_strided():
    slab = slab_of("sign", (6, 3, 300))
    coefficients, vectors = normal_tensor(6, 4).T, normal_tensor(300, 3, 2).permute(2, 1, 0)
    packed = packed_words(slab).transpose(0, 1).contiguous().transpose(0, 1)
    before = [coefficients.clone(), vectors.clone(), packed.clone()]
    combined, products = cpu.combine(coefficients, slab, packed), cpu.inner(vectors, slab, packed)
    assert all(torch.equal(a, b) for a, b in zip(before, (coefficients, vectors, packed), strict=True))
    assert_close(combined, reference.combine(coefficients, slab), torch.float64)
    assert_close(products, reference.inner(vectors, slab), torch.float64)


def test_the_default_device_of_torch_is_not_asked():
    slab = slab_of("sign", (6, 3, 300))
    expected = results(slab, 2, torch.float32, None)
    coefficients, vectors = normal_tensor(2, 6, dtype=torch.float32), normal_tensor(2, 3, 300, dtype=torch.float32)
    with torch.device("meta"):
        words = cpu.words(*slab.basis.key, slab.basis.stream, 0, 6, 0, 3, 0, slab.blocks)
        entries = cpu.expand(slab, Tile(0, 6, 0, 3), torch.float32)
        got = [words, entries, cpu.combine(coefficients, slab), cpu.inner(vectors, slab)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_value_that_is_not_finite_reaches_the_sums_that_hold_it_and_no_other():
    slab = slab_of("sign", (10, 2, 300))
    coefficients, vectors = torch.ones(2, 10), torch.ones(2, 2, 300)
    coefficients[1, 9] = vectors[1, 1, 299] = float("nan")
    for out in (cpu.combine(coefficients, slab), cpu.inner(vectors, slab)):
        assert out[0].isfinite().all()
        assert out[1].isnan().all()


def test_wrong_shapes_are_refused_before_memory_is_read():
    slab = slab_of("sign", (4, 3, 300))
    words = packed_words(slab)
    with pytest.raises(BasisShapeError, match=r"coefficients must be \[n, 4\], got \[1, 5\]"):
        cpu.combine(torch.ones(1, 5), slab)
    with pytest.raises(BasisShapeError, match=r"vectors must be \[n, 3, 300\], got \[1, 3, 299\]"):
        cpu.inner(torch.ones(1, 3, 299), slab)
    for wrong in (words[:3], words[:, :2], words[..., :8], words.long()):
        with pytest.raises(BasisShapeError, match="packed must be int32 words of shape"):
            cpu.combine(torch.ones(1, 4), slab, wrong)
        with pytest.raises(BasisShapeError, match="packed must be int32 words of shape"):
            cpu.inner(torch.ones(1, 3, 300), slab, wrong)
        with pytest.raises(BasisShapeError, match="packed must be int32 words of shape"):
            cpu.expand(slab, Tile(0, 4, 0, 3), torch.float32, wrong)


# --- threads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("law", ["sign", "uniform"])
def test_nothing_depends_on_the_number_of_threads(always_split: None, threads, law: str, dtype: torch.dtype):
    slab = slab_of(law, (150, 5, 1100))
    for packed in sources(slab).values():
        threads(1)
        expected = results(slab, 2, dtype, packed)
        for number in (2, 3, 4):
            threads(number)
            assert all(torch.equal(a, b) for a, b in zip(results(slab, 2, dtype, packed), expected, strict=True))


def test_concurrent_callers_do_not_disturb_each_other(always_split: None, threads):
    threads(2)
    slabs = [slab_of(law, (40, 3, 600), seed=seed) for seed in range(3) for law in LAWS]
    expected = [results(slab, 2, torch.float32, None) for slab in slabs]
    with ThreadPoolExecutor(8) as callers:
        futures = [callers.submit(results, slab, 2, torch.float32, None) for _ in range(4) for slab in slabs]
        for future, alone in zip(futures, expected * 4, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(future.result(timeout=120), alone, strict=True))


def test_an_error_in_a_helper_reaches_the_caller(always_split: None, threads):
    threads(2)

    def kernel(start: int, stop: int):
        raise ArithmeticError(f"range {start}..{stop}")

    with pytest.raises(ArithmeticError, match="range"):
        cpu._run(kernel, 100, 100)


# --- processes ---------------------------------------------------------------------------------------------------

PRELUDE = """
import os, resource, sys
import torch
torch.set_num_threads(2)
from randbasis.basis import Basis
from randbasis.ops import cpu
from randbasis.ops.reference import Slab
assert "numba" not in sys.modules, "numba was imported before it was needed"
cpu._INLINE = 1
slab = Slab(Basis.named(1, 2, "sign"), 64, 4, 1024)
coefficients = torch.linspace(-1, 1, 64).view(1, 64)
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("resource", reason="needs a system with fork and resource")
    command = [sys.executable, "-c", PRELUDE + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_forked_child_starts_its_own_threads():
    code = """
before = cpu.combine(coefficients, slab)
assert cpu._helpers._pool is not None
child = os.fork()
if child == 0:
    assert cpu._helpers._pool is None
    same = torch.equal(cpu.combine(coefficients, slab), before)
    sys.exit(0 if same and cpu._helpers._pool is not None else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(cpu.combine(coefficients, slab), before)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_a_large_sum_needs_no_memory_for_its_basis():
    code = """
large = Slab(Basis.named(1, 2, "sign"), 20_000, 8, 1280)
cpu.combine(coefficients, slab), cpu.inner(torch.ones(1, 4, 1024), slab)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cpu.combine(torch.ones(1, 20_000), large), cpu.inner(torch.ones(1, 8, 1280), large)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
unit = 1 if sys.platform == "darwin" else 1024
# In floating point the basis would take 819 MB, as words 26 MB.
sys.exit(0 if grown * unit < 16e6 else f"peak memory grew by {grown * unit / 1e6:.0f} MB")
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


# --- refusals ----------------------------------------------------------------------------------------------------


def test_without_numba_the_reason_is_given(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "randbasis.ops.cpu_kernels", raising=False)
    assert str(cpu.available.__wrapped__()).startswith("numba cannot be imported (")


def test_interpreted_loops_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert "NUMBA_DISABLE_JIT" in str(cpu.available.__wrapped__())


def test_without_a_place_for_compiled_code_kernels_run_and_say_so_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    cpu_kernels._say_that_nothing_is_kept.cache_clear()

    def double(x: int) -> int:
        return 2 * x

    with pytest.warns(UserWarning, match="set NUMBA_CACHE_DIR") as caught:
        compiled = [cpu_kernels.kernel(double), cpu_kernels.kernel(double)]
    assert len(caught) == 1
    assert [function(21) for function in compiled] == [42, 42]

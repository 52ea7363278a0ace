"""The basis against its specification: published known answers, golden values, the law table in Python integers."""

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from randbasis.basis import Basis, basis_entries, block_words, decode, philox
from randbasis.errors import BasisShapeError, LawError, SeedError
from randbasis.laws import Law, check_seed, parse_law, stream_of

LAWS = ("sign", "uniform", "normal", "sparse(3)", "sparse(6)", "sparse(200)")
SEED = 0x0123456789ABCDEF
NAME = "nola/A/model.layers.0.self_attn.q_proj"
GOLDEN = {
    "sign": ([1, 1, 1, -1, -1, 1, 1, -1, 1, -1, -1, 1], [-1, -1, -1, 1]),
    "uniform": ([49, 141, 193, 129, -63, -215, -255, -183, -239, 253, 1, -211], [-149, -177, 19, 49]),
    "normal": ([-1, -3, -4, -6, 0, -4, 2, -2, 3, -1, 1, 2], [-1, -3, -1, -2]),
    "sparse(3)": ([-1, -1, 1, 1, -1, 1, -1, -1, 0, -1, 1, -1], [1, 0, 1, 0]),
}
RANDOM123 = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
word = st.integers(0, 2**32 - 1)


# --- oracle: the page of formulas in Python integers ---------------------------------------------------------------


def philox_in_integers(counter: list[int], key: list[int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def entry_in_integers(seed: int, stream: int, law: str, i: int, row: int, col: int) -> int:
    bits = {"sign": 1, "uniform": 8}.get(law, 16)
    per_block = 128 // bits
    out = philox_in_integers([col // per_block, row, i, stream], [seed % 2**32, seed // 2**32])
    block = sum(value << (32 * n) for n, value in enumerate(out))
    u = (block >> ((col % per_block) * bits)) % 2**bits
    if law == "sign":
        return 1 if u == 0 else -1
    if law == "uniform":
        return 2 * u - 255
    if law == "normal":
        return bin(u).count("1") - 8
    t = round(65536 / float(law[len("sparse(") : -1]))
    return 1 if u < t else -1 if u >= 65536 - t else 0


# --- the generator -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "answer"), RANDOM123)
def test_random123_known_answers(counter: str, key: str, answer: str) -> None:
    c = [torch.tensor([int(word, 16)]) for word in counter.split()]
    k0, k1 = (int(word, 16) for word in key.split())
    assert [f"{int(out):08x}" for out in philox((c[0], c[1], c[2], c[3]), (k0, k1))] == answer.split()


@given(st.lists(word, min_size=4, max_size=4), st.lists(word, min_size=2, max_size=2))
def test_philox_against_integers(counter: list[int], key: list[int]) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    outs = philox((c0, c1, c2, c3), (key[0], key[1]))
    assert [int(out) for out in outs] == philox_in_integers(counter, key)


@pytest.mark.parametrize("law", GOLDEN)
def test_golden_values(law: str) -> None:
    first, later = GOLDEN[law]
    entries = basis_entries(SEED, NAME, law, (1, 1, 12))
    assert entries.dtype == torch.int16
    assert entries.flatten().tolist() == first
    assert basis_entries(SEED, NAME, law, (1, 1, 4), start=(5, 3, 1000)).flatten().tolist() == later


@pytest.mark.parametrize(("name", "stream"), [(NAME, 0xECEB6DCF), ("vera/A", 0x7E62CEE5), ("randlora/B", 0x6A182A82)])
def test_golden_streams(name: str, stream: int) -> None:
    assert stream_of(name) == stream
    assert stream_of(stream) == stream
    assert torch.equal(basis_entries(1, name, "normal", (1, 2, 9)), basis_entries(1, stream, "normal", (1, 2, 9)))


def test_streams_are_of_utf8_names() -> None:
    digest = hashlib.sha256("nola/A/модель.层".encode()).digest()
    assert stream_of("nola/A/модель.层") == digest[0] + (digest[1] << 8) + (digest[2] << 16) + (digest[3] << 24)


@given(
    seed=st.integers(0, 2**64 - 1),
    stream=word,
    law=st.sampled_from(LAWS),
    i=word,
    row=word,
    col=st.integers(0, 8 * 2**32 - 5),
)
def test_entries_against_integers(seed: int, stream: int, law: str, i: int, row: int, col: int) -> None:
    """Anywhere in the counters, to their very ends."""
    got = basis_entries(seed, stream, law, (1, 1, 4), start=(i, row, col)).flatten().tolist()
    assert got == [entry_in_integers(seed, stream, law, i, row, c) for c in range(col, col + 4)]


@pytest.mark.parametrize("law", LAWS)
def test_last_entry_of_the_counters(law: str) -> None:
    last = (2**32 - 1, 2**32 - 1, parse_law(law).entries_per_block * 2**32 - 1)
    got = basis_entries(2**64 - 1, 2**32 - 1, law, (1, 1, 1), start=last)
    assert int(got) == entry_in_integers(2**64 - 1, 2**32 - 1, law, *last)


# --- what an entry does not depend on --------------------------------------------------------------------------------


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, int, int], tuple[int, int, int], list[list[int]]]:
    """A start, a shape, and along every axis the places where it is cut."""
    start = draw(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 300)))
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 300)))
    cuts = [sorted(draw(st.sets(st.integers(0, size), max_size=3)) | {0, size}) for size in shape]
    return start, shape, cuts


@given(law=st.sampled_from(LAWS), tiling=tilings())
@settings(max_examples=60)
def test_any_split_into_tiles_is_the_same_basis(law: str, tiling: tuple) -> None:
    start, shape, cuts = tiling
    whole = basis_entries(SEED, NAME, law, shape, start=start)
    built = torch.full_like(whole, 999)
    spans = [list(pairwise(cut)) for cut in cuts]
    for i0, i1 in spans[0]:
        for r0, r1 in spans[1]:
            for c0, c1 in spans[2]:
                origin = (start[0] + i0, start[1] + r0, start[2] + c0)
                tile = basis_entries(SEED, NAME, law, (i1 - i0, r1 - r0, c1 - c0), start=origin)
                built[i0:i1, r0:r1, c0:c1] = tile
    assert torch.equal(built, whole)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_empty_shapes(law: str, shape: tuple[int, int, int]) -> None:
    assert basis_entries(0, "a/b", law, shape).shape == shape


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    with torch.device(device):
        yield


AMBIENCES: dict[str, Callable] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "one thread": lambda: threads(1),
    "three threads": lambda: threads(3),
    "deterministic algorithms": deterministic,
    "default device meta": lambda: default_device("meta"),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("ambience", AMBIENCES)
def test_ambience_changes_nothing(law: str, ambience: str) -> None:
    expected = basis_entries(SEED, NAME, law, (3, 7, 301), start=(1, 2, 3))
    with AMBIENCES[ambience]():
        got = basis_entries(SEED, NAME, law, (3, 7, 301), start=(1, 2, 3))
        assert got.device.type == "cpu"
        assert got.dtype == torch.int16
    assert torch.equal(got, expected)


def test_global_random_states_neither_read_nor_moved() -> None:
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    expected = [basis_entries(SEED, NAME, law, (2, 3, 130)) for law in LAWS]
    assert torch.equal(torch_state, torch.get_rng_state())
    assert random.getstate() == python_state
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        again = [basis_entries(SEED, NAME, law, (2, 3, 130)) for law in reversed(LAWS)]
    assert all(torch.equal(a, b) for a, b in zip(expected, reversed(again), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("law", LAWS)
def test_any_device_is_the_same_basis(law: str) -> None:
    expected = basis_entries(SEED, NAME, law, (3, 70, 1301), start=(1, 2, 3))
    assert torch.equal(basis_entries(SEED, NAME, law, (3, 70, 1301), start=(1, 2, 3), device="cuda").cpu(), expected)


# --- packed words ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
def test_words_are_the_outputs_of_whole_blocks(law: str) -> None:
    basis = Basis.named(SEED, NAME, law)
    words = block_words(basis, (4, 2), (1, 3), (2, 2))
    assert words.dtype == torch.int32
    assert words.shape == (2, 3, 8)
    for i, row, block in [(0, 0, 0), (1, 2, 1)]:
        expected = philox_in_integers([2 + block, 1 + row, 4 + i, basis.stream], [SEED % 2**32, SEED // 2**32])
        assert [int(w) % 2**32 for w in words[i, row, 4 * block : 4 * block + 4]] == expected
    per_block = basis.law.entries_per_block
    entries = basis_entries(SEED, NAME, law, (2, 3, 2 * per_block), start=(4, 1, 2 * per_block))
    assert torch.equal(decode(words, law), entries)


def test_a_set_bit_is_minus_one() -> None:
    words = torch.tensor([[0b101, -(2**31), 0, -1]], dtype=torch.int32)
    entries = decode(words, "sign").flatten().tolist()
    assert entries[:4] == [-1, 1, -1, 1]
    assert entries[32:64] == [1] * 31 + [-1]
    assert entries[64:] == [1] * 32 + [-1] * 32


# --- the laws --------------------------------------------------------------------------------------------------------


def every_value(law: Law) -> torch.Tensor:
    """The entry of every possible ``u``: the exact distribution of the law."""
    if law.bits == 1:
        return decode(torch.tensor([0b10], dtype=torch.int32), law)[:2]
    count = 2**law.bits
    u = torch.arange(count, dtype=torch.int64).view(-1, 32 // law.bits)
    words = (u << torch.arange(0, 32, law.bits)).sum(-1)
    return decode(torch.where(words >= 2**31, words - 2**32, words).to(torch.int32), law)


@pytest.mark.parametrize("name", LAWS)
def test_mean_and_variance_are_exact(name: str) -> None:
    law = parse_law(name)
    values = every_value(law).double()
    assert len(values) == 2**law.bits
    assert values.mean().item() == 0
    assert values.square().mean().item() == law.variance
    assert law.unit_scale == pytest.approx(law.variance**-0.5, rel=1e-15)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_entry_is_exact_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    values = every_value(parse_law(name))
    assert torch.equal(values.to(dtype).to(torch.int64), values.to(torch.int64))


@pytest.mark.parametrize(
    ("name", "bits", "variance", "threshold"),
    [
        ("sign", 1, 1, 0),
        ("uniform", 8, 21845, 0),
        ("normal", 16, 4, 0),
        ("sparse(2)", 16, 1, 32768),
        ("sparse(3)", 16, 43690 / 65536, 21845),
        ("sparse(6)", 16, 21846 / 65536, 10923),
        ("sparse(65536)", 16, 2 / 65536, 1),
    ],
)
def test_law_table(name: str, bits: int, variance: float, threshold: int) -> None:
    law = parse_law(name)
    assert (law.name, law.bits, law.variance, law.threshold) == (name, bits, variance, threshold)
    assert law.entries_per_block == 128 // bits
    with pytest.raises(FrozenInstanceError):
        law.bits = 2  # type: ignore[misc]


def test_spellings_of_a_sparse_law() -> None:
    assert parse_law("sparse( 6.0 )") == parse_law("sparse(6)") == parse_law(parse_law("sparse(6)"))
    assert parse_law("sparse(1e2)") == parse_law("sparse(100)")


@given(st.floats(2.0, 65536.0) | st.integers(1, 32767).map(lambda t: 65536 / (t + 0.5)))
@settings(max_examples=300)
def test_the_name_of_a_law_is_the_law(sparsity: float) -> None:
    """Ops receive a law by its name, so the name must lose nothing, not even where ``t`` is about to round over."""
    law = parse_law(f"sparse({sparsity!r})")
    assert parse_law(law.name) == law
    assert law.threshold == round(65536 / sparsity)


@pytest.mark.parametrize(
    "law",
    [
        "gauss",
        "Sign",
        "",
        "sparse",
        "sparse()",
        "sparse(1.9)",
        "sparse(0)",
        "sparse(-3)",
        "sparse(65537)",
        "sparse(nan)",
        "sparse(inf)",
        "sparse(1.2.3)",
        "sparse(3",
        "sparse(3)x",
        "sign(2)",
    ],
)
def test_other_laws_are_refused(law: str) -> None:
    with pytest.raises(LawError, match="law must be 'sign'") as refusal:
        basis_entries(0, "a/b", law, (1, 1, 1))
    assert repr(law) in str(refusal.value)
    assert "use for example law='sign'" in str(refusal.value)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [-1, 2**64, 2**200])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(SeedError, match=r"seed must be from 0 to 2\*\*64 - 1") as refusal:
        basis_entries(seed, "a/b", "sign", (1, 1, 1))
    assert str(seed) in str(refusal.value)
    assert "modulo 2**64" in str(refusal.value)


@pytest.mark.parametrize("seed", [True, False, 1.0, 0.5, "7", None])
def test_seeds_of_other_types_are_refused(seed: object) -> None:
    with pytest.raises(SeedError, match="seed must be an integer") as refusal:
        basis_entries(seed, "a/b", "sign", (1, 1, 1))  # type: ignore[arg-type]
    assert repr(seed) in str(refusal.value)
    assert "seed=0" in str(refusal.value)


def test_seeds_of_other_integer_types_are_taken() -> None:
    assert check_seed(np.uint64(2**64 - 1)) == 2**64 - 1
    assert check_seed(torch.tensor(7)) == 7


def test_all_64_bits_of_the_seed_count() -> None:
    draws = [basis_entries(1 << bit, "a/b", "normal", (1, 1, 64)) for bit in range(64)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 64


@pytest.mark.parametrize("stream", [-1, 2**32, 1.5, True])
def test_bad_streams_are_refused(stream: object) -> None:
    with pytest.raises(BasisShapeError, match=r"stream must be .*0 to 2\*\*32 - 1") as refusal:
        stream_of(stream)  # type: ignore[arg-type]
    assert repr(stream) in str(refusal.value)
    assert "stream_of('method/role')" in str(refusal.value)


@pytest.mark.parametrize(
    ("axis", "shape", "start"),
    [
        ("index", (2, 1, 1), (2**32 - 1, 0, 0)),
        ("index", (-1, 1, 1), (0, 0, 0)),
        ("row", (1, 2, 1), (0, 2**32 - 1, 0)),
        ("row", (1, 1, 1), (0, -1, 0)),
        ("col", (1, 1, 2), (0, 0, 128 * 2**32 - 1)),
        ("col", (1, 1, 1), (0, 0, -1)),
    ],
)
def test_shapes_outside_of_the_counters_are_refused(axis: str, shape: tuple, start: tuple) -> None:
    with pytest.raises(BasisShapeError, match=f"^{axis} must lie in") as refusal:
        basis_entries(0, "a/b", "sign", shape, start=start)
    place = ["index", "row", "col"].index(axis)
    assert f"start {start[place]} and size {shape[place]}" in str(refusal.value)
    assert "ask for a smaller shape" in str(refusal.value)

"""The hashed law, math (25), against Python integers and golden values, and what its k is a part of."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from randbasis.basis import Basis, basis_entries, block_words, decode, hashed_terms
from randbasis.errors import BasisShapeError, LawError
from randbasis.laws import MATRICES_LIMIT, parse_law
from randbasis.methods import Nola, Pranc, RandLora, Vera
from randbasis.ops import Slab

SEED, STREAM = 0x0123456789ABCDEF, 0xECEB6DCF
#: k, start of row and column → index and sign of each place.
GOLDEN = [
    (
        128,
        (0, 0),
        [96, 18, 11, 91, 100, 111, 42, 16, 118, 116, 113, 5],
        [1, 1, 1, -1, -1, -1, 1, 1, 1, 1, -1, 1],
    ),
    (128, (3, 1000), [6, 0, 119, 86], [1, -1, -1, -1]),
    (1000, (0, 0), [753, 140, 87, 714], [1, 1, 1, -1]),
]
word = st.integers(0, 2**32 - 1)


def philox_in_integers(counter: list[int], key: list[int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def term_in_integers(seed: int, stream: int, k: int, row: int, col: int) -> tuple[int, int]:
    w = philox_in_integers([col // 4, row, 0, stream], [seed % 2**32, seed // 2**32])[col % 4]
    return w * k // 2**32, -1 if w % 2 else 1


def terms(seed: int, stream: int, k: int, row: int, cols: range) -> list[tuple[int, int]]:
    """Read off the entries of all matrices."""
    entries = basis_entries(seed, stream, f"hashed({k})", (k, 1, len(cols)), start=(0, row, cols[0]))[:, 0]
    assert entries.dtype == torch.int16
    assert (entries != 0).sum(0).tolist() == [1] * len(cols)
    return list(zip(entries.abs().argmax(0).tolist(), entries.sum(0).tolist(), strict=True))


@pytest.mark.parametrize(("k", "at", "owners", "signs"), GOLDEN, ids=str)
def test_golden_values(k: int, at: tuple[int, int], owners: list[int], signs: list[int]) -> None:
    row, col = at
    found = terms(SEED, STREAM, k, row, range(col, col + len(owners)))
    assert found == list(zip(owners, signs, strict=True))


@given(seed=st.integers(0, 2**64 - 1), stream=word, k=st.integers(1, 300), row=word, col=st.integers(0, 2**34 - 6))
def test_entries_against_integers(seed: int, stream: int, k: int, row: int, col: int) -> None:
    """Anywhere in the counters, to their very ends."""
    found = terms(seed, stream, k, row, range(col, col + 6))
    assert found == [term_in_integers(seed, stream, k, row, c) for c in range(col, col + 6)]


@given(k=st.integers(1, MATRICES_LIMIT), row=st.integers(0, 100))
def test_terms_of_words_against_integers(k: int, row: int) -> None:
    law = parse_law(f"hashed({k})")
    owners, signs = hashed_terms(block_words(Basis(SEED, STREAM, law), (0, 1), (row, 1), (0, 3)), law)
    expected = [term_in_integers(SEED, STREAM, k, row, col) for col in range(12)]
    assert list(zip(owners.flatten().tolist(), signs.flatten().tolist(), strict=True)) == expected


def test_parts_of_it_are_parts_of_the_whole() -> None:
    whole = basis_entries(SEED, STREAM, "hashed(9)", (9, 5, 70))
    part = basis_entries(SEED, STREAM, "hashed(9)", (4, 2, 30), start=(3, 2, 37))
    assert torch.equal(part, whole[3:7, 2:4, 37:67])
    assert basis_entries(SEED, STREAM, "hashed(9)", (0, 3, 5)).shape == (0, 3, 5)


def test_another_k_is_another_basis() -> None:
    """The matrices of a smaller k are not among those of a larger one."""
    small, large = (basis_entries(SEED, STREAM, f"hashed({k})", (k, 8, 64)) for k in (8, 9))
    assert not any(torch.equal(one, other) for one in small for other in large)


@pytest.mark.parametrize("k", [1, 7, 1000])
def test_owners_and_signs_come_as_often_as_the_law_says(k: int) -> None:
    """Pearson's chi-squared over matrices and signs together."""
    law = parse_law(f"hashed({k})")
    owners, signs = hashed_terms(block_words(Basis.named(3, "statistics/hashed", law), (0, 1), (0, 64), (0, 512)), law)
    found = torch.bincount((2 * owners + (signs > 0)).flatten(), minlength=2 * k).double()
    expected, freedom = found.sum().item() / (2 * k), 2 * k - 1
    statistic = ((found - expected) ** 2 / expected).sum().item()
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def test_neighbours_are_uncorrelated() -> None:
    """The terms of places next to each other, along rows and columns: equal owners as often as chance has it."""
    law = parse_law("hashed(16)")
    owners, signs = hashed_terms(block_words(Basis.named(9, "statistics/hashed", law), (0, 1), (0, 256), (0, 64)), law)
    for dim in (0, 1):
        for lag in (1, 2, 3, 4, 8, 64):
            here = owners[0].narrow(dim, 0, 256 - lag)
            there = owners[0].narrow(dim, lag, 256 - lag)
            met = (here == there).double().mean().item()
            assert abs(met - 1 / 16) < 4.5 * math.sqrt(15 / 256 / here.numel())
            together = (signs[0].narrow(dim, 0, 256 - lag) * signs[0].narrow(dim, lag, 256 - lag)).double().mean()
            assert abs(together.item()) < 4.5 / math.sqrt(here.numel())


# --- the law and its name ---------------------------------------------------------------------------------------------


def test_the_name_says_k() -> None:
    law = parse_law("hashed( 128 )")
    assert (law.name, law.bits, law.variance, law.matrices, law.kind) == ("hashed(128)", 32, 1 / 128, 128, "hashed")
    assert law.entries_per_block == 4
    assert law.unit_scale == pytest.approx(math.sqrt(128), rel=1e-15)
    assert (law.power, law.unit) == (1.0, law.unit_scale)
    assert parse_law(law.name) == law == parse_law("hashed").of(128)
    assert law.of(128) is law
    assert parse_law("sign").of(7) is parse_law("sign")


@pytest.mark.parametrize("name", ["hashed(0)", f"hashed({MATRICES_LIMIT + 1})", "hashed(-1)", "hashed(1.5)", "Hashed"])
def test_a_k_that_cannot_be(name: str) -> None:
    with pytest.raises(LawError):
        parse_law(name)


def test_entries_want_to_be_told_k() -> None:
    with pytest.raises(LawError, match=r"law must be 'hashed\(k\)' for a basis of k matrices, got 'hashed'"):
        basis_entries(SEED, STREAM, "hashed", (4, 1, 4))
    with pytest.raises(BasisShapeError, match=r"index must lie in 0..4 for .* got start 2 and size 3"):
        basis_entries(SEED, STREAM, "hashed(4)", (3, 1, 4), start=(2, 0, 0))
    with pytest.raises(LawError, match="law must be one whose matrices have words of their own"):
        decode(torch.zeros(1, 4, dtype=torch.int32), "hashed(4)")


def test_a_slab_knows_k() -> None:
    slab = Slab(Basis.named(SEED, STREAM, "hashed"), 5, 2, 9)
    assert slab == Slab(Basis.named(SEED, STREAM, "hashed(5)"), 5, 2, 9)
    assert slab.basis.law.name == "hashed(5)"
    assert slab.packed_bytes == 2 * 3 * 16
    with pytest.raises(BasisShapeError, match=r"count must be 5 for the law 'hashed\(5\)', got 4"):
        Slab(slab.basis, 4, 2, 9)


@pytest.mark.parametrize("method", [Vera, RandLora])
def test_methods_without_a_sum_of_matrices_refuse_it(method: type) -> None:
    with pytest.raises(LawError, match=f"law must be one whose matrices are whole for {method.name}.*use law='sign'"):
        method(r=4, law="hashed")


def test_a_method_says_k_by_its_number_of_matrices() -> None:
    with pytest.raises(LawError, match=r"got 'hashed\(8\)'; use law='hashed' and num_basis=8"):
        Nola(r=4, num_basis=8, alpha=4.0, law="hashed(8)")
    one, other = (Pranc(num_basis=k, law="hashed") for k in (8, 9))
    assert one.identity() == {"method": "pranc", "num_basis": 8, "share_basis": True, "seed": 0, "law": "hashed"}
    assert one.identity() != other.identity()

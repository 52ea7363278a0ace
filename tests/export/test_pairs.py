"""LoRA pairs against the ΔW that they stand for, in float64, and against the singular value decomposition."""

import math

import pytest
import torch
from torch import Tensor

from randbasis.adapter_file import Base, PackedAdapter, Spec, SpecMatrix, group_matrices
from randbasis.errors import ExportRankError, PrecisionError, RankError
from randbasis.export.pairs import LoraPair, lora_pairs, total_error, truncated
from randbasis.methods import Factors, Method, Nola, Pranc, RandLora, Vera

EXACT: dict[str, Method] = {
    "nola": Nola(r=3, num_basis=5, alpha=2.0, seed=7),
    "nola-own-basis": Nola(r=3, num_basis=5, num_basis_b=4, alpha=2.0, seed=7, share_basis=False),
    "nola-plain": Nola(r=2, num_basis=5, alpha=1.0, seed=7, parametrization="plain", law="uniform"),
    "vera": Vera(r=6, seed=7),
    "vera above the sides": Vera(r=40, seed=7, law="normal"),
}
FULL: dict[str, Method] = {
    "randlora": RandLora(r=5, seed=7),
    "randlora-paper": RandLora(r=5, seed=7, scaling="paper", law="sparse(3)"),
    "pranc": Pranc(num_basis=6, seed=7),
}
#: Whole layers both ways, and a fused projection of which the first and the last third are adapted.
PARTS = [("wide", "", 0, 12, 12, 30), ("tall", "", 0, 30, 30, 12)]
PARTS += [("fused", "q", 0, 16, 48, 20), ("fused", "v", 32, 16, 48, 20)]


def adapter(method: Method) -> PackedAdapter:
    matrices = [SpecMatrix(*one, method) for one in PARTS]
    spec = Spec(method, Base(), group_matrices(matrices), 32)
    generator = torch.Generator().manual_seed(5)
    streams = torch.randint(1 << 20, (spec.size, len(method.roles)), generator=generator)
    values = torch.randn(spec.count, generator=generator)
    return PackedAdapter.of(spec, values, streams=None if method.shares_basis else streams)


def deltas(packed: PackedAdapter) -> dict[str, Tensor]:
    """ΔW of each whole layer in float64, zeros where it is not adapted."""
    whole: dict[str, Tensor] = {}
    for one, delta in packed.matrices():
        target = whole.setdefault(one.name, torch.zeros(one.out_features, one.in_features, dtype=torch.float64))
        target[one.start : one.start + one.rows] = delta.double().matrix()
    return whole


def product(pair: LoraPair) -> Tensor:
    return pair.up.double() @ pair.down.double()


@pytest.mark.parametrize("name", EXACT)
def test_own_factors_against_delta(name: str):
    packed = adapter(EXACT[name])
    pairs = {pair.name: pair for pair in lora_pairs(packed, None, torch.float64)}
    own = packed.spec.method.rank(1, 1)
    assert {name: pair.rank for name, pair in pairs.items()} == {"wide": own, "tall": own, "fused": 2 * own}
    for layer, delta in deltas(packed).items():
        torch.testing.assert_close(product(pairs[layer]), delta, rtol=1e-12, atol=1e-12)
        assert math.isclose(pairs[layer].norm, float(delta.norm()), rel_tol=1e-12)
        assert pairs[layer].error < 1e-14
    assert not pairs["fused"].up[16:32].any()


@pytest.mark.parametrize("name", EXACT | FULL)
@pytest.mark.parametrize("rank", [1, 2, 9])
def test_a_lower_rank_loses_the_smallest_singular_values(name: str, rank: int):
    """What Eckart and Young say of the nearest matrix of a rank, layer by layer and in all."""
    packed = adapter((EXACT | FULL)[name])
    pairs = lora_pairs(packed, rank, torch.float64)
    lost: list[float] = []
    for pair, (layer, delta) in zip(pairs, deltas(packed).items(), strict=True):
        assert pair.name == layer
        assert pair.rank <= rank
        values = torch.linalg.svdvals(delta)
        lost.append(float(values[rank:].norm()))
        assert abs(float((product(pair) - delta).norm()) - lost[-1]) < 1e-10 * float(delta.norm())
        assert abs(pair.lost - lost[-1]) < 1e-10 * float(delta.norm())
    size = math.hypot(*(float(delta.norm()) for delta in deltas(packed).values()))
    assert abs(total_error(pairs) - math.hypot(*lost) / size) < 1e-10


@pytest.mark.parametrize("name", FULL)
def test_full_rank_loses_nothing(name: str):
    packed = adapter(FULL[name])
    for pair, delta in zip(lora_pairs(packed, 1000, torch.float64), deltas(packed).values(), strict=True):
        torch.testing.assert_close(product(pair), delta, rtol=1e-10, atol=1e-10)
        assert pair.rank <= min(delta.shape)


@pytest.mark.parametrize("name", FULL)
def test_full_rank_without_a_rank_is_refused_and_the_exact_one_named(name: str):
    packed = adapter(FULL[name])
    with pytest.raises(ExportRankError, match=rf"{packed.spec.method.name}.*rank=20, which loses nothing"):
        lora_pairs(packed, None, torch.float32)
    with pytest.raises(RankError, match="rank must be a positive integer, got 0"):
        lora_pairs(packed, 0, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_counts_the_rounding(dtype: torch.dtype):
    packed = adapter(EXACT["nola"])
    for pair, delta in zip(lora_pairs(packed, None, dtype), deltas(packed).values(), strict=True):
        assert pair.up.dtype == pair.down.dtype == dtype
        rounding = float((product(pair) - delta).norm() / delta.norm())
        assert math.isclose(pair.error, rounding, rel_tol=1e-6)
        assert 0 < pair.error < torch.finfo(dtype).eps


def test_factors_that_do_not_fit_the_dtype_are_refused():
    packed = adapter(Nola(r=3, num_basis=5, alpha=1e6, seed=7))
    with pytest.raises(PrecisionError, match=r"do not fit torch.float16, which ends at 6.55e\+04"):
        lora_pairs(packed, None, torch.float16)
    assert lora_pairs(packed, None, torch.bfloat16)


def test_nothing_trained_is_a_pair_of_error_zero():
    method = Nola(r=3, num_basis=5, alpha=2.0)
    spec = Spec(method, Base(), group_matrices([SpecMatrix(*PARTS[0], method)]), 32)
    (pair,) = lora_pairs(PackedAdapter.of(spec, torch.zeros(spec.count)), None, torch.float32)
    assert (pair.norm, pair.error, total_error([pair])) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("shape", [(9, 30), (30, 9)])
@pytest.mark.parametrize("low_rank", [True, False])
def test_truncation_against_svd(shape: tuple[int, int], low_rank: bool):
    generator = torch.Generator().manual_seed(3)
    up, down = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in shape)
    change = Factors(up, down.T) if low_rank else Factors(None, up @ down.T)
    u, s, v = torch.linalg.svd(up @ down.T, full_matrices=False)
    torch.testing.assert_close(truncated(change, 4).matrix(), (u[:, :4] * s[:4]) @ v[:4])

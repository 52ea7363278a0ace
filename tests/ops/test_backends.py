"""Who computes an op: what the environment may say, what is refused and with which reason."""

import sys
import warnings
from collections.abc import Iterator

import pytest
import torch

from randbasis.basis import Basis, basis_entries
from randbasis.errors import BackendError
from randbasis.ops import Slab, backends, cpu, hold, project, reference, triton
from randbasis.ops.reference import Tile, subtiles, tiles

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAWS = ("sign", "uniform", "normal", "sparse(3)", "hashed")


@pytest.fixture
def forgetful() -> Iterator[None]:
    """A choice is made once in a process; these tests make it anew."""
    backends._chosen.cache_clear()
    yield
    backends._chosen.cache_clear()


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch, forgetful: None) -> None:
    monkeypatch.delenv("RANDBASIS_BACKEND", raising=False)
    monkeypatch.setattr(cpu, "available", lambda: "numba cannot be imported (for this test)")


def test_the_fast_path_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANDBASIS_BACKEND", raising=False)
    assert cpu.available() is None
    assert backends.chosen(CPU, torch.float32) == "cpu"
    assert backends.chosen(CPU, torch.float64) == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_environment_names_one(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    for name, backend in [("reference", "reference"), ("cpu", "cpu"), ("auto", "cpu")]:
        monkeypatch.setenv("RANDBASIS_BACKEND", name)
        assert backends.chosen(CPU, dtype) == backend


def test_unknown_backend_names_argument_value_and_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANDBASIS_BACKEND", "fpga")
    with pytest.raises(BackendError) as refusal:
        backends.chosen(CPU, torch.float32)
    assert "RANDBASIS_BACKEND must be one of ['auto', 'reference', 'cpu', 'triton'], got 'fpga'" in str(refusal.value)
    assert "unset it" in str(refusal.value)


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        (CUDA, torch.float32, "the compiled loops run on the CPU only, the tensor is on cuda"),
        (CPU, torch.bfloat16, "the compiled loops take float32 and float64, the tensor is torch.bfloat16"),
        (CPU, torch.float16, "the compiled loops take float32 and float64, the tensor is torch.float16"),
    ],
    ids=str,
)
def test_a_named_backend_that_cannot_run_says_why(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, dtype: torch.dtype, reason: str
) -> None:
    assert backends.refusal(device, dtype) == reason
    monkeypatch.setenv("RANDBASIS_BACKEND", "cpu")
    with pytest.raises(BackendError) as refusal:
        backends.chosen(device, dtype)
    assert f"RANDBASIS_BACKEND=cpu was asked for but {reason}" in str(refusal.value)
    assert "unset it to fall back to the reference" in str(refusal.value)


@pytest.mark.usefixtures("without_compiler")
def test_falling_back_is_said_once_with_its_reason() -> None:
    with pytest.warns(UserWarning, match="falls back to its plain torch path.*numba cannot be imported") as seen:
        assert [backends.chosen(CPU, torch.float32) for _ in range(3)] == ["reference"] * 3
    assert len(seen) == 1


@pytest.mark.usefixtures("without_compiler")
def test_what_has_no_fast_path_is_not_worth_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.chosen(CPU, torch.bfloat16) == "reference"
        assert backends.chosen(CUDA, torch.float64) == "reference"
        assert backends.chosen(torch.device("mps"), torch.float32) == "reference"


@pytest.mark.usefixtures("without_compiler")
def test_a_missing_compiler_refuses_the_named_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANDBASIS_BACKEND", "cpu")
    with pytest.raises(BackendError, match="numba cannot be imported"):
        backends.chosen(CPU, torch.float32)


# --- CUDA ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("forgetful")
def test_triton_is_the_default_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANDBASIS_BACKEND", raising=False)
    monkeypatch.setattr(triton, "available", lambda: None)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32):
        assert backends.chosen(CUDA, dtype) == "triton"


@pytest.mark.usefixtures("forgetful")
def test_a_missing_triton_is_said_once_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "randbasis.ops.triton_kernels", None)
    monkeypatch.setattr(triton, "available", triton.available.__wrapped__)
    monkeypatch.delenv("RANDBASIS_BACKEND", raising=False)
    with pytest.warns(
        UserWarning, match=r"plain torch path.*triton cannot be imported.*install randbasis\[gpu\]"
    ) as seen:
        assert [backends.chosen(CUDA, torch.bfloat16) for _ in range(3)] == ["reference"] * 3
    assert len(seen) == 1
    monkeypatch.setenv("RANDBASIS_BACKEND", "triton")
    with pytest.raises(BackendError, match="RANDBASIS_BACKEND=triton was asked for but triton cannot be imported"):
        backends.chosen(CUDA, torch.bfloat16)


def test_a_way_to_project_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANDBASIS_PROJECT", "mixed")
    slab = Slab(Basis.named(0, "project", "sign"), 2, 3, 10)
    with pytest.raises(BackendError) as refusal:
        project(torch.ones(1, 10), hold(slab, "recompute"))
    assert "RANDBASIS_PROJECT must be one of ['auto', 'fused', 'expanded'], got 'mixed'" in str(refusal.value)


# --- both give the same -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("stored", [True, False])
def test_backends_agree(law: str, stored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words and entries bit for bit, sums within rounding; with stored words and without."""
    slab = Slab(Basis.named(2**63 + 1, "backends", law), 13, 6, 700)
    tile = Tile(2, 5, 0, 6)
    generator = torch.Generator().manual_seed(0)
    c, g = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((3, 13), (3, 6, 700)))
    found = []
    for name in ("reference", "cpu"):
        monkeypatch.setenv("RANDBASIS_BACKEND", name)
        words = backends.words(slab, CPU)
        packed = words if stored else None
        sums = backends.combine(c, slab, packed), backends.inner(g, slab, packed)
        found.append((words, backends.expand(slab, tile, torch.float32, CPU, packed), *sums))
    for exact, fast in zip(found[0][:2], found[1][:2], strict=True):
        assert torch.equal(exact, fast)
    for exact, fast in zip(found[0][2:], found[1][2:], strict=True):
        torch.testing.assert_close(fast, exact, rtol=1e-12, atol=1e-12 * exact.abs().max().item())


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_words_of_an_empty_slab(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANDBASIS_BACKEND", name)
    for shape in [(0, 3, 5), (2, 0, 5), (2, 3, 0)]:
        with torch.device("meta"):
            words = backends.words(Slab(Basis.named(0, "a", "sign"), *shape), CPU)
        assert words.device == CPU
        assert words.shape == (shape[0], shape[1], 4 * -(-shape[2] // 128))
        assert words.dtype == torch.int32


@pytest.mark.parametrize("shape", [(7, 5, 30), (2, 40, 9), (1, 1, 100), (5, 1, 3)], ids=str)
@pytest.mark.parametrize("limit", [1, 10, 64, 150, 10**6])
def test_tiles_cover_every_row_once(shape: tuple[int, int, int], limit: int) -> None:
    slab = Slab(Basis.named(0, "tiles", "normal"), *shape)
    seen = torch.zeros(shape[:2], dtype=torch.int64)
    for tile in tiles(slab, limit):
        assert tile.count * tile.rows * slab.cols <= max(limit, slab.cols)
        assert tile.count == 1 or tile.rows == slab.rows
        seen[tile.index : tile.index + tile.count, tile.row : tile.row + tile.rows] += 1
    assert bool((seen == 1).all())


def test_subtiles_of_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile above the limit is expanded piece by piece."""
    monkeypatch.setenv("RANDBASIS_BACKEND", "reference")
    monkeypatch.setattr(reference, "TILE_ENTRIES", 100)
    slab, tile = Slab(Basis.named(0, "tiles", "normal"), 6, 9, 40), Tile(2, 3, 0, 9)
    assert len(list(subtiles(slab, tile, 100))) == 3 * 5
    expected = basis_entries(0, "tiles", "normal", (3, 9, 40), start=(2, 0, 0)).float() / 2
    assert torch.equal(backends.expand(slab, tile, torch.float32, CPU), expected)

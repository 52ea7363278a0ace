"""The recompute path never holds the basis in floating point: its peak, measured in two ways."""

import ctypes
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from method_cases import draw

from randbasis.methods import Method, Nola, Pranc, Site, Vera
from randbasis.ops import reference

LAWS = ("sign", "uniform", "normal", "sparse(6)")
#: Entries of a tile here, for speed, and of each basis: many tiles.
TILE, ENTRIES = 1 << 16, 1 << 21
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


CASE = "nola k·r·in"


def forward_and_backward_of_delta(method: Method, site: Site) -> None:
    shapes = method.coefficient_shapes(site.out_features, site.in_features)
    coefficients = {name: draw(*shape).float().requires_grad_() for name, shape in shapes.items()}
    method.bind(site).matrix(coefficients).sum().backward()
    assert all(value.grad is not None and value.grad.any() for value in coefficients.values())


def forward_and_backward_of_tokens(method: Method, site: Site) -> None:
    shapes = method.coefficient_shapes(site.out_features, site.in_features)
    coefficients = {name: draw(*shape).float().requires_grad_() for name, shape in shapes.items()}
    x = draw(4, site.in_features).float().requires_grad_()
    method.bind(site).delta(coefficients).apply(x).sum().backward()


CASES: dict[str, tuple[Callable[..., Method], tuple[int, int], Callable[[Method, Site], None]]] = {
    CASE: (
        lambda **options: Nola(r=8, num_basis=512, num_basis_b=8, alpha=8.0, **options),
        (16, 512),
        forward_and_backward_of_delta,
    ),
    "nola one matrix above a tile": (
        lambda **options: Nola(r=64, num_basis=16, num_basis_b=1, alpha=8.0, **options),
        (4, 2048),
        forward_and_backward_of_tokens,
    ),
    "pranc k·out·in": (
        lambda **options: Pranc(num_basis=64, **options),
        (128, 256),
        forward_and_backward_of_delta,
    ),
    "vera r·in": (lambda **options: Vera(r=512, **options), (64, 4096), forward_and_backward_of_tokens),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of small ops: threads that wait for each other only cost time, and memory is what is measured."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "TILE_ENTRIES", TILE)
    for function in (reference.tiles, reference.subtiles):
        monkeypatch.setattr(function, "__defaults__", (TILE,))


def allocations(run: Callable[[], None]) -> tuple[int, int]:
    """Peak of all tensors and size of the largest, in bytes, from the allocator's own events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak, largest = max(peak, live), max(largest, event.nbytes())
    return peak, largest


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(
    ("name", "law"), [(CASE, law) for law in LAWS] + [(name, "sign") for name in CASES if name != CASE]
)
def test_no_tensor_as_large_as_the_basis(name: str, law: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANDBASIS_BACKEND", backend)
    make, shape, run = CASES[name]
    method = make(law=law, basis_storage="recompute")
    site = Site(*shape, method.streams())
    assert max(one.slab.entries for one in method.bind(site).bases) == ENTRIES
    peak, largest = allocations(lambda: run(method, site))
    # ΔW or a factor, its gradient, and one tile: as float32, and while it is made as words, counters and bits.
    result = 4 * max(shape[0] * shape[1], method.rank(*shape) * (shape[0] + shape[1])) if method.name != "vera" else 0
    assert largest <= max(8 * TILE, result)
    assert peak <= 32 * TILE + 4 * result
    assert peak < 4 * ENTRIES


def test_the_measure_sees_a_dense_basis() -> None:
    """The control: what the limit above is to catch."""
    make, shape, run = CASES[CASE]
    method = make(basis_storage="dense")
    site = Site(*shape, method.streams())
    bound = method.bind(site)
    peak, largest = allocations(lambda: run(method, site))
    assert largest == 4 * ENTRIES
    assert peak > 4 * ENTRIES
    assert bound.bases


def resident(run: Callable[[], None]) -> int:
    """Growth of this process's resident memory at its highest, in bytes: what compiled loops allocate counts too."""
    # Freed memory that the C library keeps would be taken again without any growth.
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")
    before = memory("VmRSS")
    run()
    return memory("VmHWM") - before


def memory(key: str) -> int:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="resets the peak of a process as Linux with glibc does")
def test_compiled_loops_hold_no_basis_either() -> None:
    def make(storage: str, seed: int) -> tuple[Method, Site]:
        method = Nola(r=8, num_basis=512, num_basis_b=8, alpha=8.0, basis_storage=storage, seed=seed)  # type: ignore[arg-type]
        return method, Site(64, 8192, method.streams())

    run = forward_and_backward_of_delta
    run(*make("recompute", 0))  # compiles the loops
    whole = 4 * 8 * 512 * 8192
    try:
        growth = resident(lambda: run(*make("recompute", 1)))
    except PermissionError:
        pytest.skip("this process may not reset its peak memory")
    assert growth < whole / 4
    dense, site = make("dense", 2)
    bound = dense.bind(site)
    assert resident(lambda: run(dense, site)) > 0.9 * whole
    assert bound.bases

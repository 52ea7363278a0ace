"""The cases for a GPU at tiny sizes, on the kernels: interpreted where there is no such device."""

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import gpu_basis, gpu_project, registry
from benchmarks.case import Case, CheckFailed, run
from randbasis.basis import Basis
from randbasis.ops import triton as kernels
from randbasis.ops.reference import Slab

pytest.importorskip("triton", reason="triton is not installed")

CASES = registry.all_cases(tiny=True, device="cuda")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_tiny_case_runs_on_the_kernels(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    # The step's own base layers are what the environment does not name: they run as they do.
    monkeypatch.setenv("RANDBASIS_BACKEND", "triton")
    outcome = run(case, rounds=1)
    assert [timing.side for timing in outcome.timings] == list(case.sides)
    assert all(value > 0 for timing in outcome.timings for value in timing.values)
    assert any(
        word in outcome.checked
        for word in ("reference", "float64", "every layer has every adapter", "themselves alone")
    )


def test_every_family_of_the_issue_is_there() -> None:
    wanted = {"basis", "expand", "step", "memory", "project", "model", "decode", "mixed decode", "bank", "host", "add"}
    assert {case.family for case in CASES} == {f"gpu {name}" for name in wanted}


def test_kernels_that_give_other_bits_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANDBASIS_BACKEND", "triton")
    once = kernels.expand
    monkeypatch.setattr(kernels, "expand", lambda *args, **options: -once(*args, **options))
    case = next(case for case in gpu_basis.cases(tiny=True) if "entries" in case.name)
    with pytest.raises(CheckFailed, match="other bits"):
        run(case, rounds=1)
    once_sum = kernels._sum
    monkeypatch.setattr(kernels, "_sum", lambda *args, **options: 2 * once_sum(*args, **options))
    with pytest.raises(CheckFailed, match="fused, redrawn: the product differs"):
        run(next(iter(gpu_project.cases(tiny=True))), rounds=1)


def test_operations_and_bytes_are_counted_from_the_slab() -> None:
    """100 columns of the sign law are one block of 128 bits a row."""
    slab = Slab(Basis.named(0, "count", "sign"), 3, 2, 100)
    assert gpu_basis.operations(slab, entries=False) == 3 * 2 * 40
    assert gpu_basis.operations(slab, entries=True) == 3 * 2 * (40 + 100 * 2.5)
    assert gpu_basis.written(slab, entries=False) == 3 * 2 * 16
    assert gpu_basis.written(slab, entries=True) == 3 * 2 * 100 * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_command_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["run", "--device", "cuda"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().out

"""``python -m benchmarks`` at tiny sizes: gates, exit codes, selection, going on where it stopped."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import packed_sizes, peak_memory, registry, rows
from benchmarks.case import Built, Case, CheckFailed, Side


@pytest.fixture
def csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A csv for results; threads stay as the tests have them."""
    monkeypatch.setattr(command.torch, "set_num_threads", lambda _: None)
    return tmp_path / "timings.csv"


def test_every_tiny_case_but_memory_runs(csv: Path) -> None:
    others = ["basis", "sums", "prefill", "decode", "expand", "switch", "bank", "bank load", "bank cold"]
    assert command.main(["--tiny", "--rounds", "2", "--output", str(csv), "--only", *others, "Llama 2×64"]) == 0
    runs = rows.read(csv)
    assert {run.family for run in runs} == {*others, "step"}
    for run in runs:
        assert all(len(timing.values) == 2 and min(timing.values) > 0 for timing in run.timings.values())
        assert all(row["checked"] for row in run.rows)


def test_what_is_measured_is_not_measured_again_unless_asked(csv: Path) -> None:
    words = ["run", "--tiny", "--rounds", "1", "--output", str(csv), "--only", "packed signs"]
    for again, expected in (([], 1), ([], 1), (["--again"], 2)):
        assert command.main([*words, *again]) == 0
        assert len(rows.read(csv)) == expected


def test_some_sides_are_run_beside_the_first(csv: Path) -> None:
    words = ["--tiny", "--rounds", "1", "--output", str(csv), "--only", "growth of k", "--sides", "unique"]
    assert command.main(words) == 0
    assert all(list(run.timings)[1:] == [f"NOLA r=4 k={run.parameters['k']} unique"] for run in rows.read(csv))


def test_a_case_that_fails_is_not_timed_and_the_others_are(csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def build(sides: Sequence[str], error: Exception | None) -> Built:
        def check() -> str:
            if error is not None:
                raise error
            return "checked"

        return Built({"a": Side(lambda: timed.append(str(error)))}, check)

    errors = (CheckFailed("differs"), RuntimeError("broken"), None)
    cases = [Case("f", f"case {n}", ("a",), lambda sides, e=e: build(sides, e)) for n, e in enumerate(errors)]
    monkeypatch.setattr(registry, "all_cases", lambda **_: cases)
    assert command.main(["--rounds", "1", "--output", str(csv)]) == 1
    assert [run.case for run in rows.read(csv)] == ["case 2"]
    assert set(timed) == {"None"}


def test_no_case_is_begun_after_the_time_and_the_next_run_goes_on(
    csv: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])

    def build(_: Sequence[str]) -> Built:
        now[0] += 60
        return Built({"a": Side(lambda: None)}, lambda: "checked")

    cases = [Case("f", f"case {n}", ("a",), build) for n in range(3)]
    monkeypatch.setattr(registry, "all_cases", lambda **_: cases)
    words = ["--rounds", "1", "--output", str(csv), "--within", "100"]
    assert command.main(words) == 1
    assert [run.case for run in rows.read(csv)] == ["case 0", "case 1"]
    assert "not begun within 100 s, run again to go on: case 2" in capsys.readouterr().out
    assert command.main(words) == 0
    assert [run.case for run in rows.read(csv)] == ["case 0", "case 1", "case 2"]


def test_targets_of_one_kind_of_device(csv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for device, words in (("cuda", "RandLoRA r=32 at 4,096"), ("cpu", "packed signs")):
        assert command.main(["targets", "--input", str(csv), "--device", device]) == 0
        printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert words in printed
        assert ("GPU: " in printed) == (device == "cuda")


def test_a_selection_without_cases_and_a_missing_device_are_refused(csv: Path) -> None:
    assert command.main(["--only", "no such case", "--output", str(csv)]) == 2
    if not command.torch.cuda.is_available():
        assert command.main(["--device", "cuda", "--output", str(csv)]) == 2
    assert not csv.exists()


def test_the_exit_code_of_targets_says_whether_one_is_missed(csv: Path) -> None:
    assert command.main(["targets", "--input", str(csv)]) == 0
    assert command.main(["--tiny", "--rounds", "1", "--output", str(csv), "--only", "packed signs"]) == 0
    assert command.main(["targets", "--input", str(csv)]) == 1


def test_selection_by_family_model_tokens_and_name() -> None:
    cases = registry.all_cases()
    assert {case.family for case in registry.select(cases, only=["step"])} == {"step"}
    assert all(case.usual for case in registry.select(cases))
    assert len(registry.select(cases, everything=True)) == len(cases)
    (one,) = registry.select(cases, only=["step"], model="MiniLM", tokens=8192)
    assert not one.usual
    assert registry.select(cases, only=["memory growth"])
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    on_gpu = registry.all_cases(device="cuda")
    assert {case.family for case in registry.select(on_gpu, only=["step", "decode"])} == {"gpu step", "gpu decode"}


def test_a_peak_is_measured_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = peak_memory.measured_apart(peak_memory.TINY, "NOLA r=8 k=64", tiny=True)
    assert 100 < peak < 4000
    with pytest.raises(RuntimeError, match="no side in"):
        peak_memory.measured_apart(peak_memory.TINY, "no side", tiny=True)


def test_a_peak_counts_what_was_held_at_once() -> None:
    small = peak_memory.peak_of(lambda: None)
    large = peak_memory.peak_of(lambda: bytearray(b"x" * 50_000_000))
    assert large > small + 40


def test_sizes_of_packed_files_are_measured_once_and_judged(csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--tiny", "--output", str(csv), "--only", "packed size"]
    assert command.main(words) == 0
    (run,) = rows.read(csv)
    weighed = {side: timing.values for side, timing in run.timings.items()}
    assert weighed["packed, 4 bits"] < weighed["packed, 16 bits"] < weighed["PEFT directory"]
    assert all(len(values) == 1 for values in weighed.values())
    monkeypatch.setattr(packed_sizes, "HEADER_LIMIT", 0)
    assert command.main([*words, "--again"]) == 1
    assert len(rows.read(csv)) == 1

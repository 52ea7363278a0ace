"""Peak memory of one side of another case, in a process of its own: ``python -m benchmarks.peak_memory CASE SIDE``.

The peak is of the whole resident set, with python and torch, over two calls of the side, counted from after the models
were made where the kernel can start a new count.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks import growth, training_step
from benchmarks.case import Built, Case, Side

SIDES = (
    *("PEFT LoRA r=16", "PEFT LoRA r=1", "NOLA r=8 k=256", "published NOLA r=8 k=1000"),
    *("VeRA r=256", "PEFT VeRA r=256", "RandLoRA r=32", "PEFT RandLoRA r=32"),
)
MORE_SIDES = (*SIDES, "NOLA r=8 k=64", "NOLA r=8 k=256 unique", "NOLA r=8 k=1000", "VeRA r=1024", "PEFT VeRA r=1024")
USUAL = ("step of GPT-2 6×512, 2,048 tokens",)
TINY = "step of GPT-2 2×64, 512 words, 64 tokens"
CALLS = 2


def cases(*, tiny: bool = False, everything: bool = False) -> Iterator[Case]:
    """The peak of every training step, and of growth when everything is asked for."""
    for of in training_step.cases(tiny=tiny, everything=True):
        if not tiny:
            yield _case(of, MORE_SIDES if everything else SIDES, tiny=False, usual=of.name in USUAL)
        elif of.name == TINY:
            yield _case(of, ("PEFT LoRA r=16", "RandLoRA r=32"), tiny=True, usual=True)
    for of in () if tiny else growth.cases():
        yield _case(of, of.sides, tiny=False, usual=False)


def _case(of: Case, sides: tuple[str, ...], *, tiny: bool, usual: bool) -> Case:
    return Case(
        family="memory" if of.family == "step" else f"memory {of.family}",
        name=f"peak memory: {of.name}",
        sides=sides,
        build=partial(_build, of, tiny),
        parameters=of.parameters,
        measure=lambda call: float(str(call())),
        quantity="MB",
        usual=usual,
        rounds=1,
        warms_up=False,
    )


def _build(of: Case, tiny: bool, sides: Sequence[str]) -> Built:
    def check() -> str:
        return of.build(sides).check()

    return Built({name: Side(partial(measured_apart, of.name, name, tiny=tiny)) for name in sides}, check)


def measured_apart(case: str, side: str, *, tiny: bool) -> float:
    """Megabytes that a process of its own says it used.

    Raises:
        RuntimeError: it failed.
    """
    words = [sys.executable, "-m", "benchmarks.peak_memory", case, side, "--threads", str(torch.get_num_threads())]
    words += ["--tiny"] if tiny else []
    asked = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    if asked.returncode:
        raise RuntimeError(f"{side} in {case} failed: {asked.stderr.strip().splitlines()[-1:]}")
    return float(asked.stdout.split()[-1])


def peak_of(call: Callable[[], object]) -> float:
    """Largest resident set in MB while something was called twice."""
    # 5 starts a new count of the high-water mark; where that is not allowed, the mark is that of the whole process.
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        print("the peak is that of the whole process: the kernel cannot start a new count", file=sys.stderr)
    for _ in range(CALLS):
        call()
    status = Path(f"/proc/{os.getpid()}/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1000


def main() -> None:
    """Measure, and print a number."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peak_memory", description=__doc__)
    parser.add_argument("case")
    parser.add_argument("side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    known = [*training_step.cases(tiny=given.tiny, everything=True), *growth.cases(tiny=given.tiny)]
    case = next(one for one in known if one.name == given.case)
    print(peak_of(case.build([given.side]).sides[given.side].call))


if __name__ == "__main__":
    main()

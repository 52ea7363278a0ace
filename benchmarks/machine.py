"""What a row of results says about the machine, the software and the revision that it was measured with."""

import datetime
import hashlib
import importlib.metadata
import os
import platform
import resource
import subprocess
import time
from functools import lru_cache
from pathlib import Path

import torch

import randbasis

COLUMNS = ["date", "device", "threads", "versions", "revision"]
PACKAGES = ("torch", "transformers", "peft", "numba")
MEASURED = ["src", "benchmarks", ":(exclude)benchmarks/results"]
"""What decides a timing: the revision of a row is the last one that changed it."""
ROOT = Path(__file__).resolve().parent.parent


def about(device: str = "cpu") -> dict[str, str]:
    """The columns, as of now.

    Args:
        device: torch device that is measured.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "device": processor() if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": str(torch.get_num_threads()),
        "versions": versions(),
        "revision": revision(),
    }


@lru_cache
def versions() -> str:
    """Of python, this package and those below it."""
    named = [("python", platform.python_version()), ("randbasis", randbasis.__version__)]
    named += [(name, importlib.metadata.version(name)) for name in PACKAGES]
    return ", ".join(f"{name} {version}" for name, version in named)


@lru_cache
def processor() -> str:
    """Its name, as the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


@lru_cache
def revision() -> str:
    """The commit that last changed what is measured; ``+`` and a digest of the changes since, when there are any.

    Read once: a long run is named by what it was started with.
    """
    commit = _git("log", "-1", "--format=%h", "--", *MEASURED).strip()
    if not commit:
        return "unknown"
    changes = _git("diff", "HEAD", "--", *MEASURED)
    for name in _git("ls-files", "--others", "--exclude-standard", "--", *MEASURED).splitlines():
        changes += name + (ROOT / name).read_text(encoding="utf-8", errors="replace")
    return commit + (f"+{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else "")


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT, check=False).stdout


def resident_bytes() -> int:
    """Memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def load() -> float:
    """Load average of the last minute."""
    return os.getloadavg()[0]


class Watch:
    """How much other processes compute, from when it is made on."""

    def __init__(self) -> None:
        self._began = self._now()

    def others(self) -> float:
        """Cores that they kept busy on average; what is stolen from a virtual machine counts as theirs."""
        wall, busy, own = (after - before for after, before in zip(self._now(), self._began, strict=True))
        return max(0.0, (busy - own) / wall) if wall > 0 else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float]:
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        try:
            fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
        except OSError:
            return time.perf_counter(), own, own
        user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
        ticks = os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), (user + nice + system + irq + softirq + steal) / ticks, own

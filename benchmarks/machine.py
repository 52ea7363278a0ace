"""What a row of results says about the machine, the software and the revision that it was measured with."""

import datetime
import platform
import subprocess
from pathlib import Path

import peft
import torch
import transformers

import randbasis

COLUMNS = ["date", "device", "threads", "versions", "revision"]


def about() -> dict[str, str]:
    """The columns, as of now."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": _processor(),
        "threads": str(torch.get_num_threads()),
        "versions": f"randbasis {randbasis.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, peft {peft.__version__}",
        "revision": _revision(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _revision() -> str:
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return asked.stdout.strip() or "unknown"

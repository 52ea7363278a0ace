"""What a new user has: the files of a clone, the commands of the README, and a shell."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
BLOCKS = [(language, body) for language, body in FENCES if language != "text"]
#: What of a clone the commands of the README need.
NEEDED = ("src", "pyproject.toml", "README.md", "LICENSE", "examples/restaurants.csv")


def commands() -> list[str]:
    """The commands of the README, in order and as a person gives them to the shell; a Python block is one command."""
    found: list[str] = []
    for language, body in BLOCKS:
        if language == "python":
            found.append(f"python - <<'END'\n{body}END")
        else:
            found += [one.removeprefix("$ ").rstrip() for one in re.split(r"\n(?=\$ )", body)]
    return found


def copy_of_the_clone(folder: Path, needed: tuple[str, ...] = NEEDED) -> Path:
    """Copy what git knows, or would take in, of the files that are needed."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *needed]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def environment() -> dict[str, str]:
    """In which the README's virtual environment, empty otherwise, has the packages of the one that runs this.

    They stand in for what pip would fetch: no package index and no hub is reached. The package itself is installed
    from the clone.
    """
    binaries = str(Path(sys.executable).parent)
    own = {name: value for name, value in os.environ.items() if name != "RANDBASIS_STORE"}
    return own | {
        "PATH": binaries + os.pathsep + os.environ.get("PATH", ""),
        "PYTHONPATH": sysconfig.get_path("purelib"),
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "COLUMNS": "120",
        "NO_COLOR": "1",
    }

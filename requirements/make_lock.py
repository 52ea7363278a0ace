"""`make lock`: pin what the ranges of pyproject.toml resolve to, newest for `make install`, oldest for its test.

uv resolves from metadata alone, for every Python and platform at once, and installs nothing. Both files are
constraints: they say which version, and pyproject.toml says what is installed.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
HELD, LOCK, OLDEST = HERE / "held.txt", HERE / "lock.txt", HERE / "oldest.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def name_of(requirement: str) -> str:
    """`"moto[s3]>=5.1"` -> `moto`, spelled as indexes spell it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0]).lower()


def compile_pins(output: Path, *options: str) -> None:
    """Write one file of pins; those that it holds already do not count."""
    oldest_python = PROJECT["requires-python"].removeprefix(">=")
    command = ["-m", "uv", "pip", "compile", "pyproject.toml", "--extra", "dev", "--universal", "--upgrade", "--quiet"]
    subprocess.run(
        [sys.executable, *command, "--python-version", oldest_python, "--output-file", str(output), *options],
        cwd=ROOT,
        env=os.environ | {"UV_CUSTOM_COMPILE_COMMAND": "make lock"},
        check=True,
    )


def main() -> None:
    """Write both files, and say what changed in the lock."""
    before = set(LOCK.read_text(encoding="utf-8").splitlines()) if LOCK.exists() else set[str]()
    compile_pins(LOCK, "--constraint", str(HELD))
    pins = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if line and line[0] not in "# "]
    # The oldest of what users install; the tools that test it are those of the lock.
    tools = {name_of(requirement) for requirement in PROJECT["optional-dependencies"]["dev"]} - {"randbasis"}
    held = [line for line in pins if name_of(line) in tools | {"torch"}]
    kept = OLDEST.with_suffix(".in")
    kept.write_text("\n".join(held) + "\n", encoding="utf-8")
    try:
        compile_pins(OLDEST, "--resolution", "lowest-direct", "--constraint", str(kept))
    finally:
        kept.unlink()
    changed = sorted(set(pins) ^ {line for line in before if line and line[0] not in "# "})
    print("\n".join(f"{'+' if line in pins else '-'} {line}" for line in changed) or "make lock: nothing changed")


if __name__ == "__main__":
    main()

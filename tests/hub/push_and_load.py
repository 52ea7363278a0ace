"""Send an adapter to the hub of the environment, then run the code of its card as it stands: a program.

    HF_ENDPOINT=http://127.0.0.1:PORT HF_HOME=DIR python push_and_load.py FOLDER [WORD ...]

A process of its own, since the hub's client reads its environment once; the tests themselves stay offline.
"""

import json
import re
import sys
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from typer.testing import CliRunner

from randbasis.adapter_file import PackedAdapter
from randbasis.cli import app


def main() -> None:
    torch.set_num_threads(1)
    folder, *words = sys.argv[1:]
    pushed = CliRunner().invoke(app, ["push", folder, "me/nola", "--json", *words], catch_exceptions=False)
    if pushed.exit_code:
        sys.stderr.write(pushed.stderr)
        sys.exit(pushed.exit_code)
    with open(hf_hub_download("me/nola", "README.md"), encoding="utf-8") as file:
        blocks: list[str] = re.findall(r"```python\n(.*?)```", file.read(), re.S)
    found: dict[str, Any] = {}
    for block in blocks:
        exec(block, found)
    with torch.no_grad():
        logits = found["model"].eval()(torch.arange(6)[None]).logits
    packed: PackedAdapter = found["packed"]
    packed.write("hf://me/nola/again.safetensors")
    print(json.dumps({**json.loads(pushed.stdout), "blocks": len(blocks), "logits": logits.flatten().tolist()}))


if __name__ == "__main__":
    main()

"""The command loads nothing heavy before it is needed: who asks for help, or for a list, does not wait for torch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from randbasis.adapter_file import Base, PackedAdapter, Spec, SpecMatrix, group_matrices
from randbasis.methods import Nola
from randbasis.store import AdapterStore

HEAVY = (
    "torch",
    "transformers",
    "peft",
    "numba",
    "accelerate",
    "matplotlib",
    "huggingface_hub",
    "sklearn",
    "scipy",
    "fastapi",
)
RUN = f"""
import sys
from randbasis.cli import app
code = app(sys.argv[1:], standalone_mode=False)
loaded = [name for name in {HEAVY} if name in sys.modules]
sys.exit(f"loaded {{loaded}}" if loaded else code)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small store, and one packed file of it."""
    folder = tmp_path_factory.mktemp("small")
    method = Nola(r=2, num_basis=4, alpha=2.0)
    matrices = [SpecMatrix(f"layers.{i}.q_proj", "", 0, 8, 8, 8, method) for i in range(2)]
    spec = Spec(method, Base("base", "llama"), group_matrices(matrices), 16)
    adapter = PackedAdapter.of(spec, torch.ones(spec.count))
    adapter.write(folder / "one.safetensors")
    adapter.at(4).write(folder / "four.safetensors")
    with AdapterStore(folder / "adapters.db") as store:
        store.add("team/one", adapter, tags=["mine"])
        store.add("team/one", adapter.at(8))
        store.add("team/two", adapter.at(4))
        store.add("team/two", adapter.at(3))
    return folder


def run(code: str, words: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "-h",
        "--version",
        "train --help",
        "pack --help",
        "plan --help",
        "store --help",
        "store list {0}/adapters.db --tag mine",
        "store list {0}/adapters.db --method nola --json",
        "store history {0}/adapters.db team/one",
        "store get {0}/adapters.db team/one --output {0}/out.safetensors",
        "store verify {0}/adapters.db",
        "store export {0}/adapters.db {0}/backup",
        "store rollback {0}/adapters.db team/one",
        "store remove {0}/adapters.db team/one --version 2",
        "store gc {0}/adapters.db --keep 1",
        "verify {0}/one.safetensors",
        "verify {0}/four.safetensors --json",
        "store add {0}/new.db {0}/one.safetensors",
        "store import {0}/other.db {0}/backup",
        "serve --help",
        "keys add --name acme --adapters acme/* --rate 10/s --keys {0}/keys.json",
        "keys list --keys {0}/keys.json --json",
        "keys remove --name acme --keys {0}/keys.json",
    ],
)
def test_loads_nothing_heavy(folder: Path, words: str):
    assert run(RUN, words.format(folder))

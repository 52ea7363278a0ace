"""The page that adds a method is true: what it shows is applied to a copy of the package, which then keeps its word."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from randbasis import METHODS
from randbasis.methods import CLASSES
from randbasis.tuner.config import config_class

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "randbasis"
PAGE = (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8")
FENCES = re.findall(r'^```(\w+) title="([\w./]+)"\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL)
USE = """
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from randbasis import AdapterBank
from randbasis.adapters import pack_adapter
from randbasis.train import AdapterSettings
from randbasis.train.method_table import peft_config

def base():
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).eval()

settings = AdapterSettings(method="rowscale", rank=4, targets=("q_proj", "down_proj"))
model = get_peft_model(base(), peft_config(settings, task_type="CAUSAL_LM", head=[]))
ids = torch.arange(12).view(2, 6)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
losses = []
for _ in range(8):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward(); optimizer.step(); optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0] - 0.01, losses
model.eval()
trained = model(input_ids=ids).logits
model.save_pretrained("adapter")
again = PeftModel.from_pretrained(base(), "adapter").eval()
torch.testing.assert_close(again(input_ids=ids).logits, trained)
torch.testing.assert_close(again.merge_and_unload()(input_ids=ids).logits, trained, rtol=1e-4, atol=1e-5)
pack_adapter("adapter", "packed.safetensors", bits=32)
plain = base()
bank = AdapterBank(plain)
bank.load("one", "packed.safetensors")
with bank.rows(["one", "__base__"]):
    mixed = plain(input_ids=ids).logits
torch.testing.assert_close(mixed[0], trained[0], rtol=1e-4, atol=1e-5)
torch.testing.assert_close(mixed[1], base()(input_ids=ids).logits[1])
"""


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and of the contract tests, with what the page shows."""
    copy = tmp_path_factory.mktemp("copy")
    for folder in ("src", "tests/methods", "tests/support"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    for language, name, body in FENCES:
        if language == "diff":
            apply(body, copy / name)
        else:
            assert not (copy / name).exists()
            (copy / name).write_text(body, encoding="utf-8")
    return copy


def apply(diff: str, file: Path) -> None:
    """One hunk without line numbers: the lines that it takes away or leaves stand in one place of the file."""
    lines = diff.splitlines()
    before = "".join(f"{line[1:]}\n" for line in lines if line[0] != "+")
    after = "".join(f"{line[1:]}\n" for line in lines if line[0] != "-")
    text = "\n" + file.read_text(encoding="utf-8")
    assert text.count(f"\n{before}") == 1, f"{file.name} does not have once what the page shows of it:\n{before}"
    file.write_text(text.replace(f"\n{before}", f"\n{after}")[1:], encoding="utf-8")


def run(folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_it_keeps_the_contract(changed: Path):
    told = run(
        changed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/methods/test_contract.py", "-k", "rowscale"
    )
    assert int(re.findall(r"(\d+) passed", told)[0]) > 40
    assert "failed" not in told


def test_it_is_trained_saved_merged_packed_and_served(changed: Path):
    run(changed, "-c", USE)


def words(file: Path) -> set[str]:
    """What the code of a file names, its docstrings and comments apart."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    first = [node.body[0] for node in ast.walk(tree) if isinstance(node, kinds) and node.body]
    told = {id(one.value) for one in first if isinstance(one, ast.Expr)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            found.update(node.value.split() if "\n" not in node.value else ())
        elif isinstance(node, ast.Name | ast.alias | ast.ClassDef):
            found.add(node.id if isinstance(node, ast.Name) else node.name)
    return found


def test_the_files_that_it_touches_are_those_that_know_a_method_by_name():
    known = {str(file.relative_to(ROOT)): words(file) for file in SOURCE.rglob("*.py")}
    touched = []
    for name in CLASSES:
        names = {name, METHODS[name].__name__, config_class(name).__name__}
        files = {file.replace(f"{name}.py", "NAME.py") for file, found in known.items() if names & found}
        touched.append(files)
    listed = re.findall(r"src/randbasis/[\w/.]+\.py", PAGE.partition("## The record")[0].replace("\\_", "_"))
    assert set.intersection(*touched) == set(listed)

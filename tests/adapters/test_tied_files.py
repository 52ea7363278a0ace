"""Adapters whose matrices share coefficients, math (26), at rest: version 2 of the packed file and all its readers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from support.tuner_cases import TIED_CASES, Case, coefficients_of, fill, naive_deltas, outputs, seeded, tiny_llama
from transformers import AutoModelForCausalLM

from randbasis import NolaConfig, load_packed, put
from randbasis.adapter_file import PackedAdapter, container, contents, read
from randbasis.adapter_file.spec import canonical, sha256
from randbasis.adapters import open_adapter
from randbasis.adapters.inspection import inspect_adapter
from randbasis.adapters.packed import exact, pack_adapter, packed_of, unpack_adapter
from randbasis.adapters.plan import plan
from randbasis.adapters.quantization import quantize_adapter
from randbasis.arithmetic import average_adapters, difference
from randbasis.bank import AdapterBank
from randbasis.errors import BasisMismatchError, DigestError, FormatVersionError, SpecKeyError, SpecValueError, TieError
from randbasis.importing.nearest_adapter import import_as_nearest
from randbasis.store import AdapterStore


def saved(case: Case, path: Path, **options: Any) -> Path:
    case.adapted(**options).save_pretrained(path)
    return path


def document(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["spec"])


def rewritten(path: Path, **changes: Any) -> bytes:
    """The file with another spec, its seal set right again; None leaves a key out."""
    found = container.read(path)[0]
    version = changes.pop("version", found.metadata["version"])
    spec = {key: value for key, value in (document(path) | changes).items() if value is not None}
    text = canonical(spec)
    tensors = {name: found.tensors[name] for name in contents.data_order(found.tensors)}
    seal = sha256(text, *(one.data for one in tensors.values() if version == "2"))
    metadata = {**found.metadata, "version": version, "spec": text.decode(), "sha256": seal}
    return container.to_bytes(container.Container(metadata, tensors))


@pytest.mark.parametrize("case", TIED_CASES)
def test_a_packed_file_and_a_folder_say_the_same(case, tmp_path):
    model, batch = case.adapted(), case.batch()
    model.save_pretrained(tmp_path / "folder")
    found = pack_adapter(tmp_path / "folder", tmp_path / "a.safetensors", bits=32)
    adapter = read(tmp_path / "a.safetensors")
    assert found.canonical
    assert adapter.spec.tie == model.peft_config["default"].tie
    assert adapter.spec.count == sum(p.numel() for p in coefficients_of(model).values())
    assert torch.equal(outputs(load_packed(case.base(), tmp_path / "a.safetensors"), batch), outputs(model, batch))
    unpack_adapter(tmp_path / "a.safetensors", tmp_path / "again")
    unpacked = PeftModel.from_pretrained(case.base(), tmp_path / "again")
    assert torch.equal(outputs(unpacked, batch), outputs(model, batch))
    again = packed_of(open_adapter(tmp_path / "again"), bits=32)
    assert again.to_bytes() == (tmp_path / "a.safetensors").read_bytes()
    deltas = naive_deltas(model, case)
    for one, delta in adapter.matrices():
        rows = slice(one.start, one.start + one.rows)
        torch.testing.assert_close(delta.double().matrix(), deltas[one.name][rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
def test_each_precision_has_a_scale_a_shared_vector(bits, tmp_path):
    case = Case("linear", "nola-tied-blocks")
    adapter = packed_of(open_adapter(saved(case, tmp_path / "a")), bits=bits)
    again = PackedAdapter.from_bytes(adapter.to_bytes())
    assert torch.equal(again.values(), adapter.values())
    assert adapter.spec.count == 2 * 12
    if bits < 16:
        assert adapter.scales is not None
        assert adapter.scales.numel() == 2 * 2


def test_streams_of_other_paths_are_stored(tmp_path):
    case = Case("linear", "nola-tied")
    model = case.adapted()
    for layer in (module for module in model.modules() if hasattr(module, "randbasis_streams")):
        layer.randbasis_streams["default"].weight.add_(1)
    model.save_pretrained(tmp_path / "folder")
    pack_adapter(tmp_path / "folder", tmp_path / "a.safetensors", bits=32)
    assert document(tmp_path / "a.safetensors")["streams"] == "stored"
    loaded = load_packed(case.base(), tmp_path / "a.safetensors")
    assert torch.equal(outputs(loaded, case.batch()), outputs(model, case.batch()))
    assert not torch.equal(outputs(loaded, case.batch()), outputs(case.adapted(), case.batch()))


def test_packed_values_are_put_on_an_adapter_that_is_there(tmp_path):
    case = Case("linear", "nola-tied-blocks")
    first, second = (exact(open_adapter(saved(case, tmp_path / str(n), fill_seed=n))) for n in (1, 2))
    model = put(case.base(), first)
    put(model, second)
    assert torch.equal(outputs(model, case.batch()), outputs(case.adapted(fill_seed=2), case.batch()))


# --- what is counted, compared, averaged ---


def test_counts_add_up_to_those_of_the_groups(tmp_path):
    case = Case("linear", "nola-tied-blocks")
    base, folder = tmp_path / "base", saved(case, tmp_path / "a")
    case.base().config.save_pretrained(base)
    assert inspect_adapter(folder).coefficients == 2 * 12
    planned = plan(base, case.config())
    assert planned.coefficients == 2 * 12
    assert planned.bytes == (folder / "adapter_model.safetensors").stat().st_size
    done = quantize_adapter(folder, tmp_path / "q.safetensors", bits=4)
    assert done.coefficients == 2 * 12
    assert max(one.delta_error for one in done.precisions if one.bits == 16) < 1e-2


def test_the_plan_of_a_packed_file_is_its_size(tmp_path):
    options: dict[str, Any] = {"r": 2, "num_basis": 8, "tie": "model", "target_modules": ["q_proj", "v_proj"]}
    seeded(tiny_llama).save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(loaded, NolaConfig(**options)).save_pretrained(tmp_path / "a")
    written = pack_adapter(tmp_path / "a", tmp_path / "a.safetensors", bits=16, base_name="base")
    assert plan(tmp_path / "base", NolaConfig(**options)).bytes_packed == written.bytes


def test_a_mean_is_that_of_the_shared_vectors_and_of_one_tie(tmp_path):
    case = Case("linear", "pranc-tied")
    paths = [saved(case, tmp_path / str(n), fill_seed=n) for n in (1, 2)]
    made = average_adapters(paths, tmp_path / "mean.safetensors")
    assert made.relative < 1e-5  # PRANC is linear
    values = [exact(open_adapter(path)).values() for path in paths]
    torch.testing.assert_close(read(tmp_path / "mean.safetensors").values(), sum(values) / 2)
    apart = difference(*paths)
    torch.testing.assert_close(apart.coefficients.distance, float((values[0] - values[1]).norm()), rtol=1e-6, atol=0)
    other = saved(case, tmp_path / "other", tie="model")
    with pytest.raises(BasisMismatchError, match="tie="):
        average_adapters([paths[0], other], tmp_path / "none.safetensors")


@pytest.mark.parametrize("form", ["coefficients", "factors"])
def test_a_bank_serves_rows_of_several_ties(form, tmp_path):
    case, batch = Case("linear", "nola-tied"), Case("linear", "nola-tied").batch()
    kinds = {"model": {}, "blocks": {"tie": "block:1"}, "own": {"tie": "matrix", "share_basis": False}}
    adapters = {
        name: exact(open_adapter(saved(case, tmp_path / name, fill_seed=n, **options)))
        for n, (name, options) in enumerate(kinds.items())
    }
    model = case.base()
    bank = AdapterBank(model, form=form)
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    users = ["own", "model", None, "blocks"]
    with bank.rows(users):
        found = outputs(model, batch)
    bank.close()
    for row, name in enumerate(users):
        alone = case.base() if name is None else put(case.base(), adapters[name])
        torch.testing.assert_close(found[row], outputs(alone, batch)[row], rtol=2e-4, atol=2e-5)


def test_a_store_keeps_it(tmp_path):
    adapter = packed_of(open_adapter(saved(Case("linear", "nola-tied"), tmp_path / "a")), bits=4)
    with AdapterStore(tmp_path / "adapters.db") as store:
        store.add("tied", adapter.to_bytes())
        assert store.get("tied").packed().to_bytes() == adapter.to_bytes()


def test_an_import_refuses_to_share(tmp_path):
    with pytest.raises(TieError, match="tie='matrix'"):
        import_as_nearest(tmp_path / "lora", tmp_path / "out", NolaConfig(tie="model"))


# --- what a reader refuses ---


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"tie": "block:0"}, TieError),
        ({"tie": 3}, TieError),
        ({"tie": "matrix"}, SpecValueError),
        ({"streams": "somewhere"}, SpecValueError),
        ({"version": "1"}, FormatVersionError),
        ({"version": "3"}, FormatVersionError),
        ({"digest": "0" * 64}, SpecKeyError),
        ({"tie": None}, SpecKeyError),
        ({"matrices": [{"name": "a", "out": 1, "in": 1}]}, SpecKeyError),
        ({"matrices": [{"of": [["a", 1]]}]}, SpecValueError),
        ({"matrices": [{"of": [[1, 2, 3]]}]}, SpecValueError),
        ({"matrices": [{"of": 3}]}, SpecValueError),
        ({"matrices": [{"of": [["q", 4, 4, "q", 0]]}]}, SpecValueError),
    ],
)
def test_a_spec_that_is_none_is_refused(changes, error, tmp_path):
    pack_adapter(saved(Case("linear", "nola-tied"), tmp_path / "a"), tmp_path / "a.safetensors", bits=32)
    assert rewritten(tmp_path / "a.safetensors") == (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(error):
        PackedAdapter.from_bytes(rewritten(tmp_path / "a.safetensors", **changes))


def test_a_changed_coefficient_is_seen(tmp_path):
    pack_adapter(saved(Case("linear", "nola-tied"), tmp_path / "a"), tmp_path / "a.safetensors", bits=32)
    data = bytearray((tmp_path / "a.safetensors").read_bytes())
    data[-2] ^= 1
    with pytest.raises(DigestError, match="all tensors"):
        PackedAdapter.from_bytes(bytes(data))


def test_coefficients_of_several_lengths_in_a_group_are_refused(tmp_path):
    pack_adapter(saved(Case("linear", "nola-tied"), tmp_path / "a"), tmp_path / "a.safetensors", bits=32)
    first, *others = document(tmp_path / "a.safetensors")["matrices"]
    assert not others
    mixed = [first | {"of": first["of"][:1]}, first | {"of": first["of"][1:], "options": {"num_basis": 9}}]
    with pytest.raises(TieError, match="one shape"):
        PackedAdapter.from_bytes(rewritten(tmp_path / "a.safetensors", matrices=mixed))


def test_a_file_without_a_tie_is_of_version_1(tmp_path):
    case = Case("linear", "nola-own-basis")
    pack_adapter(saved(case, tmp_path / "a"), tmp_path / "a.safetensors", bits=32)
    found = container.read(tmp_path / "a.safetensors")[0]
    assert found.metadata["version"] == "1"
    assert not document(tmp_path / "a.safetensors").keys() & {"tie", "streams"}


# --- real weights ---

_FRESH = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from randbasis import load_packed
base, folder, file, ids = sys.argv[1:]
ids = torch.tensor([[int(one) for one in ids.split(",")]])
def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits
own = lambda: AutoModelForCausalLM.from_pretrained(base)
wanted = torch.load(folder + "/logits.pt", weights_only=True)
assert torch.equal(logits(PeftModel.from_pretrained(own(), folder)), wanted["folder"])
assert torch.equal(logits(load_packed(own(), file)), wanted["file"])
print("equal")
"""


def test_under_a_thousand_bytes_on_real_weights_and_in_a_fresh_process(data_dir, console_environment, tmp_path):
    """k = l = 16 on all 35 linear layers: 32 coefficients, 24 bytes of codes and scales."""
    base = data_dir / "llama_stories260k"
    config = NolaConfig(r=4, num_basis=16, target_modules="all-linear", tie="model", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    fill(model)
    ids = [1, 30, 200, 41, 7]
    folder, file = tmp_path / "a", tmp_path / "a.safetensors"
    model.save_pretrained(folder)
    found = pack_adapter(folder, file, bits=4, base_name="llama_stories260k")
    assert found.bytes < 1000
    assert found.contents.spec.count == 32
    logits = {
        "folder": outputs(model, {"input_ids": torch.tensor([ids])}),
        "file": outputs(
            load_packed(AutoModelForCausalLM.from_pretrained(base), file), {"input_ids": torch.tensor([ids])}
        ),
    }
    torch.save(logits, folder / "logits.pt")
    command = [sys.executable, "-W", "ignore", "-c", _FRESH, str(base), str(folder), str(file), ",".join(map(str, ids))]
    done = subprocess.run(
        command, env={**os.environ, **console_environment}, capture_output=True, text=True, timeout=240
    )
    assert done.stdout == "equal\n", done.stderr[-3000:]

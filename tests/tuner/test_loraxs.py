"""LoRA-XS: frozen matrices that are made of the base weight, which is told apart by a digest."""

import copy
import json
import pickle
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from tuner_cases import Case, adapted_layers, fill, make_config, outputs, seeded, snapshot, tiny_gpt2, tiny_llama
from typer.testing import CliRunner

from randbasis.adapter_file import PackedAdapter, read
from randbasis.adapters.inspection import inspect_adapter
from randbasis.adapters.packed import pack_adapter, unpack_adapter
from randbasis.adapters.plan import plan
from randbasis.adapters.putting import put
from randbasis.adapters.quantization import quantize_adapter
from randbasis.arithmetic import average_adapters, difference
from randbasis.cli import app
from randbasis.errors import (
    BaseMismatchError,
    BaseWeightError,
    MeaningError,
    SpecKeyError,
    SpecValueError,
)
from randbasis.export import export_peft_lora
from randbasis.methods import LoraXs, Site
from randbasis.methods.bound_loraxs import leading_triplets
from randbasis.tuner.config import LoraXsConfig

CASE = Case("linear", "loraxs")
BOTH = r"digest [0-9a-f]{16}, the weights here have [0-9a-f]{16}"


def changed(base: nn.Module, name: str = "model.layers.1.self_attn.q_proj.weight") -> nn.Module:
    """The same model with one number of an adapted weight changed."""
    weight = base.get_parameter(name)
    with torch.no_grad():
        weight[0, 0] += 1e-3
    return base


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    CASE.adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# --- the matrices -----------------------------------------------------------------------------------------------------


def test_leading_triplets_are_numpys_with_a_sign() -> None:
    weight = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    left, right = leading_triplets(weight, 4)
    u, s, v = np.linalg.svd(weight.numpy())
    signs = np.sign(u[np.abs(u[:, :4]).argmax(0), range(4)])
    np.testing.assert_allclose(left.numpy(), u[:, :4] * signs, atol=1e-12)
    np.testing.assert_allclose(right.numpy(), (s[:4] * signs)[:, None] * v[:4], atol=1e-12)


def test_two_by_two_by_hand() -> None:
    """W = diag(3, −2): U = (e₁, e₂), Σ Vᵀ = diag(3, −2), so ΔW = (alpha / r) R diag(3, −2)."""
    bound = LoraXs(r=2, alpha=6.0).bind(Site(2, 2, ()), torch.diag(torch.tensor([3.0, -2.0])))
    delta = bound.matrix({"loraxs_r": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
    torch.testing.assert_close(delta, torch.tensor([[9.0, -12.0], [27.0, -24.0]]))


def test_equal_weights_share_what_is_made_of_them() -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    method, site = LoraXs(r=2, alpha=1.0), Site(6, 5, ())
    one, two = method.bind(site, weight), method.bind(site, weight.double().clone())
    assert one == two
    assert one.derived is two.derived
    assert one != method.bind(site, weight + 1)
    assert one != method.bind(site)
    again = pickle.loads(pickle.dumps(one))
    assert again == one
    assert torch.equal(again.of_base(torch.float32, weight.device)[0], one.of_base(torch.float32, weight.device)[0])


def test_what_is_recomputed_is_of_the_same_weight() -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    bound = LoraXs(r=2, alpha=1.0, basis_storage="recompute").bind(Site(6, 5, ()), weight)
    bound.of_base(torch.float32, weight.device)
    assert bound.derived is not None
    assert bound.derived.nbytes == 0
    weight[0, 0] += 1
    with pytest.raises(BaseWeightError, match=r"of digest [0-9a-f]{16}.*changed to [0-9a-f]{16}"):
        bound.of_base(torch.float32, weight.device)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad: float) -> None:
    with pytest.raises(BaseWeightError, match="must be finite"):
        LoraXs(r=2, alpha=1.0).bind(Site(2, 2, ()), torch.tensor([[1.0, bad], [0.0, 1.0]]))
    base = CASE.base()
    base.model.layers[1].mlp.down_proj.weight.data[0, 0] = bad  # the last that would be replaced
    before = snapshot(base)
    with pytest.raises(BaseWeightError, match=r"'model\.layers\.1\.mlp\.down_proj' must be finite"):
        get_peft_model(base, CASE.config())
    assert snapshot(base) == before


# --- the digest -------------------------------------------------------------------------------------------------------


def test_the_digest_by_hand(folder: Path) -> None:
    """Of the rows in float32, layer by layer; and it stands in every place where it is compared."""
    base = CASE.base()
    names = adapted_layers(CASE.adapted().get_base_model())
    each = [
        sha256(base.get_parameter(f"{name}.weight").detach().numpy().tobytes()).hexdigest() for name in sorted(names)
    ]
    digest = sha256("".join(each).encode()).hexdigest()[:16]
    assert json.loads((folder / "adapter_config.json").read_text())["base_weights"] == digest
    pack_adapter(folder, folder.parent / "file")
    assert read(folder.parent / "file").spec.base.weights == digest
    assert digest in (folder.parent / "file").read_bytes().decode("latin-1")
    unpack_adapter(folder.parent / "file", folder.parent / "again")
    assert json.loads((folder.parent / "again" / "adapter_config.json").read_text())["base_weights"] == digest


def test_a_conv1d_and_its_slices_are_made_of_the_transposed_weight() -> None:
    base = seeded(tiny_gpt2)
    weight = base.transformer.h[0].attn.c_attn.weight.detach().clone().T
    model = get_peft_model(base, make_config("loraxs", ["c_attn[v]"], layers_to_transform=[0]))
    (layer,) = adapted_layers(model).values()
    (one,) = layer.matrices("default")
    assert one.bound == one.bound.method.bind(one.bound.site, weight[64:96])


def test_an_adapter_beside_a_merged_one_is_made_of_the_weight_before() -> None:
    model = Case("linear", "nola").adapted()
    model.merge_adapter()
    model.add_adapter("late", CASE.config())
    alone = CASE.adapted()
    for mine, theirs in zip(adapted_layers(model).values(), adapted_layers(alone).values(), strict=True):
        assert mine.matrices("late")[0].bound == theirs.matrices("default")[0].bound


@pytest.mark.parametrize("storage", ["dense", "recompute"])
def test_merging_it_changes_none_of_its_matrices(storage: str) -> None:
    model = CASE.adapted(basis_storage=storage)
    before = outputs(model, CASE.batch())
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, CASE.batch()), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(outputs(model, CASE.batch()), before)


# --- another base -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["folder", "packed"])
def test_another_base_is_refused_and_left_as_it_was(way: str, folder: Path) -> None:
    pack_adapter(folder, folder.parent / "file", bits=32)
    base = changed(CASE.base())
    before = snapshot(base)
    with pytest.raises(BaseMismatchError, match=BOTH):
        PeftModel.from_pretrained(base, folder) if way == "folder" else put(base, read(folder.parent / "file"))
    assert snapshot(base) == before


def test_a_change_of_what_is_not_adapted_makes_no_difference(folder: Path) -> None:
    base = changed(CASE.base(), "model.layers.1.self_attn.o_proj.weight")
    PeftModel.from_pretrained(base, folder)


def test_weights_rounded_to_another_dtype_are_others(folder: Path) -> None:
    with pytest.raises(BaseMismatchError, match=BOTH):
        PeftModel.from_pretrained(CASE.base().to(torch.bfloat16), folder)
    rounded = get_peft_model(CASE.base().to(torch.bfloat16), CASE.config())
    rounded.save_pretrained(folder)
    PeftModel.from_pretrained(CASE.base().to(torch.bfloat16).float(), folder)  # the same numbers


def test_coefficients_for_an_adapter_on_another_base_are_refused(folder: Path) -> None:
    pack_adapter(folder, folder.parent / "file", bits=32)
    model = get_peft_model(changed(CASE.base()), CASE.config())
    two = r"base_weights '[0-9a-f]{16}' there and '[0-9a-f]{16}' here"
    with pytest.raises(MeaningError, match=two):
        model.load_state_dict(CASE.adapted().state_dict())
    with pytest.raises((MeaningError, BaseMismatchError), match=f"{two}|{BOTH}"):
        put(model, read(folder.parent / "file"))
    with pytest.raises((MeaningError, BaseMismatchError), match=f"{two}|{BOTH}"):
        model.load_adapter(str(folder), "default")


def test_copies_keep_it() -> None:
    model = CASE.adapted()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(twin, CASE.batch()), outputs(model, CASE.batch()))


# --- only coefficients at hand ----------------------------------------------------------------------------------------

NEEDED = "loraxs makes its frozen matrices of the base model's weights"


@pytest.mark.parametrize("way", ["inspect", "diff", "export"])
def test_what_needs_the_weights_says_so(way: str, folder: Path) -> None:
    pack_adapter(folder, folder.parent / "file")
    out = folder.parent / "out"
    for source in (folder, folder.parent / "file"):
        runs: dict[str, Any] = {
            "inspect": lambda source=source: inspect_adapter(source),
            "diff": lambda source=source: difference(source, folder),
            "export": lambda source=source: export_peft_lora(source, out),
        }
        with pytest.raises(BaseWeightError, match=NEEDED):
            runs[way]()
    assert not out.exists()


@pytest.mark.parametrize("words", [["inspect"], ["diff", "again"], ["export", "out", "--to", "peft-lora"]])
def test_the_commands_say_it_in_one_line(words: list[str], folder: Path) -> None:
    given = [words[0], str(folder)] + [str(folder) if one == "again" else one for one in words[1:]]
    given = [str(folder.parent / one) if one == "out" else one for one in given]
    result = CliRunner().invoke(app, [*given, "--json"])
    assert result.exit_code != 0
    assert json.loads(result.stdout)["error"] == "BaseWeightError"
    assert "Traceback" not in result.output


def test_quantize_writes_and_leaves_the_error_of_delta_out(folder: Path) -> None:
    out = folder.parent / "out.safetensors"
    done = quantize_adapter(folder, out, bits=8)
    assert {one.delta_error for one in done.precisions} == {None}
    assert done.precisions[1].relative_error > 0
    near = outputs(put(CASE.base(), read(out)), CASE.batch())
    torch.testing.assert_close(near, outputs(CASE.adapted(), CASE.batch()), rtol=0.1, atol=0.05)
    shown = CliRunner().invoke(app, ["quantize", str(folder)], env={"COLUMNS": "140"}).output
    assert "ΔW is made of the base model's weights" in shown
    assert "—" in shown


def test_an_average_of_adapters_of_other_weights_is_refused(folder: Path) -> None:
    other = get_peft_model(changed(CASE.base()), CASE.config())
    fill(other)
    other.save_pretrained(folder.parent / "other")
    with pytest.raises(BaseMismatchError, match=r"digest of weights '[0-9a-f]{16}' and '[0-9a-f]{16}'"):
        average_adapters([folder, folder.parent / "other"], folder.parent / "out")


@pytest.mark.parametrize("option", ["--seed", "--law"])
def test_the_command_takes_no_seed_and_no_law_for_it(option: str) -> None:
    words = ["train", "--task", "causal-lm", "--model", "m", "--data", "d", "--output", "o", "--method", "loraxs"]
    result = CliRunner().invoke(app, [*words, option, "3", "--json"])
    assert json.loads(result.stdout)["error"] == "OptionError"


# --- the packed file and the plan -------------------------------------------------------------------------------------


def test_a_spec_without_the_digest_or_with_another_word(folder: Path) -> None:
    packed = PackedAdapter.from_contents(pack_adapter(folder, folder.parent / "file").contents)
    for weights, error in ((None, SpecKeyError), ("f" * 15, SpecValueError), ("F" * 16, SpecValueError)):
        base = replace(packed.spec.base, weights=weights)
        with pytest.raises(error, match="weights"):
            PackedAdapter(replace(packed.spec, base=base), packed.coefficients).to_bytes()


def test_the_plan_counts_what_is_written(tmp_path: Path) -> None:
    base = seeded(tiny_llama)
    base.save_pretrained(tmp_path / "base")
    config = LoraXsConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    planned = plan(tmp_path / "base", copy.deepcopy(config))
    model = get_peft_model(type(base).from_pretrained(tmp_path / "base"), config)
    model.save_pretrained(tmp_path / "adapter")
    assert planned.coefficients == 4 * 16
    assert planned.bytes == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert planned.bytes_packed == pack_adapter(tmp_path / "adapter", tmp_path / "file", base_name="base").bytes


# --- bases that it cannot be put on -----------------------------------------------------------------------------------


def test_a_quantized_base_is_refused_before_it_is_changed() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no quantized layers")
    base = nn.Sequential(nn.Linear(64, 64), bitsandbytes.nn.Linear4bit(64, 64, bias=False))
    base[1].to("cpu")
    before = repr(base)
    with pytest.raises(BaseWeightError, match=r"'1' in full precision, got one quantized by bnb 4bit"):
        get_peft_model(base, LoraXsConfig(r=4, target_modules=["0", "1"]))
    assert repr(base) == before


def test_an_offloaded_base_is_refused() -> None:
    from accelerate import cpu_offload

    base = seeded(tiny_llama)
    cpu_offload(base, torch.device("cpu"))
    with pytest.raises(BaseWeightError, match="offloaded"):
        get_peft_model(base, CASE.config())


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss() -> None:
    model = get_peft_model(CASE.base(), CASE.config()).train()
    batch = CASE.batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.2)
    losses = []
    for _ in range(30):
        loss = model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.97 * losses[0]

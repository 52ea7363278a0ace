"""What is told of an adapter directory, against the ΔW of the model it was saved from; and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from small_bases import adapted, bert, gpt2, llama, saved
from typer.testing import CliRunner

from randbasis import NolaConfig, PrancConfig, RandbasisConfig, RandLoraConfig, VeraConfig
from randbasis.adapters.inspection import MatrixReport, inspect_adapter, spectrum
from randbasis.adapters.saved import open_folder
from randbasis.cli import app
from randbasis.cli.report import plot_inspection
from randbasis.errors import (
    AdapterFilesError,
    AdapterMissingError,
    BaseMismatchError,
    CoefficientCountError,
    CoefficientValueError,
    DataMissingError,
    HyperparameterError,
    OutputExistsError,
    UnknownMethodError,
)
from randbasis.methods import Factors
from randbasis.tuner.saved_files import check_adapter_files

CONFIGS: dict[str, RandbasisConfig] = {
    "nola": NolaConfig(r=3, num_basis=5, num_basis_b=4, target_modules="all-linear", seed=7),
    "nola-unique": NolaConfig(
        r=3, num_basis=5, target_modules=["c_attn[q,v]", "c_proj"], share_basis=False, law="normal"
    ),
    "nola-plain": NolaConfig(r=2, num_basis=5, target_modules=["c_attn[q]"], parametrization="plain"),
    "vera": VeraConfig(r=4, target_modules=["c_attn[0:10]", "c_fc"]),
    "vera-wide": VeraConfig(r=40, target_modules=["c_fc"]),
    "randlora": RandLoraConfig(r=5, target_modules=["c_fc", "c_proj"], layers_to_transform=[1]),
    "pranc": PrancConfig(num_basis=6, target_modules=["c_attn"]),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("from_model", [False, True], ids=["shapes-as-saved", "shapes-of-the-model"])
def test_norms_and_spectra_against_the_delta_weights(name: str, from_model: bool, tmp_path: Path):
    base = saved(gpt2(), tmp_path / "base")
    model = gpt2()
    model.name_or_path = base
    peft_model = adapted(model, CONFIGS[name], tmp_path / "adapter")
    found = inspect_adapter(tmp_path / "adapter", base if from_model else None)
    layers = dict(peft_model.base_model.model.named_modules())
    seen = set()
    for one in found.matrices:
        layer = layers[one.name]
        (own,) = [m for m in layer.matrices("default") if m.part.name == one.part]
        delta = layer.get_delta_weight("default").detach().T[own.part.start : own.part.stop].double()
        assert (one.out_features, one.in_features) == tuple(delta.shape)
        assert one.norm == pytest.approx(float(delta.norm()), rel=1e-4)
        values = torch.zeros(min(delta.shape), dtype=torch.float64)
        assert one.singular_values is not None
        values[: len(one.singular_values)] = torch.tensor(one.singular_values, dtype=torch.float64)
        torch.testing.assert_close(values, torch.linalg.svdvals(delta), rtol=1e-4, atol=1e-5 * one.norm)
        seen.add((one.name, one.part))
    assert len(seen) == len(found.matrices)
    assert found.coefficients == sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    assert (found.config.method, found.config.seed) == (CONFIGS[name].method, CONFIGS[name].seed)
    assert found.bytes == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size


def test_layers_come_in_their_order_and_a_head_is_counted_apart(tmp_path: Path):
    config = NolaConfig(num_basis=4, r=2, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    adapted(bert(classes=3), config, tmp_path / "adapter")
    found = inspect_adapter(tmp_path / "adapter")
    assert [one.name for one in found.matrices] == [
        f"bert.encoder.layer.{index}.attention.self.query" for index in range(2)
    ]
    assert (found.coefficients, found.head_parameters) == (16, 3 * 16 + 3)


def test_a_wrapped_model_is_found_by_the_ends_of_its_paths(tmp_path: Path):
    adapted(bert(classes=3), NolaConfig(num_basis=4, r=2, target_modules=["query"]), tmp_path / "adapter")
    assert len(inspect_adapter(tmp_path / "adapter", saved(bert(), tmp_path / "base")).matrices) == 2


def test_effective_rank_by_hand():
    def report(*values: float) -> MatrixReport:
        return MatrixReport("m", "", 4, 4, 1, 1.0, values)

    assert report(2.0, 2.0, 2.0).effective_rank == pytest.approx(3)
    assert report(5.0, 0.0).effective_rank == pytest.approx(1)
    assert report(0.0, 0.0).effective_rank == 0
    assert report(3.0, 1.0).effective_rank == pytest.approx(4 / 3**0.75)
    assert report(3.0, 1.0).spectral_norm == 3.0


def test_spectrum_of_factors_against_the_whole_matrix():
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((30, 3), (3, 20)))
    values = spectrum(Factors(up, down))
    torch.testing.assert_close(values, torch.linalg.svdvals(up @ down)[:3])
    assert values.shape == (3,)


def test_a_large_full_rank_change_has_a_norm_but_no_spectrum(tmp_path: Path):
    adapted(gpt2(), CONFIGS["randlora"], tmp_path / "adapter")
    found = inspect_adapter(tmp_path / "adapter", full_spectrum_side=8)
    whole = inspect_adapter(tmp_path / "adapter")
    for one, full in zip(found.matrices, whole.matrices, strict=True):
        assert one.singular_values is None
        assert one.spectral_norm is None
        assert one.effective_rank is None
        assert one.norm == pytest.approx(full.norm)


def test_progress_sees_every_matrix(tmp_path: Path):
    adapted(gpt2(), CONFIGS["pranc"], tmp_path / "adapter")
    lengths: list[int] = []

    def track(entries: Any) -> Any:
        lengths.append(len(entries))
        return entries

    assert lengths == [len(inspect_adapter(tmp_path / "adapter", track=track).matrices)]


def test_random_state_is_left_alone(tmp_path: Path):
    adapted(gpt2(), CONFIGS["nola"], tmp_path / "adapter")
    state = torch.get_rng_state()
    inspect_adapter(tmp_path / "adapter")
    assert torch.equal(torch.get_rng_state(), state)


# --- refusals ---


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def first(tensors: dict[str, torch.Tensor]) -> str:
    return min(name for name in tensors if "randbasis_meaning" not in name)


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def only_a_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def foreign_tensors(folder: Path) -> None:
    save_file({"base_model.model.h.0.attn.c_attn.lora_A.weight": torch.zeros(2)}, folder / "adapter_model.safetensors")


BROKEN: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no directory": (shutil.rmtree, AdapterMissingError, "there is nothing at"),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), AdapterFilesError, "no adapter_config.json"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), AdapterFilesError, "no adapter_model.safeten"),
    "a pickle": (only_a_pickle, AdapterFilesError, "pickle, which is never read"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), AdapterFilesError, "must be JSON"),
    "a JSON list": (lambda f: (f / "adapter_config.json").write_text("[]"), AdapterFilesError, "object, got list"),
    "LoRA": (lambda f: LoraConfig().save_pretrained(str(f)), AdapterFilesError, "LORA adapter of PEFT"),
    "no type": (lambda f: edit_config(f, peft_type=None), AdapterFilesError, "no peft_type"),
    "unknown method": (lambda f: edit_config(f, method="nolb"), UnknownMethodError, "did you mean nola"),
    "unknown option": (lambda f: edit_config(f, num_bases=3), HyperparameterError, "num_basis"),
    "cut short": (cut, AdapterFilesError, "whole safetensors file"),
    "foreign tensors": (foreign_tensors, AdapterFilesError, "do not belong together"),
    "a missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(first(t))), AdapterFilesError, "missing"),
    "wrong count": (
        lambda f: edit_tensors(f, lambda t: t.update({first(t): torch.zeros(3)})),
        CoefficientCountError,
        r"\[5\]",
    ),
    "NaN": (
        lambda f: edit_tensors(f, lambda t: t[first(t)].fill_(torch.nan)),
        CoefficientValueError,
        "not finite",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_directory_is_refused(case: str, tmp_path: Path):
    folder = tmp_path / "adapter"
    adapted(gpt2(), NolaConfig(r=3, num_basis=5, target_modules=["c_fc"]), folder)
    damage, error, named = BROKEN[case]
    damage(folder)
    with pytest.raises(error, match=named):
        inspect_adapter(folder)
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert (result.exit_code, result.stdout) == (2, "")


def test_a_base_model_is_no_adapter(tmp_path: Path):
    base = saved(gpt2(), tmp_path / "base")
    with pytest.raises(AdapterFilesError, match="looks like a base model"):
        check_adapter_files(base)
    with pytest.raises(AdapterFilesError, match="is a file"):
        open_folder(Path(base) / "config.json")


def test_another_base_is_refused(tmp_path: Path):
    adapted(gpt2(), CONFIGS["nola"], tmp_path / "adapter")
    with pytest.raises(BaseMismatchError, match=r"transformer\.h\.0"):
        inspect_adapter(tmp_path / "adapter", saved(llama(), tmp_path / "llama"))
    with pytest.raises(BaseMismatchError, match="16 there and 96×32 here"):
        inspect_adapter(tmp_path / "adapter", saved(gpt2(n_embd=32), tmp_path / "wide"))


def test_slices_need_to_know_their_base(tmp_path: Path):
    adapted(gpt2(), NolaConfig(num_basis=4, target_modules=["c_attn[q]"]), tmp_path / "adapter")
    edit_config(tmp_path / "adapter", base_model_name_or_path=None)
    with pytest.raises(AdapterFilesError, match="name the base model"):
        inspect_adapter(tmp_path / "adapter")
    assert len(inspect_adapter(tmp_path / "adapter", saved(gpt2(), tmp_path / "base")).matrices) == 2
    edit_config(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(DataMissingError, match="gone"):
        inspect_adapter(tmp_path / "adapter")


def test_shapes_must_come_from_somewhere(tmp_path: Path):
    adapted(gpt2(), NolaConfig(num_basis=4, target_modules=["c_fc"]), tmp_path / "adapter")
    edit_config(tmp_path / "adapter", base_shapes=None)
    with pytest.raises(AdapterFilesError, match="base_shapes"):
        inspect_adapter(tmp_path / "adapter")
    assert inspect_adapter(tmp_path / "adapter", saved(gpt2(), tmp_path / "base")).coefficients == 2 * 8


# --- the command ---


def test_command_as_json_and_plot(tmp_path: Path):
    adapted(gpt2(), CONFIGS["nola"], tmp_path / "adapter")
    words = ["inspect", str(tmp_path / "adapter"), "--plot", str(tmp_path / "plot.png"), "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["method"], document["seed"], document["law"]) == ("nola", 7, "sign")
    assert document["coefficients"] == 8 * 9 == sum(row["coefficients"] for row in document["rows"])
    assert all(len(row["singular_values"]) == 3 and row["norm"] > 0 for row in document["rows"])
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG"
        assert len(set(image.convert("L").tobytes())) > 10
    before = (tmp_path / "plot.png").read_bytes()
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert json.loads(refused.stdout)["error"] == OutputExistsError.__name__
    assert (tmp_path / "plot.png").read_bytes() == before
    assert CliRunner().invoke(app, [*words, "--overwrite"]).exit_code == 0


def test_command_shows_a_table(tmp_path: Path):
    adapted(gpt2(), CONFIGS["vera"], tmp_path / "adapter")
    edit_config(tmp_path / "adapter", base_model_name_or_path=saved(gpt2(), tmp_path / "base"))
    result = CliRunner(env={"COLUMNS": "60"}).invoke(app, ["inspect", str(tmp_path / "adapter")])
    assert result.exit_code == 0, result.stderr
    assert "transformer.h.1.attn.c_attn[0:10]" in result.stdout
    assert "…" not in result.stdout
    assert "seed 0" in result.stdout


def test_a_change_that_is_zero_can_be_drawn(tmp_path: Path):
    adapted(gpt2(), CONFIGS["pranc"], tmp_path / "adapter")
    edit_tensors(tmp_path / "adapter", lambda t: [c.zero_() for c in t.values() if c.is_floating_point()] and None)
    found = inspect_adapter(tmp_path / "adapter")
    assert {one.effective_rank for one in found.matrices} == {0.0}
    plot_inspection(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
